"""Activation bits of step groups: values, costs, the switch while sampling, artifacts, and the space that
a search chooses from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aquabit import packing
from aquabit.activation_bits import plain_act
from aquabit.choices import Choices
from aquabit.cost import CostModel, Latency
from aquabit.graph import layers as graph_layers
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.session import open_session
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.pipelines import Adapter, load, set_scheduler, trace
from aquabit.quant import attention
from aquabit.quant.bank import Bank
from aquabit.quant.correction.sampling import following
from aquabit.quant.kernel_tuning import layers_of, place_, requests_of
from aquabit.quant.model import fingerprint
from aquabit.scheme import (
    ROUNDINGS,
    AquabitError,
    Budget,
    Calibration,
    LayerChoice,
    Protocol,
    QuantConfig,
    Rounding,
    Scheme,
    StepGroups,
    act_bits,
    act_code,
    act_of,
    act_parts,
    act_text,
)
from aquabit.search.integer_program import choice_effects, solve
from aquabit.search.local_search import improve
from aquabit.search.options import Options, activation_choices
from aquabit.sensitivity.effects.predicted import member_parts
from aquabit.sensitivity.features import SKETCH, Encoder
from aquabit.space import SearchSpace, make_space, read_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.command_line import fails, run
from tests.conftest import tiny_pipeline
from tests.tiny_pipelines import PROMPTS, tiny
from tests.worlds import every, middle, model, total

USQ4 = Scheme.parse("usq4")
GROUPS = StepGroups(10, (0, 3, 7))
PROTOCOL = Protocol(images=4, steps=4, micro_batch=4)
HALVES = StepGroups(4, (0, 2))
ACTS = st.integers(2, 5).flatmap(lambda n: st.tuples(*[st.sampled_from(ROUNDINGS)] * n)) | st.sampled_from(
    ROUNDINGS
)


# ---- values


@given(ACTS)
def test_codes_round_trip_and_collide_with_no_width(act) -> None:
    code = act_code(act)
    assert act_of(code) == plain_act(act)
    assert (code in ROUNDINGS) == isinstance(plain_act(act), int)
    text = "/".join(map(str, act_parts(plain_act(act))))
    assert act_text(plain_act(act)) == (text if text[0] in "if" else f"a{text}")


@given(st.lists(ACTS.filter(lambda a: not isinstance(a, tuple) or len(a) == 3), min_size=1, max_size=6))
def test_configurations_with_groups_in_json_and_back(acts) -> None:
    config = QuantConfig("f", {f"l{i}": LayerChoice(USQ4, a) for i, a in enumerate(acts)}, steps=GROUPS)
    again = QuantConfig.from_dict(json.loads(config.to_json()))
    assert again == config and again.digest == config.digest
    even = QuantConfig(
        "f",
        {
            k: replace(v, act=v.act if isinstance(v.act, tuple) else (v.act,) * 3)
            for k, v in config.layers.items()
        },
        steps=GROUPS,
    )
    assert even == config, "groups of equal bits are one number"
    for k, c in config.layers.items():
        row = [c.act[GROUPS.of(s)] if isinstance(c.act, tuple) else c.act for s in range(10)]
        assert config.mean_act(k) == pytest.approx(sum(map(act_bits, row)) / 10)
        assert sum(config.share(k, b) for b in set(row)) == pytest.approx(1)


def test_digests_of_before_step_groups_stay() -> None:
    config = QuantConfig(
        "f", {"a": LayerChoice(Scheme.parse("usq4h"), 8), "b": LayerChoice(Scheme.parse("usq2"), 6)}
    )
    assert config.digest == "4674d44045a5fb38" == replace(config, steps=GROUPS).digest


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AquabitError, match="for 3 groups"):
        QuantConfig("f", {"a": LayerChoice(USQ4, (8, 6))}, steps=GROUPS)
    with pytest.raises(AquabitError, match="for 1 groups"):
        QuantConfig("f", {"a": LayerChoice(USQ4, (8, 6))})
    with pytest.raises(AquabitError, match=r"layers\.a\.act"):
        QuantConfig.from_dict(
            {**QuantConfig("f", {}).to_dict(), "layers": {"a": {"weight": "usq4", "act": [8, 7]}}}
        )


# ---- costs


def test_bops_are_averaged_over_steps() -> None:
    graph = trace(tiny_pipeline("unet"))
    space = make_space(
        graph,
        "f",
        schemes=["usq2", "usq4"],
        activations=[16, 8, 6],
        step_groups={"total": 10, "starts": [0, 3, 7]},
    )
    costs, names = CostModel(graph, space), space.layers
    acts = {names[0]: (6, 8, 8), names[1]: (16, 8, 8), names[2]: 6}
    config = space.config({n: LayerChoice(USQ4, acts.get(n, 8)) for n in names})
    by_hand = 0.0
    for n, node in graph_layers(graph).items():
        for step in range(10):
            bits = (
                config[n].act
                if isinstance(config[n].act, int)
                else config[n].act[0 if step < 3 else 1 if step < 7 else 2]
            )
            by_hand += node["macs"] * 4 * (32 if bits == 16 else bits) / 10
    assert costs(config).bops == pytest.approx(by_hand, rel=1e-12)
    assert costs.totals(Choices.of(space, [config]))["bops"][0] == pytest.approx(by_hand, rel=1e-12)
    same = space.uniform("usq4", (8, 8, 8))
    assert costs(same) == costs(space.uniform("usq4", 8))
    with pytest.raises(AquabitError, match="other groups of steps"):
        Choices.of(
            space,
            [replace(config, layers={names[0]: LayerChoice(USQ4, (6, 8))}, steps=StepGroups(10, (0, 5)))],
        )


def test_latency_is_averaged_over_steps() -> None:
    space, cost = model(2, schemes=["usq4"], activations=[8, 6], step_groups={"total": 10, "starts": [0, 3]})
    table = np.zeros((2, 2, 3))
    table[:, 1] = [[9, 4, 2], [9, 7, 5]]
    timed = cost.timed(Latency(table, (16, 8, 6), 0.5))
    config = space.config({"l0": LayerChoice(USQ4, (6, 8)), "l1": LayerChoice(USQ4, 6)})
    assert timed.totals(Choices.of(space, [config]))["latency_ms"][0] == pytest.approx(
        0.3 * 2 + 0.7 * 4 + 5 + 0.5
    )


# ---- sampling


def evaluator(pipe, tmp_path) -> tuple[Evaluator, SearchSpace]:
    graph, own = trace(pipe), fingerprint(pipe.denoiser)
    return Evaluator(pipe, graph, Bank(tmp_path), own), make_space(graph, own, activations=[16, 8, 6, 4])


def stepped(space: SearchSpace, *acts, scheme: str = "usq4", steps: StepGroups = HALVES) -> QuantConfig:
    """Layers take ``acts`` in turn."""
    base = space.uniform(scheme)
    layers = {k: replace(base[k], act=acts[i % len(acts)]) for i, k in enumerate(space.layers)}
    return replace(base, layers=layers, steps=steps)


@pytest.mark.parametrize("scheduler", ["default", "euler", "dpm"])
@pytest.mark.parametrize("packed", [False, True])
def test_bits_change_in_the_step_that_the_groups_say(tmp_path, dit, scheduler: str, packed: bool) -> None:
    here, space = evaluator(dit, tmp_path)
    names = space.layers
    config = stepped(space, (4, 8), 6, (8, 16), ("f8", "i8"))
    seen: list[list[Rounding]] = []
    first = here.quantized.layers[names[0]]
    first.register_forward_pre_hook(lambda *_: seen.append([here.quantized.layers[n].act for n in names[:4]]))
    here.generate(config, replace(PROTOCOL, scheduler=scheduler, images=8), packed)
    first, then = [4, 6, 8, "f8"], [8, 6, 16, "i8"]
    assert seen == [first, first, then, then] * 2, "every batch begins anew"
    outputs = {n for n, a in graph_layers(trace(dit)).items() if a.get("attention")}
    assert outputs and all(here.quantized.layers[n].act_output in (8, 6, 16) for n in outputs)


def test_images_are_those_of_switching_by_hand(tmp_path, pipe) -> None:
    here, space = evaluator(pipe, tmp_path)
    config = stepped(space, (4, 8), (8, 4), 6, ("i8", "f8"))
    halves = [
        QuantConfig(
            space.fingerprint,
            {
                k: replace(c, act=c.act[g] if isinstance(c.act, tuple) else c.act)
                for k, c in config.layers.items()
            },
        )
        for g in (0, 1)
    ]
    calls = [0]

    def switch(*_) -> None:
        here.quantized.apply(halves[calls[0] % 4 >= 2])
        calls[0] += 1

    handle = here.adapter.network.register_forward_pre_hook(switch)
    by_hand = torch.cat([here.adapter.images(PROTOCOL, b) for b in here.adapter.batches(PROTOCOL)])
    handle.remove()
    assert torch.equal(here.generate(config, PROTOCOL), by_hand)
    assert not torch.equal(by_hand, here.generate(halves[0], PROTOCOL)) and not torch.equal(
        by_hand, here.generate(halves[1], PROTOCOL)
    )
    assert torch.equal(
        here.generate(stepped(space, (8, 8)), PROTOCOL), here.generate(space.uniform("usq4", 8), PROTOCOL)
    )


def test_the_softmax_follows_the_values_bits(tmp_path, dit, monkeypatch) -> None:
    here, space = evaluator(dit, tmp_path)
    config = stepped(space, 8)
    values = [n for n in space.layers if n.endswith("to_v")]
    config = replace(
        config, layers={**config.layers, **{n: LayerChoice(USQ4, (16, 8)) for n in values}}, steps=HALVES
    )
    rounded: list[int] = []
    original = attention.quantized_attention
    monkeypatch.setattr(
        attention, "quantized_attention", lambda *a, **k: (rounded.append(1), original(*a, **k))[1]
    )
    here.generate(config, PROTOCOL)
    assert len(rounded) == 2 * len(values), "in the last two of four steps"


def test_another_number_of_steps_is_refused(tmp_path, dit) -> None:
    here, space = evaluator(dit, tmp_path)
    with pytest.raises(AquabitError, match="set for 4 steps, not for 5"):
        here.generate(stepped(space, (4, 8)), replace(PROTOCOL, steps=5))
    here.generate(space.uniform("usq4"), replace(PROTOCOL, steps=5))  # nothing of it is left


def test_calibrated_weights_are_the_same_whatever_the_steps_are_rounded_to(tmp_path, dit) -> None:
    here, space = evaluator(dit, tmp_path)
    few = replace(space.uniform("usq3h").calibration or space.calibration, images=2, steps=4)
    config = replace(stepped(space, (4, 8), scheme="usq3h"), calibration=few)
    mixed, eight = (
        here.quantized,
        replace(config, layers={k: replace(c, act=8) for k, c in config.layers.items()}, steps=None),
    )
    mixed.apply(config)
    weights = {n: layer.weight.clone() for n, layer in mixed.layers.items()}
    mixed.apply(eight)
    assert all(torch.equal(layer.weight, weights[n]) for n, layer in mixed.layers.items())
    third = replace(config, steps=StepGroups(4, (0, 3)))
    mixed.apply(third)
    assert all(torch.equal(layer.weight, weights[n]) for n, layer in mixed.layers.items())


def images(pipe, protocol: Protocol = PROTOCOL) -> torch.Tensor:
    adapter = Adapter(pipe)
    return torch.cat([adapter.images(protocol, b) for b in adapter.batches(protocol)])


@pytest.mark.parametrize("eight", [8, "i8", "f8"])
def test_artifacts_switch_too(tmp_path, pipe, eight: Rounding) -> None:
    here, space = evaluator(pipe, tmp_path)
    config = stepped(space, (eight, 16), eight, (16, eight))
    full, dense = here.generate(space.full_precision(), PROTOCOL), here.generate(config, PROTOCOL)
    packed = packing.quantize(pipe, config, bank=str(tmp_path), accuracy="exact")
    written = packed.save(tmp_path / "packed")
    assert written == CostModel(trace(pipe), space)(config).bytes
    loaded = load(str(tmp_path / "packed"))
    for layer in layers_of(loaded.denoiser).values():
        layer.accuracy = "exact"
    effect = (dense - full).square().mean().sqrt()
    for other in (packed.pipe, loaded):
        assert (images(other) - dense).square().mean().sqrt() < 0.1 * effect, (
            "a value between two steps may be rounded to the other one"
        )
        found = layers_of(other.denoiser)
        assert [found[n].act for n in space.layers] == [
            16 if i % 3 == 0 else eight for i in range(len(found))
        ], "as the last step left them"
    set_scheduler(loaded, "euler")
    images(loaded)
    loaded.scheduler = type(loaded.scheduler).from_config(loaded.scheduler.config)
    layers_of(loaded.denoiser)[space.layers[0]].act = 3
    images(loaded)
    assert layers_of(loaded.denoiser)[space.layers[0]].act == 16, "whoever replaces the scheduler"
    with pytest.raises(AquabitError, match="set for 4 steps"):
        packing.generate(str(tmp_path / "packed"), 2, steps=3)


def test_kernels_are_timed_for_all_bits_that_occur(tmp_path, dit, monkeypatch) -> None:
    here, space = evaluator(dit, tmp_path)
    with here.packed(stepped(space, (6, 16), 8, steps=StepGroups(4, (0, 3)))) as quantized:
        call = here.adapter.first_call(PROTOCOL)
        asked = requests_of(quantized.layers, call)
        for i, (name, row) in enumerate(asked.items()):
            shares = {
                r.act: n / sum(row.values()) for r, n in row.items()
            }  # some run more than once in a call
            assert shares == ({6: 0.75, 16: 0.25} if i % 2 == 0 else {8: 1}), name
        timed: list[int] = []

        def missing(requests: Any, *_: object) -> dict[str, dict[str, float]]:
            rows = list(requests)
            timed.extend(r.act for r in rows)
            return {r.key: {"dense": 1.0, "reference": 1.0} for r in rows}

        monkeypatch.setattr("aquabit.quant.kernel_tuning.measure_missing", missing)
        place_(quantized.layers, call)
        assert set(timed) == {6, 8, 16}


def test_whole_calls_are_averaged_over_groups(tmp_path, dit, monkeypatch) -> None:
    from aquabit.measuring import latency

    here, space = evaluator(dit, tmp_path)
    first = here.quantized.layers[space.layers[0]]
    monkeypatch.setattr(latency, "tune", lambda *_: None)
    monkeypatch.setattr(latency, "interleaved", lambda *_: {"call": [float(first.act)]})
    config = stepped(space, (4, 8), steps=StepGroups(4, (0, 3)))
    assert latency.packed_latencies(here, [config, space.uniform("usq4", 6)]) == pytest.approx(
        [1e3 * 5, 1e3 * 6]
    )


@pytest.mark.parametrize("kind", ["dynamic", "step"])
def test_corrections_act_beside_the_switch(tmp_path, dit, kind: str) -> None:
    here, space = evaluator(dit, tmp_path)
    calibration = Calibration(images=4, steps=4)
    plain = replace(stepped(space, (4, 8), 6), calibration=calibration, ranges=kind)
    config = replace(plain, correction="cnc+bc")
    made = here.generate(config, PROTOCOL, packed=True)
    assert not torch.equal(made, here.generate(plain, PROTOCOL, packed=True))
    statistics = here.noise(config, replace(Calibration.of(PROTOCOL), images=4))
    assert statistics.estimate.snr[:2].max() < statistics.estimate.snr[2:].max(), "a8 adds less noise than a4"
    packing.quantize(dit, config, bank=str(tmp_path)).save(tmp_path / "packed")
    loaded = load(str(tmp_path / "packed"))
    seen = []
    first = layers_of(loaded.denoiser)[space.layers[0]]
    first.register_forward_pre_hook(lambda *_: seen.append((first.act, first.ranges)))
    again = images(loaded)
    assert [act for act, _ in seen] == [4, 4, 8, 8] and len({ends for _, ends in seen}) == (
        1 if kind == "dynamic" else 4
    )
    assert (again - made).square().mean() < (
        again - here.generate(space.full_precision(), PROTOCOL)
    ).square().mean()
    assert len(packing.generate(str(tmp_path / "packed"), 2)) == 2, "as many steps as the groups are of"


# ---- the space


def grouped_space(graph=None, **options) -> SearchSpace:
    return make_space(
        graph or trace(tiny_pipeline("unet")),
        "f" * 16,
        "tiny",
        **{"activations": [8, 6], "step_groups": {"total": 10, "starts": [0, 5]}, **options},
    )


def test_choices_are_widths_and_one_change_between_neighbours() -> None:
    assert grouped_space().act_choices == (8, 6, (6, 8), (8, 6))
    three = grouped_space(activations=[8, 4, 6], step_groups={"total": 10, "starts": [0, 2, 5]})
    assert three.act_choices == (
        *(8, 6, 4),
        (6, 8, 8),
        (6, 6, 8),
        (8, 6, 6),
        (8, 8, 6),
        (4, 6, 6),
        (4, 4, 6),
        (6, 4, 4),
        (6, 6, 4),
    )
    assert grouped_space(step_groups=None).act_choices == (8, 6)
    assert len(set(three.act_choices)) == len(three.act_choices)


@given(st.integers(0, 10**6))
def test_samples_draw_patterns_and_indices_are_inverse(seed: int) -> None:
    space = grouped_space()
    drawn = space.sample(12, seed)
    assert [c.digest for c in Choices.of(space, drawn).configs()] == [c.digest for c in drawn]
    assert [c.digest for c in space.sample(3, seed)] == [c.digest for c in drawn[:3]]
    means = [[c.mean_act(k) for k in space.layers] for c in drawn]
    assert np.allclose(Choices.of(space, drawn).mean_bits, means)


def test_half_of_the_samples_are_at_the_highest_bits_and_a_quarter_has_patterns() -> None:
    space = grouped_space()
    place = Choices.of(space, space.sample(200)).act_index(space.act_choices)
    assert 0.4 < (place == 0).all(1).mean() < 0.6 and 0.15 < (place > 1).any(1).mean() < 0.35
    assert set(np.unique(place)) == set(range(len(space.act_choices)))


def test_spaces_without_groups_are_as_they_were() -> None:
    """Numbers of the version before there were groups."""
    graph = trace(tiny_pipeline("unet"))
    space = make_space(
        graph,
        "f" * 16,
        "tiny",
        schemes=["usq2", "usq4", "usq4h"],
        activations=[16, 8, 6],
        excluded=["conv_out"],
    )
    assert "step_groups" not in space.to_dict()
    drawn = space.sample(6, seed=3)
    assert [c.digest for c in drawn[:2]] == ["b45028a0342db30c", "3bb1a93c953fec8a"]
    rng = np.random.default_rng(0)
    errors = {(k, str(q)): 4.0**-q.bits for k, row in space.choices.items() for q in row}
    levels = ("usq2", "usq4", "usq4h", "a8", "a6")
    probes = {
        (k, x): {"damage": float(rng.random()), "sketch": rng.standard_normal(SKETCH).round(3).tolist()}
        for k in space.choices
        for x in levels
    }
    features = Encoder(space, graph, errors, probes).encode(drawn).astype(float)
    assert features.shape == (6, 226)
    assert [features.sum(), (features * np.arange(226)).sum()] == pytest.approx(
        [-617.4419690900249, -20895.608860132168], rel=1e-6
    )


def test_space_in_json_and_files(tmp_path) -> None:
    space = grouped_space()
    again = SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again.steps == StepGroups(10, (0, 5)) and again.to_dict() == space.to_dict()
    path = tmp_path / "space.json"
    path.write_text('{"step_groups": {"total": 10, "starts": [0, 5]}}')
    assert grouped_space(**read_space(path)).steps == StepGroups(10, (0, 5))
    for text, word in (
        ('{"total": 10}', "step_groups"),
        ('{"total": 10, "starts": [0, "5"]}', "step_groups"),
        ('{"total": 10, "starts": [1, 5]}', "rising starts from 0"),
        ('{"total": 10, "starts": [0, 10]}', "rising starts from 0"),
        ("[0, 5]", "must be a dict"),
    ):
        path.write_text(f'{{"step_groups": {text}}}')
        with pytest.raises(AquabitError, match=word):
            read_space(path)


@pytest.mark.parametrize("probed", [False, True])
def test_the_order_of_widths_is_seen(probed: bool) -> None:
    graph = trace(tiny_pipeline("unet"))
    space = grouped_space(graph, schemes=["usq2", "usq4"])
    errors = {(k, str(q)): 4.0**-q.bits for k, row in space.choices.items() for q in row}
    damage = {"usq2": 0.1, "usq4": 0.01, "a8": 0.001, "a6": 0.02, "a6/8": 0.005, "a8/6": 0.015}
    probes = {(k, x): {"damage": d, "sketch": [d] * SKETCH} for k in space.choices for x, d in damage.items()}
    encoder = Encoder(space, graph, errors, probes if probed else None)
    assert bool(encoder.probed) == probed
    layer, base = space.layers[4], space.uniform("usq4")
    low, high, both = encoder.encode(
        [base.with_layer(layer, "usq4", act, steps=space.steps) for act in ((6, 8), (8, 6), 6)]
    )
    changed = {encoder.columns[i] for i in np.flatnonzero(low != high)}
    assert {f"order:{layer}", "ordershare:model"} <= changed and f"act:{layer}" not in changed
    assert (f"damage:{layer}" in changed) == probed
    act = encoder.columns.index(f"act:{layer}")
    assert low[act] == high[act] == pytest.approx(0.5) and both[act] == 1
    order = encoder.columns.index(f"order:{layer}")
    assert (low[order], high[order], both[order]) == (-1, 1, 0)
    parts = member_parts(encoder, Choices.of(space, [base]))
    assert all(
        name.split(":")[0] in parts
        for name, members in zip(encoder.columns, encoder.members, strict=True)
        if len(members) > 1
    )
    del probes[layer, "a6/8"]
    assert not Encoder(space, graph, errors, probes).probed, "a choice without a probe"


@pytest.mark.parametrize("names", [("bops",), ("bits", "bops"), ("bops", "latency_ms")])
@pytest.mark.parametrize("seed", range(3))
def test_the_search_chooses_among_patterns(names: tuple[str, ...], seed: int) -> None:
    space, cost = model(
        4, seed, schemes=["usq2", "usq4"], activations=[8, 6], step_groups={"total": 10, "starts": [0, 4]}
    )
    budget = middle(cost, 0.5, *names)
    choices = activation_choices(space, budget)
    assert choices == space.act_choices and activation_choices(space, Budget(bits=3)) == (8,)
    rows = every(space, choices)
    totals, options = cost.totals(rows), Options.of(cost, budget)
    inside = cost.within(totals, budget)
    choice = options.columns.join(rows)
    assert (choice >= 0).all() and (options.keeps(choice) == inside).all()
    for name in names:
        low, high = cost.limits()[name]
        assert (totals[name] >= low * (1 - 1e-12)).all() and (totals[name] <= high * (1 + 1e-12)).all()
    scores = np.random.default_rng(seed).normal(size=(4, len(space.schemes), len(choices)))
    found = solve(scores, cost, budget)
    best = total(scores, choices, rows[inside]).min()
    assert found.score == pytest.approx(best, abs=1e-9) and found.gap < 1e-12

    def predict(rows: Choices) -> np.ndarray:
        return total(scores, choices, rows) + 0.3 * np.abs(np.diff(rows.mean_bits, axis=1)).sum(1)

    again = choice_effects(lambda rows: total(scores, choices, rows), space, rows[:3], choices).mean(0)
    cells = again[:, 1:] - scores[:, 1:]
    assert np.allclose(cells, cells[:, :1, :1]), "single choices of an additive function"
    improved = improve(found.choices, predict, cost, budget, seed=seed)
    assert improved.predicted <= improved.start
    assert improved.predicted == pytest.approx(predict(rows[inside]).min(), abs=1e-9)


def test_a_study_measures_patterns_and_probes_them(tmp_path, dit) -> None:
    protocol = Protocol(images=4, steps=2, micro_batch=4)
    options = {"schemes": ["usq2", "usq4"], "levels": [], "step_groups": {"total": 2, "starts": [0, 1]}}
    study = Study(tmp_path / "s.db")
    measure(dit, study, 3, protocol=protocol, space=options, bank=str(tmp_path / "bank"))
    layer = next(iter(study.get("space")["choices"]))
    assert {"a8", "a6", "a6/8", "a8/6"} <= {level for name, level in study.features() if name == layer}
    damages = [study.features()[layer, level]["damage"] for level in ("a8", "a6", "a6/8", "a8/6")]
    assert len(set(damages)) == 4 and max(damages) < 1
    wrong = {**options, "step_groups": {"total": 4, "starts": [0, 1]}}
    with (
        pytest.raises(AquabitError, match="of 4 steps, the images are made in 2"),
        open_session(
            dit, Study(tmp_path / "t.db"), MeasureOptions(protocol, wrong), Where(bank=str(tmp_path / "bank"))
        ),
    ):
        pass
    again = measure(dit, Study(tmp_path / "s.db"), 3, bank=str(tmp_path / "bank"))
    assert again == 0


def test_switching_costs_nothing_noticeable(tmp_path, dit) -> None:
    here, space = evaluator(dit, tmp_path)
    name = next(n for n in space.layers if n.endswith("to_q"))
    layer, output = here.quantized.layers[name], {}
    x = torch.randn(3, layer.shape[1], generator=torch.Generator().manual_seed(0))
    for act in (4, 8):
        here.quantized.apply(space.uniform("usq4", act))
        output[act] = layer(x)
    assert not torch.equal(output[4], output[8])
    here.quantized.apply(config := stepped(space, (4, 8)))
    weight, (watcher,) = layer.weight, here.quantized.watchers(config)
    with following(here.adapter.network, dit.scheduler, [watcher]):
        dit.scheduler.set_timesteps(4)
        for step in range(4):
            watcher.before(step)
            assert layer.act == (4 if step < 2 else 8) and torch.equal(layer(x), output[layer.act])
            assert here.quantized.layers[name] is layer and layer.weight is weight, "no copy"


# ---- the command line


@pytest.mark.slow
def test_step_groups_on_the_command_line(tmp_path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "pipe")
    (tmp_path / "space.json").write_text(
        '{"schemes": ["usq2", "usq3", "usq4", "usq8"], "activations": [8, 4]}'
    )
    words = (
        "measure",
        "pipe",
        "--study",
        "s.db",
        "--images",
        "4",
        "--steps",
        "2",
        "--workers",
        "1",
        "--space",
        "space.json",
    )
    assert "0 and separated by commas, as in 0,5" in fails(
        tmp_path, *words, "--samples", "2", "--step-groups", "0;1"
    ).replace("\n", " ")
    assert "rising starts from 0" in fails(tmp_path, *words, "--samples", "2", "--step-groups", "0,5")
    run(tmp_path, *words, "--samples", "22", "--step-groups", "0,1")
    study = Study(tmp_path / "s.db", create=False)
    space = SearchSpace.from_dict(study.get("space"))
    assert space.steps == StepGroups(2, (0, 1)) and space.act_choices == (8, 4, (4, 8), (8, 4))
    from aquabit.graph import from_json

    costs = CostModel(from_json(study.get("graph")), space)
    low, high = (costs(space.uniform("usq4", a)).bops for a in (4, 8))
    budget = (low + high) / 2
    found = (
        "search",
        "s.db",
        "--bops",
        f"{budget:.0f}",
        "--rounds",
        "1",
        "--workers",
        "1",
        "--out",
        "config.json",
    )
    run(tmp_path, *found)
    config = QuantConfig.load(tmp_path / "config.json")
    assert costs(config).bops <= budget * (1 + 1e-9)
    candidates = study.measurements(kind="candidate").config
    assert any(c.steps is not None for d, c in study.configs().items() if d in set(candidates)), (
        "patterns are proposed"
    )
    run(tmp_path, "quantize", "pipe", "config.json", "--out", "packed")
    run(tmp_path, "generate", "packed", "--images", "2", "--steps", "2", "--out", "grid.png")
    if config.steps is not None:
        assert "set for 2 steps, not for 3" in fails(
            tmp_path, "generate", "packed", "--images", "2", "--steps", "3", "--out", "grid.png"
        )
    assert "another search space" in fails(tmp_path, *words, "--samples", "22")


@pytest.mark.parametrize(
    ("name", "bits"), [("PNDMScheduler", [6, 6, 6, 8, 8]), ("HeunDiscreteScheduler", [6, 6, 6, 8, 8, 8, 8])]
)
def test_groups_follow_steps_where_the_denoiser_runs_more_often(name: str, bits: list[int], tmp_path) -> None:
    """PNDM, Stable Diffusion's own sampler, and Heun call it more than once a step."""
    pipe = tiny("sd")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, skip_prk_steps=True)
    calibration = Calibration(images=4, steps=4, conditions=PROMPTS)
    space = make_space(trace(pipe), fingerprint(pipe.unet), schemes=["usq4"])
    layer = next(iter(space.choices))
    config = replace(space.uniform("usq4", 8), calibration=calibration)
    config = config.with_layer(layer, "usq4", (6, 8), steps=HALVES)
    packed, seen = packing.quantize(pipe, config, bank=str(tmp_path)).pipe, list[int]()
    packed.unet.register_forward_hook(lambda *_: seen.append(packed.unet.get_submodule(layer).act))
    protocol = Protocol(images=2, steps=4, micro_batch=2, conditions=PROMPTS)
    assert torch.isfinite(Adapter(packed).images(protocol, range(2))).all() and seen == bits
    with pytest.raises(AquabitError, match="set for 4 steps, not for 3"):
        Adapter(packed).images(replace(protocol, steps=3), range(2))


def test_what_a_sampler_does_not_allow_is_said_before_anything_is_fitted(tmp_path) -> None:
    pipe = tiny("sd")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    space = make_space(trace(pipe), fingerprint(pipe.unet), schemes=["usq4"])
    config = replace(space.uniform("usq4", 8), calibration=Calibration(images=4, conditions=PROMPTS))
    with pytest.raises(AquabitError, match="corrections are not defined for PNDMScheduler"):
        packing.quantize(pipe, config, bank=str(tmp_path), correct=True, finetune=True)
    assert not list(tmp_path.rglob("*.safetensors"))
