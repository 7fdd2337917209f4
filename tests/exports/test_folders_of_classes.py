"""Folders of every class of denoiser whose names are published, and of others, for SDNQ: loaded by diffusers,
each layer decoded by SDNQ, and by our reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aquabit.exports import sdnq, sdnq_reader
from aquabit.exports.stored_folder import described_in
from aquabit.graph import layers, trace
from aquabit.scheme import AquabitError
from tests.exports import test_sdnq
from tests.exports.networks import NETWORKS, made
from tests.exports.small_models import case
from tests.exports.test_gguf import graph_of

SLOW = ("sd15", "sdxl")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NETWORKS]
)
def test_every_class_loads_and_decodes(name: str, tmp_path: Path) -> None:
    net = made(name)
    try:
        graph = trace(net)
    except AquabitError:  # some are traced in their pipelines alone
        graph = graph_of(net)
    found = case(net, test_sdnq.every, again=made(name), graph=graph)
    sdnq.check(found.exported)
    sdnq.write(found.exported, tmp_path / "out")
    folder = described_in(tmp_path / "out")
    assert folder is not None
    state = found.reference.state_dict()
    again = dict(sdnq_reader.read_weights(folder, graph))
    assert again.keys() == layers(graph).keys()
    assert [n for n, weight in again.items() if not torch.equal(weight, state[f"{n}.weight"])] == []
    net = test_sdnq.loaded(tmp_path / "out", type(found.reference))
    quantized = {n for n, m in net.named_modules() if hasattr(m, "sdnq_dequantizer")}
    assert quantized == set(found.decoded) and len(quantized) > 10
    wrong = [n for n, w in found.decoded.items() if not torch.equal(test_sdnq.decoded(net, n), w)]
    assert wrong == []
    dense = {k: t for k, t in state.items() if k.removesuffix(".weight") not in found.decoded}
    loaded = net.state_dict()
    assert [k for k, t in dense.items() if not torch.equal(loaded[k].float(), t.float())] == []
