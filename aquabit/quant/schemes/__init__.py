"""The kinds of schemes, one file each: ``usq``, ``vq``, ``aq``; ``scalar``, ``levels``, ``output_aware`` and
``additive`` hold what they are made of.

How to add a scheme:

1. Write ``NAME.py`` here with ``fit(weights, scheme, hessians, seed, report) -> list[CodebookWeight]``, one
   coded weight for each weight [out, in] or [out, in, kh, kw]; all have one shape. H is None where the
   scheme is not calibrated.
2. Register it: a ``SchemeKind`` in ``aquabit.scheme_kinds.KINDS`` (text, layout, look, examples) and a line
   in ``aquabit.quant.weights.FITS``.

Sizes, costs, kernel formats, artifacts, fine-tuning, exports and reports follow from the record.
``tests/test_scheme_kinds.py`` runs the examples of every kind: text, stored bytes, kernel format, fit.
"""
