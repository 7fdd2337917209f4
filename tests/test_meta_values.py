"""Denoisers whose sizes depend on data, followed without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aquabit import _following
from aquabit._meta_values import MetaValues
from aquabit.graph import dense_macs, example_inputs, layers, meta_denoiser, on_meta, trace
from aquabit.memory import activation_bytes, peaks
from aquabit.scheme import AquabitError
from benchmarks.published_sizes import MODELS
from tests.tiny_pipelines import randomised
from tests.tiny_recent import RECENT

pytestmark = pytest.mark.filterwarnings("ignore")


def test_whole_numbers_keep_their_values() -> None:
    mask = torch.empty(2, 5, dtype=torch.int64, device="meta")
    given = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with MetaValues([(mask, given)]), torch.device("meta"):
        lengths = mask.sum(1).tolist()
        places = torch.zeros(2, 5, dtype=torch.int32)
        places[0, :3] = torch.arange(3, dtype=torch.int32)
        sides = torch.tensor([4, 6])
        kept = (lengths, places.cpu().tolist(), int(sides[1]), bool((mask > 0).all()), mask.bool().any())
        assert places.device.type == kept[-1].device.type == "meta"
    assert kept[:4] == ([3, 5], [[0, 1, 2, 0, 0], [0] * 5], 6, False)


def test_tokens_are_shared_evenly_and_the_unknown_stays_unknown() -> None:
    with MetaValues(), torch.device("meta"):
        scores = torch.rand(12, 4)
        chosen = scores.topk(2, -1).indices
        assert chosen.flatten().bincount().tolist() == [6] * 4
        assert sorted(chosen.flatten().argsort().tolist()) == list(range(24))
        known = torch.arange(4)
        view = known[:2]
        view.copy_(scores[:2, 0])  # numbers that nobody knows
        for asked in (lambda: known.sum().item(), lambda: scores.sum().item(), view.tolist):
            with pytest.raises((RuntimeError, NotImplementedError)):
                asked()


def told(graph: Any) -> dict[str, Any]:
    return {n: (a["operator"], a["macs"], a["tokens"], a["step_invariant"]) for n, a in layers(graph).items()}


@pytest.mark.parametrize("name", ["lumina2", "hidream"])
def test_what_depends_on_data_is_what_a_real_call_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the pipeline's own mask; experts have as many tokens in all, and each the same."""
    pipe = randomised(RECENT[name])
    graph = trace(pipe.transformer) if name == "hidream" else traced(pipe)

    def refuse(*_: Any) -> None:
        raise RuntimeError("no meta device")

    monkeypatch.setattr(_following, "on_meta", refuse)
    real = trace(pipe.transformer) if name == "hidream" else traced(pipe)
    if name == "lumina2":
        assert told(graph) == told(real)
        return
    assert layers(graph).keys() == layers(real).keys() and dense_macs(graph) == dense_macs(real)
    for part in ("experts.", ""):
        found = [sum(a["macs"] for n, a in layers(g).items() if part in n) for g in (graph, real)]
        assert found[0] == found[1] > 0
    experts = [(n.partition(".experts.")[0], a["macs"]) for n, a in layers(graph).items() if ".experts." in n]
    assert len(experts) == 12 and len(set(experts)) == 2  # one number in each of two blocks


def traced(pipe: Any) -> Any:
    from aquabit.pipelines import trace as trace_pipeline

    return trace_pipeline(pipe)


def test_a_model_that_nothing_makes_run_says_why() -> None:
    net = meta_denoiser("Lumina2Transformer2DModel", MODELS["Lumina 2"][1] | {"num_layers": 1})
    inputs = example_inputs(net) | {"encoder_hidden_states": torch.empty(1, 7, 8, device="meta")}
    with pytest.raises(AquabitError, match="Lumina2Transformer2DModel does not run on the example inputs"):
        trace(net, inputs)


@pytest.mark.parametrize(
    ("name", "count", "weights", "macs", "most"),
    [("Lumina 2", 244, 2.609, 9.495, 2.0), ("Wan 2.1 1.3B", 306, 1.418, 41.05, 8.0)],
)
def test_published_sizes(name: str, count: int, weights: float, macs: float, most: float) -> None:
    """Layers, billions of weights, 10^12 multiply-adds of a call; no attention scores in the estimate of
    memory (Wan's would take 200 GB); every operator type known."""
    net = meta_denoiser(*MODELS[name][:2])
    graph = trace(net)
    nodes = layers(graph)
    total = (sum(a["macs"] for a in nodes.values()) + dense_macs(graph)) / 1e12
    assert len(nodes) == count and "other" not in {a["operator"] for a in nodes.values()}
    assert graph.graph["weights"] / 1e9 == pytest.approx(weights, rel=1e-3)
    assert total == pytest.approx(macs, rel=1e-2)
    assert 0.1e9 < activation_bytes(graph) < most * 1e9
    taken = {p.task: p.total for p in peaks(graph, 1) if p.dtype == "bfloat16"}
    assert taken["run packed"] < taken["measure"] < 13e9 and taken["quantize"] < 4e9
    assert on_meta(example_inputs(net), lambda inputs: len(inputs)) == len(example_inputs(net))
