"""The kinds of schemes, one file each: ``usq``, ``vq``, ``aq``; ``scalar``, ``levels``, ``output_aware`` and
``additive`` hold what they are made of. ``deployed`` fits all formats of other programs; ``grouped``,
``factors`` and ``scaled`` hold what it is made of.

How to add a scheme:

1. Write ``NAME.py`` here with ``fit(weights, scheme, hessians, seed, report) -> list[CodebookWeight]``, one
   coded weight for each weight [out, in] or [out, in, kh, kw]; all have one shape. H is None where the
   scheme is not calibrated.
2. Register it: a ``SchemeKind`` in ``aquabit.scheme_kinds.KINDS`` (text, layout, look, examples) and a line
   in ``aquabit.quant.weights.FITS``.

A format of another program is an entry of ``aquabit.deployed_kinds`` alone, with a table of levels in
``aquabit.kernels.fixed_levels`` where it has one, and a row in ``tests/quant/schemes/test_deployed.py``; for
GGUF its fields in ``aquabit.exports.gguf_blocks`` too.

Sizes, costs, kernel formats, artifacts, fine-tuning, exports and reports follow from the record.
``tests/quant/schemes/test_kinds.py`` runs the examples of every kind: text, stored bytes, kernel format, fit.
"""
