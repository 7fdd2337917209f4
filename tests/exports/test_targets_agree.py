"""What a target offers, its writer takes: a search inside a target ends with what can be written."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from aquabit.exports.files import WRITERS, Exported
from aquabit.graph import layers
from aquabit.pipelines import load, network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import FP, LayerChoice, QuantConfig, Scheme
from aquabit.targets import TARGETS
from tests.exports.networks import made

SCHEMES = [
    *dict.fromkeys(s for target in TARGETS.values() for s in target.schemes),
    *("usq3", "usq7g8", "int3g16", "int5", "int7", "fp8", "nf4g64", "mxfp4", "vq3", "q4_1", "int2"),
]
MODELS = ("digits-dit", "digits-unet", "flux", "sd3", "sdxl", "z-image")


@cache
def model(name: str) -> tuple[Any, Any]:
    """A denoiser and its graph."""
    if name.startswith("digits"):
        pipe = load(name)
        return network_of(pipe), trace(pipe)
    network = made(name)
    return network, trace(network)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", [t for t in TARGETS if t in WRITERS])
def test_what_a_target_offers_is_written(to: str, name: str) -> None:
    network, graph = model(name)
    nodes, own, held = layers(graph), str(graph.graph["model_class"]), 0
    groups = TARGETS[to].on(nodes, own).tied
    for scheme in map(Scheme.parse, SCHEMES):
        refused = {k for k, node in nodes.items() if TARGETS[to].refusal(scheme, k, node, own) is not None}
        refused |= {k for group in groups if refused & {*group} for k in group}
        chosen = {k: LayerChoice(FP if k in refused else scheme) for k in nodes}
        config = QuantConfig(fingerprint(network), chosen, own)
        WRITERS[to].check(Exported(network=network, config=config, graph=graph, weights={}))
        held += len(nodes) - len(refused)
    assert held
