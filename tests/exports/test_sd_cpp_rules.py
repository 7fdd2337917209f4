"""Rules for stable-diffusion.cpp: the first expression that is found in a name gives its type, and no other
tensor gets one."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from aquabit.exports.sd_cpp_rules import sentences, tensor_type_rules


def types(rules: str, names: list[str]) -> dict[str, str]:
    """What stable-diffusion.cpp makes of the names: rules are split at commas, and at the first =."""
    parsed = [rule.split("=") for rule in rules.split(",")] if rules else []
    assert all(len(rule) == 2 for rule in parsed)
    return {name: next((kind for pattern, kind in parsed if re.search(pattern, name)), "") for name in names}


NAMES = st.builds(
    "model.diffusion_model.{}_blocks.{}.{}.{}.weight".format,
    st.sampled_from(["double", "single"]),
    st.integers(0, 12),
    st.sampled_from(["attn", "mlp"]),
    st.integers(0, 3),
)


@given(st.dictionaries(NAMES, st.sampled_from(["Q4_K", "Q8_0", "IQ4_NL", ""]), max_size=40))
def test_every_tensor_gets_its_type(kinds: dict[str, str]) -> None:
    written = {"Q4_K": "q4_K", "Q8_0": "q8_0", "IQ4_NL": "iq4_nl", "": ""}
    found = types(tensor_type_rules(kinds), list(kinds))
    assert found == {name: written[kind] for name, kind in kinds.items()}


def test_blocks_of_one_type_are_one_rule() -> None:
    kinds = {f"blocks.{i}.qkv.weight": "Q4_K" if i % 2 else "Q6_K" for i in range(12)}
    kinds |= {f"blocks.{i}.mlp.{j}.weight": "Q8_0" for i in range(12) for j in (0, 2)}
    assert tensor_type_rules(kinds).split(",") == [
        r"^blocks\.(0|2|4|6|8|10)\.qkv\.weight$=q6_K",
        r"^blocks\.(1|3|5|7|9|11)\.qkv\.weight$=q4_K",
        r"^blocks\.\d+\.mlp\.\d+\.weight$=q8_0",
    ]


def test_what_it_never_quantizes_is_told() -> None:
    said = sentences(
        {"img_in.weight": "Q8_0", "double_blocks.0.x.weight": "Q4_0", "final_layer.x.weight": ""}
    )
    assert said == [
        "stable-diffusion.cpp quantizes the dense model so (its own rounding): --tensor-type-rules"
        r" '^model\.diffusion_model\.double_blocks\.\d+\.x\.weight$=q4_0'",
        "stable-diffusion.cpp leaves model.diffusion_model.img_in.weight dense whatever a rule says (1 such"
        " tensors)",
    ]
    assert sentences({"img_in.weight": "Q8_0"}) == [] and sentences({"a.weight": ""}) == []
