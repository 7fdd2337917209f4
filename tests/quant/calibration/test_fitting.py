"""Fits in the bank: found again wherever they are needed, the same whoever makes them, under keys of all
that they depend on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aquabit import packing
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.fitting import PARTS
from aquabit.measuring.model import open_model
from aquabit.pipelines import Adapter, recorder, trace
from aquabit.quant.bank import Bank
from aquabit.quant.calibration import calibrator, fitting
from aquabit.quant.calibration import moments as moments_module
from aquabit.quant.calibration.fitting import FitRequest
from aquabit.quant.calibration.hessian import output_error
from aquabit.quant.calibration.moments import moments
from aquabit.quant.calibration.recording import record_calls
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.quant.weights import quantize_weight, quantize_weights
from aquabit.scheme import FP, AquabitError, Calibration, Protocol, QuantConfig, Scheme
from aquabit.space import SearchSpace, make_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.worlds import assert_near

PROTOCOL = Protocol(images=4, steps=2, micro_batch=4)
CALIBRATION = Calibration(images=4, steps=2)
Q0, Q1, V0 = (f"transformer_blocks.{i}.attn1.to_{x}" for i, x in ((0, "q"), (1, "q"), (0, "v")))
DOWN0, DOWN1 = (f"transformer_blocks.{i}.ff.net.2" for i in (0, 1))
KEPT = (Q0, Q1, V0, DOWN0, DOWN1)
SCHEMES = ("usq2", "usq3h", "vq2h", "aq2x3g4", "aq1x4g4s")
SPACE: dict[str, Any] = {"schemes": list(SCHEMES), "calibration": CALIBRATION}
AWARE = tuple(Scheme.parse(s) for s in SCHEMES if s != "usq2")
USQ, VQ, AQ, SHARED = AWARE


def excluded(pipe) -> list[str]:
    return [n for n, a in trace(pipe).nodes(data=True) if a["kind"] != "merge" and n not in KEPT]


def opened(pipe, bank: Path | str, record: bool = True) -> QuantizedDenoiser:
    """A pipeline's denoiser, quantized in a copy."""
    own = type(pipe)(
        copy.deepcopy(pipe.denoiser),
        pipe.scheduler,
        **{k: pipe.config[k] for k in ("classes", "real_images")},
    )
    own.set_progress_bar_config(disable=True)
    return QuantizedDenoiser(
        own.denoiser, trace(own), Bank(bank), fingerprint(own.denoiser), recorder(own) if record else None
    )


def space_of(pipe, **options: Any) -> SearchSpace:
    return make_space(
        trace(pipe), fingerprint(pipe.denoiser), **{**SPACE, "excluded": excluded(pipe), **options}
    )


def mixed(space: SearchSpace, acts: tuple[int, ...] = (8, 6)) -> QuantConfig:
    """Every scheme on some layer, at several activation bits."""
    choices = zip(
        KEPT, (SHARED, SHARED, USQ, AQ, VQ), [acts[i % len(acts)] for i in range(len(KEPT))], strict=True
    )
    return space.config({n: space.choice(n, s, a) for n, s, a in choices})


class Fits(list[tuple[str, int]]):
    """(scheme, how many weights) of every fit that is made."""


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fits]:
    made, many = Fits(), fitting.quantize_weights

    def quantize_many(weights: list[Tensor], scheme: Scheme, *rest: Any, **options: Any) -> Any:
        made.append((str(scheme), len(weights)))
        return many(weights, scheme, *rest, **options)

    monkeypatch.setattr(fitting, "quantize_weights", quantize_many)
    return made


def weights(model: QuantizedDenoiser) -> dict[str, Tensor]:
    return {n: layer.weight.clone() for n, layer in model.layers.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_layers_of_equal_weights_are_fitted_each_with_its_own_inputs(dit, tmp_path) -> None:
    """They had one fit, made for the inputs of whichever came first."""
    blocks = dit.denoiser.transformer_blocks
    blocks[1].load_state_dict(blocks[0].state_dict())
    config = space_of(dit).config({n: space_of(dit).choice(n, USQ, 8) for n in (Q0, Q1)})
    model = opened(dit, tmp_path)
    model.apply(config)
    alone = {}
    for name in (Q0, Q1):
        other = opened(dit, tmp_path / name)
        other.apply(space_of(dit).config({name: space_of(dit).choice(name, USQ, 8)}))
        alone[name] = other.layers[name].weight
    assert not torch.equal(alone[Q0], alone[Q1]), "the test must see a difference"
    assert all(torch.equal(model.layers[n].weight, alone[n]) for n in (Q0, Q1))


# ---- found again


def test_what_measuring_fitted_is_found_again(dit, tmp_path, fits) -> None:
    study, bank = Study(tmp_path / "s.db"), str(tmp_path / "bank")
    measure(dit, study, 6, protocol=PROTOCOL, space={**SPACE, "excluded": excluded(dit)}, bank=bank)
    space = SearchSpace.from_dict(study.get("space"))
    assert space.activations == (8, 6) and space.calibration == CALIBRATION
    made = [(s, n) for s, n in fits if s in ("usq3h", "vq2h", "aq2x3g4")]
    assert len(made) == 3 * len(KEPT), "each layer at each scheme once, whatever the activations"
    assert [f for f in fits if f[0] == "aq1x4g4s"] == [("aq1x4g4s", 2)] * 3, (
        "one fit of all members for each of q, v and down"
    )
    assert sum(s == "usq2" for s, _ in fits) == len(KEPT), "plain schemes once, whatever the activations"
    fits.clear()
    model = opened(dit, bank, record=False)  # could fit nothing with H
    drawn = [c for c in study.configs().values() if c.layers]
    assert {str(c.weight) for config in drawn for c in config.layers.values()} >= {*SCHEMES}
    for config in (*drawn, mixed(space), mixed(space, (6, 8))):
        model.apply(config)
        packed = packing.quantize(dit, config, bank=bank).model
        for name, choice in config.layers.items():
            if choice.weight.kind != "fp":
                assert torch.equal(packed.layers[name].coded.dequantize(), model.layers[name].weight)  # type: ignore[union-attr]
    assert not fits
    told: list[str] = []
    assert (
        measure(dit, study, 8, protocol=PROTOCOL, bank=bank, progress=lambda text, *_: told.append(text)) == 2
        and not fits
    )
    assert not [text for text in told if "fitting" in text or "calibrating" in text], (
        "what the study knows of each scheme is kept"
    )


def test_one_fit_serves_every_activation_width(dit, tmp_path, fits) -> None:
    model, space = opened(dit, tmp_path), space_of(dit, activations=(16, 8, 6))
    seen = []
    for act in (16, 8, 6):
        model.apply(mixed(space, (act,)))
        seen.append(weights(model))
        assert all(model.layers[n].act == act for n in KEPT)
    assert equal(seen[0], seen[1]) and equal(seen[1], seen[2])
    assert len(fits) == len(set(fits)) > 0, "nothing is fitted twice"


@pytest.mark.parametrize("scheme", ["usq2h", "usq4h", "vq3h", "aq1x4g4"])
def test_a_fit_for_8_bits_is_as_good_at_6_as_one_of_its_own(dit, tmp_path, scheme: str) -> None:
    plain = QuantizedDenoiser(dit.denoiser, trace(dit))
    names = [n for n, layer in plain.layers.items() if layer.weight.numel() > 256]
    found = moments(plain.full_precision, recorder(dit)(CALIBRATION), [(n,) for n in names], [8, 6])
    ratios = []
    for n in names:
        full, at6 = plain.full(n), found[n, 6].hessian
        one, own = (quantize_weight(full, scheme, found[n, a].hessian).dequantize() for a in (8, 6))
        ratios.append(output_error(full, one, at6) / output_error(full, own, at6))
    assert abs(float(torch.tensor(ratios).median()) - 1) < 0.06, ratios


def test_layers_that_share_codebooks_may_differ_in_activation_bits(dit, tmp_path) -> None:
    space = space_of(dit)
    config = space.config(
        {n: space.choice(n, SHARED, a) for n, a in ((Q0, 8), (Q1, 6), (DOWN0, 6), (DOWN1, 16))}
    )
    model = opened(dit, tmp_path)
    model.apply(config)
    packed = packing.quantize(dit, config, bank=str(tmp_path)).model
    for name, choice in config.layers.items():
        layer = packed.layers[name]
        assert layer.coded is not None and torch.equal(layer.coded.dequantize(), model.layers[name].weight), (
            name
        )
        assert layer.act == model.layers[name].act == choice.act


def test_a_fit_is_that_of_the_layers_own_input(dit, tmp_path) -> None:
    """Against H made by hand: full precision before the layer, its own input rounded to 8 bits."""
    model, space = opened(dit, tmp_path), space_of(dit)
    model.apply(mixed(space))
    other = copy.deepcopy(dit)
    plain = QuantizedDenoiser(other.denoiser, trace(other))
    calls = recorder(other)(CALIBRATION)
    for name, scheme in ((V0, USQ), (DOWN0, AQ), (DOWN1, VQ)):
        hessian = moments(plain.full_precision, calls, [(name,)], [8])[name, 8].hessian
        expected = quantize_weight(plain.full(name), scheme, hessian)
        fit = model.fitter.found(FitRequest(name, scheme), CALIBRATION)
        assert fit is not None and torch.equal(fit.coded.dequantize(), expected.dequantize()), name
        assert fit.output == pytest.approx(
            output_error(plain.full(name), expected.dequantize(), hessian), rel=1e-6
        )
        assert torch.equal(model.layers[name].weight, expected.dequantize())
    known = [moments(plain.full_precision, calls, [(n,)], [8])[n, 8].hessian for n in (Q0, Q1)]
    together = quantize_weights([plain.full(Q0), plain.full(Q1)], SHARED, known)
    for name, expected in zip((Q0, Q1), together, strict=True):
        assert torch.equal(model.layers[name].weight, expected.dequantize())
    assert (model.layers[Q0].act, model.layers[Q1].act) == (8, 6)


# ---- keys


def test_keys_hold_all_that_a_fit_depends_on(dit, tmp_path) -> None:
    model, need = opened(dit, tmp_path).fitter, FitRequest(Q0, USQ)
    contexts = {"": model.context(need, CALIBRATION)}
    for change in (
        {"steps": 3},
        {"images": 5},
        {"seed": 1},
        {"guidance": 2.0},
        {"conditions": (1, 2)},
        {"scheduler": "euler"},
        {"eta": 0.1},
    ):
        contexts[str(change)] = model.context(need, replace(CALIBRATION, **change))
    contexts["shared"] = model.context(FitRequest(Q0, SHARED), CALIBRATION)
    assert len(set(contexts.values())) == len(contexts)
    assert model.context(need, None) == model.context(need, Calibration()) != contexts[""]
    assert model.context(FitRequest(Q0, VQ), CALIBRATION) == contexts[""], (
        "the scheme's text is in the file's name"
    )
    paths = {
        model.bank.path(model.weights.key(Q0), s, contexts[""]) for s in (USQ, VQ, AQ, Scheme.parse("usq3"))
    }
    assert len(paths) == 4
    assert model.context(FitRequest(Q0, SHARED), CALIBRATION) == model.context(
        FitRequest(Q1, SHARED), CALIBRATION
    )

    with torch.no_grad():
        dit.denoiser.pos_embed.proj.weight.mul_(
            1.01
        )  # upstream: the layer's weight stays, what it reads does not
    upstream = opened(dit, tmp_path).fitter
    assert (
        upstream.weights.key(Q0) == model.weights.key(Q0)
        and upstream.context(need, CALIBRATION) != contexts[""]
    )
    for text, key in (("usq3", "fits2"), ("vq3c", "fits2"), ("usq8", ""), ("vq8", "")):
        assert upstream.context(FitRequest(Q0, Scheme.parse(text)), CALIBRATION) == key, (
            "what sees the weight alone is found whatever is upstream, but no fit of before it had gain 1"
        )


def test_fits_of_an_earlier_version_are_not_found(dit, tmp_path, monkeypatch) -> None:
    fitter, needs = opened(dit, tmp_path).fitter, [FitRequest(Q0, s) for s in (USQ, SHARED)]
    now = [fitter.context(n, CALIBRATION) for n in needs]
    monkeypatch.setattr(fitting, "CALIBRATED_FITS", fitting.CALIBRATED_FITS - 1)
    assert not set(now) & {fitter.context(n, CALIBRATION) for n in needs}


def test_shared_fits_depend_on_every_member(dit, tmp_path) -> None:
    model = opened(dit, tmp_path)
    one = model.fitter.context(FitRequest(Q0, SHARED), CALIBRATION)
    model.weights._keys[Q1] = "another"
    assert model.fitter.context(FitRequest(Q0, SHARED), CALIBRATION) != one
    assert model.fitter.context(FitRequest(Q0, AQ), CALIBRATION) == opened(dit, tmp_path).fitter.context(
        FitRequest(Q0, AQ), CALIBRATION
    )


@pytest.mark.parametrize("change", ["calibration", "upstream"])
def test_what_depends_on_something_else_is_fitted_again(dit, tmp_path, fits, change: str) -> None:
    opened(dit, tmp_path).apply(mixed(space_of(dit)))
    before = sorted(fits)
    fits.clear()
    calibration = CALIBRATION
    if change == "upstream":
        with torch.no_grad():
            dit.denoiser.pos_embed.proj.weight.mul_(1.5)
    else:
        calibration = replace(CALIBRATION, steps=3)
    model, config = opened(dit, tmp_path), mixed(space_of(dit, calibration=calibration))
    model.apply(config)
    assert sorted(fits) == before
    assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {model.weights.key(n) for n in KEPT}, (
        "the same weights"
    )
    assert len(list(tmp_path.iterdir())) == 2 * len(KEPT), "the fits of before stay"


def test_one_model_switches_between_calibrations(dit, tmp_path) -> None:
    model, other = opened(dit, tmp_path), replace(CALIBRATION, steps=3)
    seen = []
    for calibration in (CALIBRATION, other, CALIBRATION):
        model.apply(mixed(space_of(dit, calibration=calibration)))
        seen.append(weights(model))
    assert equal(seen[0], seen[2]) and all(not torch.equal(seen[0][n], seen[1][n]) for n in KEPT)
    alone = opened(dit, tmp_path / "two")
    alone.apply(mixed(space_of(dit, calibration=other)))
    assert equal(weights(alone), seen[1])
    for calibration in (
        replace(CALIBRATION, seed=1),
        replace(CALIBRATION, seed=2),
    ):  # the same layer, one right after the other
        fresh = opened(dit, tmp_path / "three").fitter.coded(FitRequest(V0, USQ), calibration)
        assert torch.equal(
            model.fitter.coded(FitRequest(V0, USQ), calibration).dequantize(), fresh.dequantize()
        )


# ---- the same whoever makes them


def test_evicted_fits_come_back_to_the_bit(dit, tmp_path) -> None:
    space = space_of(dit)
    config = mixed(space)
    first = opened(dit, tmp_path / "one")
    first.apply(config)
    expected = weights(first)
    for path in (tmp_path / "one").iterdir():
        path.unlink()
    first._recent.clear()
    first._current.clear()
    first.apply(config)
    assert equal(weights(first), expected)
    alone = opened(dit, tmp_path / "two")
    for name in reversed(KEPT):  # one at a time, the last first
        alone.apply(space.config({name: config[name]}))
        assert torch.equal(alone.layers[name].weight, expected[name]), name
    more = opened(dit, tmp_path / "three")  # among many others
    more.fitter.fit(
        [FitRequest(n, s) for n in KEPT for s in (*AWARE, Scheme.parse("usq2")) if n != V0 or not s.shared],
        CALIBRATION,
    )
    more.apply(config)
    assert equal(weights(more), expected)


def test_portions_of_memory_change_nothing(dit, tmp_path, monkeypatch) -> None:
    config = mixed(space_of(dit))
    whole = opened(dit, tmp_path / "one")
    whole.apply(config)
    replays = []
    monkeypatch.setattr(calibrator, "portions", lambda *rest: moments_module.portions(*rest, limit_bytes=1))
    monkeypatch.setattr(calibrator, "moments", lambda *rest: replays.append(rest[2]) or moments(*rest))
    parts = opened(dit, tmp_path / "two")
    parts.apply(config)
    assert len(replays) >= 4 and equal(weights(parts), weights(whole))


def test_a_fresh_bank_quantizes_to_what_was_measured(pipe, tmp_path) -> None:
    """The artifact's images are those that the measurement saw, though another bank made the fits."""
    graph = trace(pipe)
    names = [n for n, a in graph.nodes(data=True) if a["kind"] != "merge"]
    space = make_space(
        graph,
        fingerprint(pipe.denoiser),
        schemes=["usq2", "usq3h", "aq1x4g4", "aq1x4g4s"],
        calibration=CALIBRATION,
    )
    picked = {n: space.choices[n][-1 - (i % 2)] for i, n in enumerate(names)}
    config = space.config(
        {n: space.choice(n, s, (8, 6)[i // 2 % 2]) for i, (n, s) in enumerate(picked.items())}
    )
    assert {str(c.weight) for c in config.layers.values()} >= {"aq1x4g4", "aq1x4g4s"}
    model = open_model(pipe)
    evaluator = Evaluator(pipe, model.graph, Bank(tmp_path / "one"), model.fingerprint)
    measured = evaluator.generate(config, PROTOCOL)
    packed = packing.quantize(pipe, config, bank=str(tmp_path / "two"), accuracy="exact")
    for name, layer in packed.model.layers.items():
        assert layer.coded is not None and torch.equal(
            layer.coded.dequantize(), evaluator.quantized.layers[name].weight
        ), name
        assert (layer.act, layer.act_output) == (
            evaluator.quantized.layers[name].act,
            evaluator.quantized.layers[name].act_output,
        )
    made = Adapter(packed.pipe).images(PROTOCOL, range(4))
    full = evaluator.generate(QuantConfig(model.fingerprint, {}), PROTOCOL)
    change = float((measured - full).abs().max())
    assert change > 1e-2, "the test must see a difference"
    close = (
        (made - measured).abs().flatten(1).amax(1)
    )  # a rounding of activations that falls the other way, on one processor or another, moves an image
    assert float(close.median()) < 1e-4 and float(close.max()) < change / 2, (close, change)


def test_dense_equals_packed_for_shared_codebooks(pipe, tmp_path) -> None:
    graph = trace(pipe)
    space = make_space(
        graph, fingerprint(pipe.denoiser), schemes=["usq4", "aq1x4g4s"], calibration=CALIBRATION
    )
    config = space.config({n: space.choice(n, row[-1], 16) for n, row in space.choices.items()})
    packed = packing.quantize(pipe, config, bank=str(tmp_path), accuracy="exact")
    tables: dict[str, set[int]] = {}
    for name, choice in config.layers.items():
        if choice.weight.shared:
            tables.setdefault(str(choice.codebook), set()).add(
                packed.model.layers[name].coded.codebooks.data_ptr()
            )  # type: ignore[union-attr]
    assert len(tables) >= 4 and all(len(pointers) == 1 for pointers in tables.values()), (
        "one tensor for all members"
    )
    assert len({p for pointers in tables.values() for p in pointers}) == len(tables)
    dense = opened(pipe, tmp_path, record=False)
    dense.apply(config)
    pipe.denoiser = dense.denoiser
    torch.testing.assert_close(
        Adapter(packed.pipe).images(PROTOCOL, range(4)),
        Adapter(pipe).images(PROTOCOL, range(4)),
        rtol=0,
        atol=1e-4,
    )


def test_workers_find_the_same_features(dit, tmp_path) -> None:
    options: dict[str, Any] = {"protocol": PROTOCOL, "space": {**SPACE, "excluded": excluded(dit)}}
    one, two = Study(tmp_path / "one.db"), Study(tmp_path / "two.db")
    measure(dit, one, 2, bank=str(tmp_path / "bank1"), **options)
    measure(dit, two, 2, bank=str(tmp_path / "bank2"), workers=2, **options)
    assert_near(one.features(), two.features())
    assert len(one.features()) > 5 * len(KEPT)
    columns = ["config", "status", "mse", "fid"]
    assert (
        one.measurements()[columns]
        .sort_values("config")
        .reset_index(drop=True)
        .equals(two.measurements()[columns].sort_values("config").reset_index(drop=True))
    )
    names = ({p.name for p in (tmp_path / b).iterdir()} for b in ("bank1", "bank2"))
    assert len({frozenset(n) for n in names}) == 1


# ---- interruptions and damage


def test_an_interrupted_fit_continues(dit, tmp_path, fits, monkeypatch) -> None:
    options: dict[str, Any] = {"protocol": PROTOCOL, "space": {**SPACE, "excluded": excluded(dit)}}
    whole = Study(tmp_path / "whole.db")
    measure(dit, whole, 1, bank=str(tmp_path / "bank1"), **options)
    total, last = len(fits), max(i for i, (scheme, _) in enumerate(fits) if scheme == "aq1x4g4s")
    fits.clear()
    study, counted = Study(tmp_path / "s.db"), fitting.quantize_weights

    def broken(*rest: Any, **given: Any) -> Any:
        if len(fits) >= broken.limit:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return counted(*rest, **given)

    monkeypatch.setattr(fitting, "quantize_weights", broken)
    for limit in (7, 19, last):
        broken.limit = limit  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            measure(dit, study, 1, bank=str(tmp_path / "bank2"), **options)
        assert study.measurements(failed=True).empty
        assert len(list((tmp_path / "bank2").glob("[!i]*.safetensors"))) >= limit, "what was fitted is kept"
    broken.limit = 10**6  # type: ignore[attr-defined]
    measure(dit, study, 1, bank=str(tmp_path / "bank2"), **options)
    assert len(fits) == total, "nothing is fitted twice"
    assert study.features() == whole.features()
    assert not [p for p in (tmp_path / "bank2").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("damage", ["truncated", "older"])
def test_unreadable_fits_are_made_again_and_leave_the_other_layers_alone(
    dit, tmp_path, damage: str, monkeypatch
) -> None:
    space = space_of(dit, excluded=[])
    config = mixed(space).with_layer(
        "pos_embed.proj", "fp", 8
    )  # a layer before them that has activation bits alone
    model = opened(dit, tmp_path)
    model.apply(config)
    expected, acts = weights(model), {n: layer.act for n, layer in model.layers.items()}
    files = sorted(tmp_path.iterdir())
    if damage == "older":
        monkeypatch.setattr("aquabit.quant.bank.FORMAT", 10**6)
    else:
        for path in files:
            path.write_bytes(path.read_bytes()[:-9])
    again = opened(dit, tmp_path)
    again.apply(config)
    assert equal(weights(again), expected) and {n: layer.act for n, layer in again.layers.items()} == acts
    if damage == "truncated":
        one = opened(dit, tmp_path)
        path = one.fitter.bank.path(
            one.weights.key(DOWN1), VQ, one.fitter.context(FitRequest(DOWN1, VQ), CALIBRATION)
        )
        path.write_bytes(b"nothing")
        one.apply(config)  # all others are found
        assert equal(weights(one), expected) and {n: layer.act for n, layer in one.layers.items()} == acts
        path.write_bytes(b"nothing")
        two = opened(dit, tmp_path)
        two.apply(space.config({n: config[n] for n in ("pos_embed.proj", DOWN1)}))
        assert two.layers["pos_embed.proj"].act == 8 and torch.equal(
            two.layers[DOWN1].weight, expected[DOWN1]
        )
    assert sorted(tmp_path.iterdir()) == files


def test_a_fit_of_a_member_is_a_fit_of_all(dit, tmp_path, fits) -> None:
    model = opened(dit, tmp_path)
    one = model.fitter.coded(FitRequest(Q0, SHARED), CALIBRATION)
    assert fits == [("aq1x4g4s", 2)]
    assert model.fitter.has(FitRequest(Q1, SHARED), CALIBRATION) and not model.fitter.has(
        FitRequest(DOWN1, SHARED), CALIBRATION
    )
    other = model.fitter.coded(FitRequest(Q1, SHARED), CALIBRATION)
    assert fits == [("aq1x4g4s", 2)] and one.codebooks is not None and other.codebooks is not None
    assert torch.equal(one.codebooks, other.codebooks) and not torch.equal(one.packed, other.packed)
    for path in tmp_path.glob(f"{model.weights.key(Q1)}*"):
        path.unlink()
    assert torch.equal(model.fitter.coded(FitRequest(Q1, SHARED), CALIBRATION).packed, other.packed), (
        "one lost member is the same again"
    )
    assert torch.equal(model.fitter.coded(FitRequest(Q0, SHARED), CALIBRATION).packed, one.packed)


# ---- what is said


def test_a_diagonal_h_is_noted(dit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(moments_module, "WIDEST", 32)
    study = Study(tmp_path / "s.db")
    measure(
        dit,
        study,
        1,
        protocol=PROTOCOL,
        space={**SPACE, "excluded": excluded(dit)},
        bank=str(tmp_path / "bank"),
    )
    features = study.features()
    for name in KEPT:
        for scheme in SCHEMES:
            if (name, scheme) in features:
                said = [
                    n
                    for n in features[name, scheme].get("notes", [])
                    if n == "H of 64 inputs is kept as its diagonal only"
                ]
                assert len(said) == (name in (DOWN0, DOWN1) and scheme != "usq2"), (name, scheme)
    assert f"{DOWN0} at usq3h: H of 64 inputs is kept as its diagonal only" in study.notes()
    assert f"{DOWN1} at aq1x4g4s: H of 64 inputs is kept as its diagonal only" in study.notes()
    again = Study(tmp_path / "t.db")  # from the bank, without a fit
    measure(
        dit,
        again,
        1,
        protocol=PROTOCOL,
        space={**SPACE, "excluded": excluded(dit)},
        bank=str(tmp_path / "bank"),
    )
    assert again.notes() == study.notes() and again.features() == features


def test_warnings_of_fits_are_notes_not_noise(dit, tmp_path, recwarn) -> None:
    study, space = (
        Study(tmp_path / "s.db"),
        {"schemes": ["usq2", "aq1x8g16"], "calibration": CALIBRATION, "excluded": excluded(dit)},
    )
    measure(dit, study, 1, protocol=PROTOCOL, space=space, bank=str(tmp_path / "bank"))
    noted = {line.split(":")[0] for line in study.notes()}
    assert noted == {f"{n} at aq1x8g16" for n in KEPT} and all("codeword" in line for line in study.notes())
    assert not [w for w in recwarn if "codeword" in str(w.message)]


def test_without_images_calibrated_schemes_are_refused_in_one_sentence(dit, tmp_path) -> None:
    model, space = opened(dit, tmp_path, record=False), space_of(dit)
    before = weights(model)
    model.apply(space.uniform("usq2"))
    for scheme in AWARE:
        with pytest.raises(AquabitError, match="need images to measure H on") as error:
            model.apply(space.config({Q0: space.choice(Q0, scheme, 8)}))
        assert "\n" not in str(error.value) and "without a pipeline" in str(error.value)
    model.apply(space.full_precision())
    assert equal(weights(model), before)
    bare = QuantizedDenoiser(copy.deepcopy(dit.denoiser), trace(dit))
    with pytest.raises(AquabitError, match="without a bank"):
        bare.apply(space.uniform("usq2"))


def test_layers_that_did_not_run_are_named(dit, tmp_path) -> None:
    fitter = opened(dit, tmp_path).fitter
    calls, groups = fitter.calibrator.recorded(CALIBRATION)
    fitter.calibrator._recorded = (CALIBRATION, calls, [g for g in groups if DOWN1 not in g])
    with pytest.raises(AquabitError, match=rf"'{DOWN1}' did not run during calibration") as error:
        fitter.coded(FitRequest(DOWN1, USQ), CALIBRATION)
    assert "\n" not in str(error.value)
    fitter.coded(FitRequest(DOWN0, USQ), CALIBRATION)


@pytest.mark.parametrize("way", ["prepare", "quantize"])
def test_progress_names_layer_and_loss(dit, tmp_path, way: str) -> None:
    config = mixed(space_of(dit)).with_layer(V0, "usq2")
    told: list[tuple[str, int, int]] = []

    def progress(*step: Any) -> None:
        told.append(step)

    model = opened(dit, tmp_path)
    if way == "prepare":
        model.prepare(config, progress)
    else:
        packing.quantize(dit, config, bank=str(tmp_path), progress=progress)
    counts, total = [done for _, done, _ in told], {t for _, _, t in told}
    assert total == {len(KEPT)} and counts == sorted(counts) and counts[-1] == len(KEPT)
    for name, choice in config.layers.items():
        lines = [text for text, _, _ in told if name in text and str(choice.weight) in text]
        assert lines, name
        if choice.weight.calibrated:
            fit = model.fitter.found(FitRequest(name, choice.weight), CALIBRATION)
            assert fit is not None and fit.output is not None
            assert f"quantizing: {name} {choice.weight}, loss {fit.output:.4f}" == lines[-1]
        else:
            assert lines == [f"quantizing: {name} {choice.weight}"]


def test_progress_counts_what_was_asked_for(dit, tmp_path) -> None:
    told: list[tuple[str, int, int]] = []
    opened(dit, tmp_path).prepare(
        QuantConfig("", {}, calibration=CALIBRATION).with_layer(Q0, SHARED, 8),
        lambda *step: told.append(step),
    )
    assert {t for _, _, t in told} == {1} and max(done for _, done, _ in told) == 1, (
        "partners are fitted too, and not counted"
    )


def test_calibration_images_are_made_as_asked(dit) -> None:
    asked = Calibration(images=20, steps=3, seed=5, guidance=2.0, conditions=(7, 3))
    scheduler = dit.scheduler
    calls = recorder(dit)(asked)
    assert len(calls) == 2 * 3 and dit.scheduler is scheduler, "two batches of 10"
    labels = {tuple(kwargs["class_labels"].tolist()) for _, kwargs in calls}
    assert labels == {(*([7, 3] * 5), *[10] * 10)}, "no image is calibrated on twice; guidance doubles them"

    few = Calibration(images=2, steps=3)
    ddim, euler = recorder(dit)(few), recorder(dit)(replace(few, scheduler="euler"))
    assert not torch.equal(ddim[1][0][0], euler[1][0][0]), "what the second step reads depends on the sampler"
    assert len(recorder(dit)(replace(few, steps=4))) == 4
    first, other = (recorder(dit)(Calibration(images=2, steps=1, seed=s))[0][0][0] for s in (1, 2))
    assert not torch.equal(first[0], other[0]) and torch.equal(first[1], other[0]), (
        "image i is made from seed + i"
    )


# ---- end to end


def test_the_default_space_of_a_tiny_model_is_measured(dit, tmp_path) -> None:
    study, told = Study(tmp_path / "s.db"), []
    measure(
        dit,
        study,
        4,
        protocol=PROTOCOL,
        bank=str(tmp_path / "bank"),
        progress=lambda *step: told.append(step),
    )
    space, features = SearchSpace.from_dict(study.get("space")), study.features()
    assert any(s.shared for s in space.schemes) and any(s.output_aware for s in space.schemes)
    assert space.calibration == Calibration.of(PROTOCOL)
    for layer, row in space.choices.items():
        for scheme in (s for s in row if s != FP):
            facts = features[layer, str(scheme)]
            assert 0 <= facts["output"] < 1 and 0 <= facts["error"] < 2 and facts["damage"] >= 0, (
                layer,
                scheme,
            )
        assert features[layer, "usq6h"]["output"] <= features[layer, "usq2h"]["output"] * 1.01, layer
    table = study.measurements(failed=True)
    assert (table.status == "ok").all() and (table.kind == "sample").sum() == 4
    assert {"calibrating"} == {w for w, _, total in told if total == 1 and w.startswith("calib")}
    assert any(text.startswith("fitting: ") and "largest error" in text for text, _, _ in told)
    again = [c for c in study.configs().values() if c.layers]
    model = opened(dit, tmp_path / "bank", record=False)
    for config in again:
        model.apply(config)


def test_h_is_measured_where_it_is_needed_and_once_for_all_schemes_of_a_layer(
    dit, tmp_path, monkeypatch
) -> None:
    asked: list[tuple[set[str], list[int]]] = []

    def watched(model: Any, calls: Any, groups: list[tuple[str, ...]], acts: list[int]) -> Any:
        asked.append(({n for group in groups for n in group}, list(acts)))
        return moments(model, calls, groups, acts)

    monkeypatch.setattr(calibrator, "moments", watched)
    model, other = opened(dit, tmp_path), Scheme.parse("aq2x3g4s")
    model.fitter.fit([FitRequest(n, s) for n in (Q0, V0) for s in (USQ, AQ, SHARED, other)], CALIBRATION)
    v1 = V0.replace("blocks.0", "blocks.1")
    assert asked == [({Q0, V0}, [8]), ({Q0, Q1}, [8]), ({V0, v1}, [8])]
    asked.clear()
    opened(dit, tmp_path / "two").apply(mixed(space_of(dit)))
    assert [layers for layers, _ in asked] == [{Q0, Q1}, {V0, DOWN0, DOWN1}], (
        "a configuration's layers are fitted together"
    )


def test_a_run_replays_the_recorded_calls_a_few_times_whatever_the_number_of_layers(
    dit, tmp_path, monkeypatch
) -> None:
    replayed: list[set[str]] = []

    def watched(model: Any, calls: Any, groups: list[tuple[str, ...]], acts: list[int]) -> Any:
        replayed.append({n for group in groups for n in group})
        return moments(model, calls, groups, acts)

    monkeypatch.setattr(calibrator, "moments", watched)
    study, space = Study(tmp_path / "s.db"), {"schemes": ["usq2h", "usq5h"], "calibration": CALIBRATION}
    measure(dit, study, 0, protocol=PROTOCOL, space=space, bank=str(tmp_path / "bank"))
    layers = SearchSpace.from_dict(study.get("space")).free_layers()
    assert len(replayed) == PARTS < len(layers) / 6, "one worker has so many parts"
    assert set.union(*replayed) >= set(layers) and not set.intersection(*replayed)
    told = {scheme for _, scheme in study.features() if scheme.endswith("h")}
    assert told == {"usq2h", "usq5h"}, "uniform references were fitted while H was there, and nothing more"


def test_what_the_bank_has_of_fits_with_h_is_told_without_h(dit, tmp_path) -> None:
    schemes = {n: [USQ, VQ] for n in (Q0, V0)}
    first = opened(dit, tmp_path).fitter.facts([Q0, V0], schemes, CALIBRATION)
    without = opened(dit, tmp_path, record=False).fitter  # could measure none
    assert without.facts([Q0, V0], schemes, CALIBRATION) == first
    measured = opened(dit, tmp_path).fitter
    known = measured._moments([Q0, V0], CALIBRATION)
    for layer, row in first.items():
        for scheme, value in row.items():
            decoded = measured.coded(FitRequest(layer, Scheme.parse(scheme)), CALIBRATION).dequantize()
            told = output_error(measured.weights[layer], decoded, known[layer].hessian)
            assert value["output"] == told, (layer, scheme)
    mixed_row = {Q0: [USQ, Scheme.parse("usq2")]}  # what is fitted without H needs one to be told
    with pytest.raises(AquabitError, match="calibrated schemes need images"):
        without.facts([Q0], mixed_row, CALIBRATION)
    assert 0 < measured.facts([Q0], mixed_row, CALIBRATION)[Q0]["usq2"]["output"] < 1


def test_images_for_calibration_are_made_once(dit, tmp_path, monkeypatch) -> None:
    made: list[Any] = []
    original = record_calls
    monkeypatch.setattr(
        "aquabit.pipelines.adapter.record_calls", lambda *rest: made.append(rest) or original(*rest)
    )
    model, space = opened(dit, tmp_path), space_of(dit)
    for act in (8, 6):
        model.apply(mixed(space, (act,)))
    assert len(made) == 1
