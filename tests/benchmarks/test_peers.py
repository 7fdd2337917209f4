"""What benchmarks/peers.py does around the peer: the exact optimum of its scores, its bits as a
configuration, our choice at its size."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from aquabit.cost import CostModel
from aquabit.scheme import FP, AquabitError, LayerChoice, Scheme
from aquabit.space import make_space
from benchmarks import peers

SCHEMES = ["fp", "usq2", "usq3", "usq4", "usq8", "usq2h", "usq3h", "usq4h"]


def toy(count: int = 6) -> tuple[nx.DiGraph, Any, dict[tuple[str, str], float]]:
    """A graph of layers of different sizes, its space, and damages that fall with bits."""
    rng, graph = np.random.default_rng(0), nx.DiGraph(other_elements=11)
    for i in range(count):
        shape = (int(rng.integers(8, 40)), int(rng.integers(16, 60)))
        graph.add_node(
            f"l{i}", kind="layer", depth=i, operator="o", block="b", shape=shape, macs=int(np.prod(shape))
        )
    space = make_space(graph, "print", "toy", schemes=SCHEMES, activations=[8])
    errors = {
        (k, s): float(rng.lognormal(0, 1) * 4.0 ** -Scheme.parse(s).bits)
        for k in space.layers
        for s in SCHEMES[1:]
    }
    return graph, space, errors


def table(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Scores and costs as the peer writes them, of four layers."""
    rng, found = np.random.default_rng(seed), {}
    for i in range(4):
        size = int(rng.integers(5, 50))
        scores = sorted(rng.lognormal(0, 2, 3) * scale, reverse=True)
        found[f"l{i}"] = {
            "bits": [2, 4, 16],
            "scores": [*scores[:2], 0.0],
            "costs": [size * b / 16 for b in (2, 4, 16)],
        }
    return found


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("seed", range(4))
def test_the_exact_optimum_is_that_of_enumeration_at_any_scale(seed: int, scale: float) -> None:
    rows = list(table(seed, scale).values())
    scores, costs = [r["scores"] for r in rows], [r["costs"] for r in rows]
    limit = sum(c[2] for c in costs) * 5 / 16
    within = [
        p
        for p in itertools.product(range(3), repeat=4)
        if sum(c[i] for c, i in zip(costs, p, strict=True)) <= limit
    ]
    best = min(within, key=lambda p: sum(s[i] for s, i in zip(scores, p, strict=True)))
    assert peers.exact(scores, costs, limit) == list(best)


def test_a_solution_is_held_against_the_optimum_of_its_own_scores() -> None:
    layers = {
        k: {"bits": [2, 4, 16], "scores": s, "costs": [1.0, 2.0, 8.0]}
        for k, s in (("a", [8.0, 2.0, 0.0]), ("b", [3.0, 1.0, 0.0]))
    }
    worse, best = {"a": 2, "b": 4}, {"a": 4, "b": 2}
    found = {"layers": layers, "chosen": {"3.0": worse}, "chosen_scaled": {"3.0": best}, "seconds": 1.0}
    row = peers.solver_row(found, 3.0)
    assert (row["score"], row["over_exact"], row["over_exact_scaled"], row["spent"]) == (9.0, 9 / 5, 1.0, 1.0)
    nothing = {k: r | {"scores": [0.0, 0.0, 0.0]} for k, r in layers.items()}
    assert peers.solver_row(found | {"layers": nothing}, 3.0)["over_exact"] is None


def test_bits_come_over_as_schemes_and_what_is_not_quantized_keeps_its_activations() -> None:
    _, space, _ = toy(3)
    config = peers.brought_over({"l0": 3, "l1": 16, "l2": 8}, space, "usqh")
    assert config["l0"] == LayerChoice(Scheme.parse("usq3h"), 8)
    assert (config["l1"], config["l2"].weight) == (LayerChoice(), Scheme.parse("usq8"))
    assert peers.brought_over({"l0": 3, "l1": 16, "l2": 8}, space, "usq")["l0"].weight == Scheme.parse("usq3")
    with pytest.raises(AquabitError, match="'l3' is known to only one"):
        peers.brought_over({"l0": 3, "l1": 16, "l2": 8, "l3": 2}, space, "usq")


@pytest.mark.parametrize("family", peers.CASES)
def test_our_choice_takes_the_same_schemes_within_the_same_bytes(family: str) -> None:
    graph, space, errors = toy()
    costs = CostModel(graph, space)
    theirs = peers.brought_over({k: (4, 2, 3)[i % 3] for i, k in enumerate(space.layers)}, space, family)
    ours = peers.own_choice(graph, space, errors, family, costs(theirs).bytes)

    def damage(config: Any) -> float:
        return sum(errors[k, str(c.weight)] for k, c in config.layers.items())

    assert costs(ours).bytes <= costs(theirs).bytes and damage(ours) < damage(theirs)
    assert {c.weight for c in ours.layers.values()} <= {
        peers.scheme_of(b, family) for b in peers.BITS
    }  # full precision is not listed
    assert all(ours[k].act == (16 if ours[k].weight == FP else 8) for k in space.layers)


def test_a_surrogate_chooses_within_the_bytes(tmp_path: Path) -> None:
    from benchmarks.flow import synthetic_study

    study, space, costs, put = synthetic_study(tmp_path / "made.db")
    with study.writing():
        put(space.sample(30), "sample")
    limit = costs(space.uniform("usq3h")).bytes
    found = peers.surrogate_choice(tmp_path / "made.db", "usqh", limit, contexts=1, rows=1000)
    schemes = {str(found[k].weight) for k in space.layers}
    assert (
        0.98 * limit < costs(found).bytes <= limit
        and len(schemes) > 2
        and schemes <= {"usq2h", "usq3h", "usq4h", "usq8"}
    )


def test_without_its_environment_one_sentence_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match=r"peers.py install --folder"):
        peers.peer_python(tmp_path)
    (tmp_path / "modelopt").mkdir()
    (tmp_path / "modelopt" / "installed").write_text("nvidia-modelopt==0.1\n")
    with pytest.raises(AquabitError, match=r"nvidia-modelopt==0\.47"):
        peers.peer_python(tmp_path)
    with pytest.raises(AquabitError, match="was not asked yet"):
        peers.chosen(tmp_path, "digits-dit", "denoising")


def test_tables_show_every_choice_and_every_measurement() -> None:
    choice = {
        "model": "m",
        "loss": "own output",
        "effective_bits": 3.0,
        "counts": {"2": 4},
        "spent": 0.9,
        "largest_score": 1e-9,
        "over_exact": None,
        "over_exact_scaled": 1.25,
    }
    spread = {"value": -1.0, "low": -2.0, "high": -0.5}
    side = {
        "model": "m",
        "family": "usq",
        "effective_bits": 3.0,
        "bytes": 1000,
        "bits": 3.1,
        "psnr": [20.0, 22.0],
        "fid_interval": {"value": 4.0},
    }
    rows = [
        side | {"side": "ModelOpt"},
        side | {"side": "uniform", "bytes": 1024, "theirs_less_this": {"fid": spread, "psnr": spread}},
    ]
    text = peers.markdown(
        {
            "machine": {"cpu": "c", "cores": 2, "torch": "2"},
            "command": "x",
            "versions": {"p": "1"},
            "choices": [choice],
            "measured": {"m": rows},
        }
    )
    assert "| m | own output | 3.0 | 2: 4 | 0.9000 | 1.0e-09 | no score | 1.2500 |" in text
    assert "| uniform | 1,024 (+24) | 3.10 | 4.00 | 21.0 | -1.00 (-2.00 to -0.50) |" in text
