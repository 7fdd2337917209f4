"""Types of tensors as rules for stable-diffusion.cpp (``--tensor-type-rules``), which quantizes a dense model
while it loads or converts it.

Facts of its src/convert.cpp and model loader: rules are joined by commas, ``expression=type`` with ggml's
names of types; the first expression that is found in a tensor's name counts; names begin with
``model.diffusion_model.``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from aquabit.exports.gguf_names import LDM

# parts of the names of what it never quantizes, whatever a rule says
KEPT = (
    *("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."),
    *("x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.", "pos_embed"),
    *("time_embed.", "label_emb.", "embedding"),
)


def sentences(kinds: Mapping[str, str]) -> list[str]:
    """The rules that make stable-diffusion.cpp quantize a model's tensors to these types itself ("": dense),
    and which of them it leaves dense."""
    named = {LDM + name.removeprefix(LDM): kind for name, kind in kinds.items()}
    kept = [name for name, kind in named.items() if kind and any(part in name for part in KEPT)]
    rules = tensor_type_rules({name: "" if name in kept else kind for name, kind in named.items()})
    if not rules:
        return []
    found = [
        f"stable-diffusion.cpp quantizes the dense model so (its own rounding): --tensor-type-rules '{rules}'"
    ]
    if kept:
        found.append(
            f"stable-diffusion.cpp leaves {kept[0]} dense whatever a rule says ({len(kept)} such tensors)"
        )
    return found


def tensor_type_rules(kinds: Mapping[str, str]) -> str:
    """Types of all tensors of a model ("": as they are) as stable-diffusion.cpp's ``--tensor-type-rules``
    takes them: expressions that are looked for in names, the first that is found counts."""
    rules = []
    templates: dict[tuple[str, ...], dict[tuple[str, ...], str]] = defaultdict(dict)
    for name, kind in kinds.items():
        pieces = re.split(r"(\d+)", name)
        templates[tuple(pieces[::2])][tuple(pieces[1::2])] = kind
    for texts, entries in templates.items():
        for numbers, kind in _alternatives(entries):
            if not kind:
                continue
            between = [re.escape(text) for text in texts]
            pattern = between[0] + "".join(n + text for n, text in zip(numbers, between[1:], strict=True))
            # ggml's names of types: all small but the K
            rules.append(f"^{pattern}$={kind.lower().replace('_k', '_K')}")
    return ",".join(rules)


def _alternatives(entries: Mapping[tuple[str, ...], str]) -> list[tuple[tuple[str, ...], str]]:
    """(expressions for numbers, type): numbers that are the first of the same entries are one expression."""
    kinds = set(entries.values())
    if len(kinds) == 1:
        return [(tuple(r"\d+" for _ in next(iter(entries))), kinds.pop())]
    after: dict[str, dict[tuple[str, ...], str]] = defaultdict(dict)
    for (first, *rest), kind in entries.items():
        after[first][tuple(rest)] = kind
    alike: dict[tuple[tuple[tuple[str, ...], str], ...], list[str]] = defaultdict(list)
    for first, inner in after.items():
        alike[tuple(sorted(inner.items()))].append(first)
    found = []
    for same, firsts in alike.items():
        one = firsts[0] if len(firsts) == 1 else f"({'|'.join(firsts)})"
        found += [((one, *rest), kind) for rest, kind in _alternatives(dict(same))]
    return found
