"""What benchmarks/rivals.py does: other tools' scores over our codes, their searches under exact bytes,
and the table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.model import open_model
from aquabit.pipelines import load, trace
from aquabit.quant.bank import Bank
from aquabit.scheme import FP, AquabitError, Protocol, QuantConfig, Scheme
from aquabit.space import SearchSpace, make_space
from benchmarks import peers, rivals, rivals_modelopt, rivals_scores, rivals_searches
from benchmarks.rivals_searches import bytes_of, cap, prices

SCHEMES = ["usq2", "usq3", "usq4", "usq8", "aq1x8g8s"]
SHAPES = [(48, 64), (48, 64), (48, 64), (16, 24), (40, 80), (8, 96)]  # the first three may share codebooks


def toy(seed: int = 0, count: int = 6) -> tuple[nx.DiGraph, SearchSpace, CostModel, np.ndarray]:
    """A graph, its space and costs, and scores [L, schemes] that mostly fall with bits."""
    graph = nx.DiGraph(other_elements=11)
    for i, shape in enumerate(SHAPES[:count]):
        graph.add_node(
            f"l{i}",
            kind="layer",
            depth=i,
            operator="ff.up" if i < 3 else "self_attn.q",
            block="b",
            shape=shape,
            macs=1,
        )
    space = make_space(graph, "print", "toy", schemes=SCHEMES, activations=[8])
    rng = np.random.default_rng(seed)
    bits = np.array([[s.bits if s.kind != "aq" else 1 for s in space.schemes]] * count)
    table = rng.lognormal(0, 1, (count, 1)) * rng.lognormal(0, 0.5, bits.shape) * 4.0**-bits
    return graph, space, CostModel(graph, space), np.where(space.allowed(), table, np.inf)


def every(space: SearchSpace) -> np.ndarray:
    """All scheme indices [n, L] of a small space."""
    return np.array(list(itertools.product(*(np.flatnonzero(row) for row in space.allowed()))))


# ---- searches


def test_prices_add_up_to_the_true_bytes_where_all_share() -> None:
    _, space, costs, _ = toy()
    column = space.schemes.index(Scheme.parse("aq1x8g8s"))
    all_share = np.where(space.allowed()[:, column], column, space.schemes.index(Scheme.parse("usq2")))
    assert space.allowed()[:, column].sum() == 3
    assert prices(costs)[np.arange(6), all_share].sum() == pytest.approx(bytes_of(costs, all_share[None])[0])
    one = np.where(np.arange(6) == 0, column, space.schemes.index(Scheme.parse("usq2")))
    assert (
        bytes_of(costs, one[None])[0] > prices(costs)[np.arange(6), one].sum()
    )  # alone it pays for the codebooks
    config = Choices.at(space, one[None], 8).config
    assert bytes_of(costs, one[None])[0] == costs(config).bytes - costs.other_bytes


@pytest.mark.parametrize("per_byte", [False, True])
@pytest.mark.parametrize("bits", [2.6, 3.5, 5.0])
def test_the_greedy_list_is_cut_where_the_bytes_are_met(per_byte: bool, bits: float) -> None:
    _, space, costs, table = toy()
    found = rivals_searches.lowered(table, costs, bits, per_byte)
    assert bytes_of(costs, found[None])[0] <= cap(costs, bits)
    top, price = rivals_searches.highest(space, costs), prices(costs)
    entries = [(i, c) for i, c in np.argwhere(np.isfinite(table)) if price[i, c] < price[i, top[i]]]
    key = {e: table[e] / (price[e[0], top[e[0]]] - price[e] if per_byte else 1) for e in entries}
    choice, before = top.copy(), top.copy()
    for i, c in sorted(entries, key=lambda e: key[e]):
        if price[i, c] < price[i, choice[i]]:
            before, choice = choice.copy(), choice.copy()
            choice[i] = c
        if bytes_of(costs, choice[None])[0] <= cap(costs, bits):
            break
    assert found.tolist() == choice.tolist()
    assert bytes_of(costs, before[None])[0] > cap(costs, bits)  # one entry fewer is too large


def test_greedy_orders_by_damage_or_by_damage_per_byte() -> None:
    _, _, costs, table = toy()
    kinds = {
        tuple(rivals_searches.lowered(table, costs, b, p)) for b in (3.0, 4.0, 5.0) for p in (False, True)
    }
    assert len(kinds) > 3


@pytest.mark.parametrize("bits", [2.6, 3.5, 5.0, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_least_that_meets_the_bytes(bits: float, seed: int) -> None:
    _, _, costs, error = toy(seed)
    found = rivals_searches.thresholded(error, costs, bits)

    def at(t: float) -> list[int]:
        price = prices(costs)
        return [
            min(
                (c for c in range(len(row)) if row[c] <= t),
                key=lambda c: price[i, c],
                default=int(np.argmax(np.where(np.isfinite(row), costs.bytes[i], -1))),
            )
            for i, row in enumerate(error)
        ]

    within = [
        t
        for t in sorted(error[np.isfinite(error)])
        if bytes_of(costs, np.array([at(t)]))[0] <= cap(costs, bits)
    ]
    assert found.tolist() == at(within[0])


def test_a_budget_below_everything_is_refused() -> None:
    _, _, costs, table = toy()
    with pytest.raises(AquabitError, match=r"0\.5 bits are fewer"):
        rivals_searches.thresholded(table, costs, 0.5)
    with pytest.raises(AquabitError, match=r"0\.5 bits are fewer"):
        rivals_searches.lowered(table, costs, 0.5, per_byte=True)


@pytest.mark.parametrize("bits", [3.0, 4.5])
def test_raising_ends_where_no_better_larger_scheme_fits(bits: float) -> None:
    _, _, costs, table = toy()
    table = np.where(
        np.isfinite(table), np.random.default_rng(1).random(table.shape), np.inf
    )  # larger is not always better
    price, rows = prices(costs), np.arange(6)
    start = price.argmin(1)
    start = np.where(np.isfinite(table[rows, start]), start, 1)
    found = rivals_searches.raised(start, table, costs, bits)
    assert bytes_of(costs, found[None])[0] <= cap(costs, bits)
    assert (price[rows, found] >= price[rows, start]).all() and found.tolist() != start.tolist()
    assert (table[rows, found] <= table[rows, start]).all()
    for layer, column in np.argwhere(np.isfinite(table)):
        other = found.copy()
        other[layer] = column
        larger = (
            price[layer, column] > price[layer, found[layer]]
            and table[layer, column] < table[layer, found[layer]]
        )
        assert not larger or bytes_of(costs, other[None])[0] > cap(costs, bits)


@pytest.mark.parametrize(("share", "ratio", "total"), [(0.5, 0.46, 3.0), (2.0, 1.36, 2.0), (1.0, 1.0, 1.6)])
def test_mean_bits_of_both_groups_have_the_ratio_and_the_total(
    share: float, ratio: float, total: float
) -> None:
    quality, content = rivals_searches.mean_bits(share, ratio, total)
    assert content / quality == pytest.approx(ratio)
    assert (quality + share * content) / (1 + share) == pytest.approx(total)


def test_split_programs_are_within_the_budget_and_best_in_each_group() -> None:
    graph, space, costs, table = toy()
    content = np.arange(6) < 3
    found = rivals_searches.split_programs(table, content, graph, space, 4.0)
    sizes = bytes_of(costs, np.array(found))
    assert 1 < len(found) <= 100 and (sizes <= cap(costs, 4.0)).all()
    choices = every(space)
    for w in found[:5]:  # nothing of no more bytes in the group is better by more than the gap
        for mask in (content, ~content):
            others = choices[(choices[:, ~mask] == w[~mask]).all(1)]
            fits = others[bytes_of(costs, others) <= bytes_of(costs, w[None])[0]]
            rows = np.flatnonzero(mask)
            best = min(table[rows, o[rows]].sum() for o in fits)
            span = np.where(np.isfinite(table), table, 0).max()
            assert table[rows, w[rows]].sum() <= best + 2e-3 * max(span, table[rows, w[rows]].sum())


# ---- ModelOpt's solver


def given(space: SearchSpace, costs: CostModel, table: np.ndarray, limit: float) -> dict[str, Any]:
    layers = {}
    for i, (k, row) in enumerate(space.choices.items()):
        columns = [space.schemes.index(s) for s in row]
        layers[k] = {
            "schemes": [str(s) for s in row],
            "scores": table[i, columns].tolist(),
            "bytes": costs.bytes[i, columns].tolist(),
        }
    shared = [
        {
            "scheme": str(space.schemes[t.column]),
            "layers": [space.layers[i] for i in t.layers],
            "bytes": t.bytes,
        }
        for t in costs.shared
    ]
    return {"layers": layers, "shared": shared, "limits": {"b": limit}}


def enumerate_best(table: Mapping[str, Mapping[str, Any]], limit: float) -> dict[str, int]:
    """As a solver that knows no shared codebooks: least score with summed costs at most the limit."""
    names = list(table)
    best, found = np.inf, tuple(0 for _ in names)
    for places in itertools.product(*(range(len(table[k]["costs"])) for k in names)):
        if sum(table[k]["costs"][p] for k, p in zip(names, places, strict=True)) <= limit:
            score = sum(table[k]["scores"][p] for k, p in zip(names, places, strict=True))
            if score < best:
                best, found = score, places
    return dict(zip(names, found, strict=True))


def test_candidates_do_not_rise_with_size_on_either_side() -> None:
    _, space, costs, table = toy(3)
    ours = rivals_searches.falling(table, costs)
    theirs = rivals_modelopt.candidates(
        **{k: v for k, v in given(space, costs, table, 0).items() if k != "limits"}
    )
    for i, (k, row) in enumerate(space.choices.items()):
        assert theirs[k]["costs"] == sorted(theirs[k]["costs"])
        assert theirs[k]["scores"] == sorted(theirs[k]["scores"], reverse=True)
        for s in row:
            assert ours[i, space.schemes.index(s)] == theirs[k]["scores"][theirs[k]["formats"].index(str(s))]
    assert (ours[np.isfinite(table)] < table[np.isfinite(table)]).any()


@pytest.mark.parametrize("seed", range(4))
def test_the_true_bytes_of_its_answer_are_within_the_limit(seed: int) -> None:
    _, space, costs, table = toy(seed)
    low, high = costs.limits(8)["bytes"]
    for limit in np.linspace(low + 100, 0.5 * (low + high), 8) - costs.other_bytes:
        asked = given(space, costs, table, float(limit))
        found = rivals_modelopt.within(asked, float(limit), enumerate_best)
        assert found is not None
        weights = np.array([space.schemes.index(Scheme.parse(found[k])) for k in space.layers])
        assert (
            rivals_modelopt.true_bytes(found, asked["layers"], asked["shared"])
            == bytes_of(costs, weights[None])[0]
            <= limit
        )


def test_codebooks_that_one_layer_alone_uses_cost_more_than_its_part() -> None:
    row = {"schemes": ["shared", "own"], "scores": [1.0, 0.0], "bytes": [10, 30]}
    asked: dict[str, Any] = {
        "layers": {"a": row, "b": {**row, "scores": [5.0, 0.0]}},
        "shared": [{"scheme": "shared", "layers": ["a", "b"], "bytes": 20}],
    }
    assert enumerate_best(rivals_modelopt.candidates(**asked), 50) == {
        "a": 0,
        "b": 1,
    }  # 20 + 30, in truth 10 + 20 + 30
    assert rivals_modelopt.within(asked, 50, enumerate_best) == {"a": "shared", "b": "shared"}
    assert rivals_modelopt.within(asked, 60, enumerate_best) == {"a": "own", "b": "own"}


def test_a_limit_that_nothing_meets_has_no_answer() -> None:
    _, space, costs, table = toy()
    assert rivals_modelopt.within(given(space, costs, table, 10.0), 10.0, enumerate_best) is None


# ---- scores


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> rivals_scores.Layers:
    """The bundled U-Net with two plain schemes."""
    opened = open_model("digits-unet")
    space = make_space(
        trace(load("digits-unet")),
        opened.fingerprint,
        "digits-unet",
        schemes=["fp", "usq2", "usq8"],
        activations=[8],
    )
    evaluator = Evaluator(
        "digits-unet", opened.graph, Bank(tmp_path_factory.mktemp("bank")), opened.fingerprint
    )
    session = SimpleNamespace(here=evaluator, space=space, protocol=Protocol(steps=3))
    return rivals_scores.Layers(session, images=4)


CONDITION, FIRST, LINEAR = "time_embedding.linear_1", "conv_in", "mid_block.attentions.0.to_q"


def test_a_swapped_weight_is_put_back(layers: rivals_scores.Layers) -> None:
    before = layers.modules[FIRST].weight

    def fail() -> None:
        with layers.swapped(FIRST, torch.zeros_like(before)):
            assert layers.modules[FIRST].weight.abs().sum() == 0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert layers.modules[FIRST].weight is before


def test_scores_of_one_layer_fall_with_bits(layers: rivals_scores.Layers) -> None:
    layers.at(layers.space.full_precision())
    full, replay = layers.images(), layers.replay()
    similar, noise = (
        rivals_scores.ssim_losses(layers, full, FIRST),
        rivals_scores.sqnr_losses(layers, replay, FIRST),
    )
    errors = rivals_scores.weight_errors(layers, FIRST)
    for found in (similar, noise, errors):
        assert found["fp"] < found["usq8"] < found["usq2"]
    assert similar["fp"] == pytest.approx(0, abs=1e-9) and errors["fp"] == 0 and noise["fp"] < -60
    weight, coded = layers.weight(FIRST, FP), layers.weight(FIRST, Scheme.parse("usq2"))
    assert errors["usq2"] == pytest.approx(float((weight - coded).square().mean() / weight.var()), rel=1e-4)


def test_sqnr_is_of_the_denoisers_output(layers: rivals_scores.Layers) -> None:
    replay = layers.replay()
    steps = sorted({s for _, _, s in replay.places})
    ratio = []
    with torch.no_grad(), layers.swapped(FIRST, layers.weight(FIRST, Scheme.parse("usq2"))):
        for step in steps:
            output, target = layers.run(replay, [i for i, p in enumerate(replay.places) if p[2] == step])
            ratio.append(
                10
                * float(
                    torch.log10(target.double().square().sum() / (output - target).double().square().sum())
                )
            )
    assert rivals_scores.sqnr_losses(layers, replay, FIRST)["usq2"] == pytest.approx(
        -np.mean(ratio), abs=1e-3
    )


def test_feature_distance_sees_every_layer_behind_the_changed_one(layers: rivals_scores.Layers) -> None:
    measured = rivals_scores.FeatureDistance(layers)
    assert measured() == pytest.approx(0, abs=1e-9)
    base = 1e-5
    found = rivals_scores.feature_losses(layers, measured, {LINEAR: Scheme.parse("usq8")}, base, LINEAR)
    assert found["usq8"] == base and found["usq2"] > base + rivals_scores.MCT_EPS
    assert found["fp"] == base + rivals_scores.MCT_EPS
    with layers.swapped("conv_out", torch.zeros_like(layers.modules["conv_out"].weight)):
        last = measured()
    assert last == pytest.approx(
        1, abs=0.2
    )  # the last layer's own point: an output without its weight is off by its mean square


def test_distances_are_mcts_per_sample() -> None:
    a, b = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    wanted = [float(((x - y) ** 2).mean() / ((x**2).mean() + 1e-8)) for x, y in zip(a, b, strict=True)]
    assert rivals_scores.distance(a, b).tolist() == pytest.approx(wanted, rel=1e-5)
    u, v = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    cosine = [float((x * y).sum() / (x.norm() * y.norm())) for x, y in zip(u, v, strict=True)]
    assert rivals_scores.distance(u, v).tolist() == pytest.approx([(1 - c) / 2 for c in cosine], rel=1e-5)


def test_gradient_scores_are_squared_gradient_times_change(layers: rivals_scores.Layers) -> None:
    generator = torch.Generator().manual_seed(0)
    calls = {
        "x": torch.randn(4, 1, 8, 8, generator=generator),
        "t": torch.tensor([10, 300, 500, 900]),
        "y": torch.tensor([0, 3, 5, 9]),
        "target": torch.randn(4, 1, 8, 8, generator=generator),
    }
    found = rivals_scores.gradient_scores(layers, calls, 2, lambda *_: None)
    wanted = dict.fromkeys((CONDITION, FIRST, LINEAR), 0.0)
    scheme = Scheme.parse("usq2")
    for start in (0, 2):
        part = {k: v[start : start + 2] for k, v in calls.items()}
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        leaves = {k: layers.modules[k].weight.clone().requires_grad_() for k in wanted}
        handles = []
        for k in wanted:
            layers.modules[k].weight = leaves[k]

            def keep(module: Any, args: Any, output: torch.Tensor, k: str = k, seen: Any = seen) -> None:
                output.retain_grad()
                seen[k] = args[0].detach(), output

            handles.append(layers.modules[k].register_forward_hook(keep))
        output = layers.evaluator.adapter.network(
            part["x"], timestep=part["t"], class_labels=part["y"]
        ).sample
        ((output - part["target"]) ** 2).mean().backward()
        for handle in handles:
            handle.remove()
        for k, (x, y) in seen.items():
            layers.modules[k].weight = layers.evaluator.quantized.full(k)
            config = QuantConfig(
                layers.space.fingerprint,
                {k: layers.space.choice(k, scheme, 8)},
                calibration=layers.space.calibration,
            )
            layers.at(config)
            layers.modules[
                k
            ].act_output = 16  # ours rounds what attention multiplies, ModelOpt's formats only inputs
            with torch.no_grad():
                change = layers.modules[k].forward(x) - y
            assert y.grad is not None
            wanted[k] += float((y.grad * change).square().sum())
            layers.at(layers.space.full_precision())
    for k, value in wanted.items():
        assert found[k]["usq2"] == pytest.approx(value, rel=1e-3), k
        assert found[k]["fp"] == 0 < found[k]["usq8"] < found[k]["usq2"]
    assert all(not layer._forward_hooks for layer in layers.modules.values())


def test_tables_on_disk_are_continued(tmp_path: Path) -> None:
    asked: list[str] = []

    def score(layer: str) -> dict[str, float]:
        asked.append(layer)
        if layer == "l2" and len(asked) == 3:
            raise KeyboardInterrupt
        return {"usq2": float(layer[1])}

    path = tmp_path / "scores.json"
    with pytest.raises(KeyboardInterrupt):
        rivals_scores.kept(path, ["l0", "l1", "l2"], score, lambda *_: None)
    found = rivals_scores.kept(path, ["l0", "l1", "l2"], score, lambda *_: None)
    assert asked == ["l0", "l1", "l2", "l2"] and found["l2"] == {"usq2": 2.0}
    _, space, _, _ = toy()
    table = rivals_scores.table(space, found)
    assert (
        table[2, space.schemes.index(Scheme.parse("usq2"))] == 2
        and np.isinf(table[3]).all()
        and np.isinf(table[:, 0]).all()
    )


# ---- choosing and the table


class FakeRivals:
    """Chooses uniform usq2 or usq4; none at the first target."""

    def __init__(self, folder: Path, over: bool = False):
        _, self.space, self.costs, _ = toy()
        self.folder, self.model, self.over, self.asked = folder, "toy", over, 0

    def of(self, name: str, bits: float) -> QuantConfig | None:
        self.asked += 1
        return (
            None if bits < 3.5 and not self.over else self.space.uniform("usq4" if self.over else "usq2", 8)
        )

    fits = rivals.Rivals.fits

    def predicted(self, config: QuantConfig) -> float:
        return 0.5


def test_choices_are_made_once_and_keep_their_budgets(tmp_path: Path) -> None:
    fake: Any = FakeRivals(tmp_path)
    rivals.choose(fake, ["program", "mct"])
    rivals.choose(fake, ["program", "mct"])
    assert fake.asked == 2 * len(rivals.TARGETS)
    found = rivals.entries(tmp_path, "toy")
    assert [(r["side"], r["target"]) for r in found] == [("program", 3.5), ("mct", 3.5)]
    assert found[0]["bits"] <= 3.5 and found[0]["damage"] == 0.5
    winner = {"target": 3.5, "config": found[0]["config"]}
    (tmp_path / "ours-toy.json").write_text(
        json.dumps({"0": [winner, {**winner, "target": 9.0}], "1": [winner]})
    )
    assert [(r["side"], r["seed"]) for r in rivals.entries(tmp_path, "toy")[:2]] == [
        ("ours", "0"),
        ("ours", "1"),
    ]
    with pytest.raises(AssertionError, match="are the limit"):
        rivals.choose(FakeRivals(tmp_path / "..", over=True), ["sdnq"])  # type: ignore[arg-type]


def test_scores_of_another_space_are_not_continued(tmp_path: Path) -> None:
    graph, space, _, _ = toy()
    rivals.check_space(tmp_path / "space-toy.json", space)
    rivals.check_space(tmp_path / "space-toy.json", space)
    with pytest.raises(AquabitError, match="another search space"):
        rivals.check_space(
            tmp_path / "space-toy.json", make_space(graph, "print", "toy", schemes=["usq2"], activations=[8])
        )


def test_fresh_measures_everything_and_the_table_reads_it_by_block(tmp_path: Path) -> None:
    fake: Any = FakeRivals(tmp_path)
    rivals.choose(fake, ["program"])
    winners = [{"target": 3.5, "config": fake.space.uniform(s, 8).to_dict()} for s in ("usq2", "usq3")]
    (tmp_path / "ours-toy.json").write_text(json.dumps({"0": winners[:1], "1": winners[1:]}))
    asked: list[tuple[str, str]] = []

    def measure(configs: Any, kind: str, progress: Any, protocols: Any, what: str) -> None:
        asked.extend((c.digest, p.digest) for c in configs for p in protocols)

    def measurements(failed: bool) -> pd.DataFrame:
        rows = [
            {"config": c, "protocol": p, "psnr": 30.0 + n, "fid": 5.0 + n / 100}
            for n, (c, p) in enumerate(asked)
        ]
        return pd.DataFrame(rows, columns=["config", "protocol", "psnr", "fid"])

    session = SimpleNamespace(
        space=fake.space,
        costs=fake.costs,
        protocol=Protocol(),
        measure=measure,
        study=SimpleNamespace(measurements=measurements),
    )
    with pytest.raises(AquabitError, match=r"5 blocks of toy are not measured.*rivals\.py fresh"):
        rivals.measured(session, tmp_path, "toy")
    rivals.fresh(session, tmp_path, "toy")
    assert len(asked) == len(set(asked)) == 3 * len(rivals.BLOCKS)  # full precision, usq2 (twice), usq3
    full, ours, program = rivals.measured(session, tmp_path, "toy")
    assert full["fid"] == pytest.approx([5.0 + n / 100 for n in range(5)])
    assert (ours["side"], ours["seeds"], program["side"], program["seeds"]) == ("ours", 2, "program", 1)
    assert program["psnr"] == pytest.approx([35.0 + n for n in range(5)])
    assert ours["psnr"] == pytest.approx([(35.0 + n + 40.0 + n) / 2 for n in range(5)])


def rows(*sides: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"model": "m", "side": "full precision", "target": None, "bits": 16.0, "seeds": 1, "fid": [5.0] * 5}
    ]
    for n, side in enumerate(sides):
        found.append(
            {
                "model": "m",
                "side": side,
                "target": 2.0,
                "bits": 2.0,
                "seeds": 1,
                "damage": 0.1,
                "psnr": [40.0 - n + 0.1 * b for b in range(5)],
                "fid": [5.0 + n] * 5,
            }
        )
    return found


@pytest.mark.parametrize(
    ("sides", "against"), [(("ours", "program", "mct"), "ours"), (("program", "mct"), "program")]
)
def test_differences_are_to_ours_or_else_to_the_program(sides: tuple[str, ...], against: str) -> None:
    found = rivals.compared(rows(*sides))
    last = found[-1]
    gap = -(len(sides) - 1.0)
    assert last["against"] == against and last["less"]["psnr"]["value"] == pytest.approx(gap)
    assert last["less"]["psnr"]["high"] == pytest.approx(gap) and last["less"]["fid"][
        "value"
    ] == pytest.approx(-gap)
    assert "less" not in found[0] and "less" not in found[1]
    text = rivals.markdown({"machine": {"cpu": "c", "cores": 1, "torch": "t"}, "command": "m", "rows": found})
    assert (
        f"less {against}" in text
        and f"| 2 | mct | 2.000 | {40 + gap + 0.2:.2f} | {5 - gap:.2f} | {gap:+.2f} " in text
    )
    assert "`mct`" in text and "`sdnq`" not in text


def test_every_rival_is_described_and_can_be_asked() -> None:
    assert set(rivals.LOSSES) < set(rivals.RIVALS)
    assert set(rivals.LOSSES.values()) <= set(peers.LOSSES)


def test_nothing_chosen_yet_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match=r"rivals\.py choose"):
        rivals.entries(tmp_path, "toy")
