"""What a model asks of the kernels: its requests, dense copies worth their memory, latency as a cost, and
bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from aquabit import packing
from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.graph import codebook_names
from aquabit.kernels import Request, dispatch
from aquabit.kernels import time_requests as measuring
from aquabit.kernels.backends import BACKENDS
from aquabit.kernels.request import format_of
from aquabit.measuring import latency
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.model import open_model
from aquabit.measuring.pools import InlinePool, ProcessPool
from aquabit.measuring.tasks import Begin, Measure
from aquabit.pipelines import Adapter, load, trace
from aquabit.quant.artifact import load_packed_denoiser
from aquabit.quant.bank import Bank
from aquabit.quant.bench import bench_artifact, bench_formats, decoded_, parse_shape, torch_threads
from aquabit.quant.kernel_tuning import (
    at_scheme,
    example_call,
    format_for,
    layers_of,
    place_,
    requests_of,
    tune,
)
from aquabit.quant.layers import QuantConv2d, QuantLinear, quant_layer, resident_bytes
from aquabit.quant.model import fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import FP, AquabitError, Calibration, Protocol, QuantConfig, Scheme
from aquabit.space import make_space
from tests.conftest import tiny_pipeline

SCHEMES = (
    "usq3",
    "usq8",
    "vq4",
    "vq3c",
    "usq4g8",
    "aq2x4g4",
    "usq3h",
    "aq2x3k",
    "vq3h",
    "usq4g8h",
    "vq2ch",
    "aq1x4g8",
)
PLAIN = {"plain float32": 1e-3, "plain bfloat16": 1e-3}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Times that a function of the request makes up instead of measuring them; call it with that function."""
    monkeypatch.setenv("AQUABIT_TIMINGS", str(tmp_path / "timings"))
    dispatch.forget()

    def set_(times: Callable[[Request], dict[str, float]]) -> None:
        monkeypatch.setattr(
            measuring,
            "measure",
            lambda r: {"full": 1e-6} if r.format.tables == "none" else {**PLAIN, **times(r)},
        )

    yield set_
    dispatch.forget()


def packed(pipe, tmp_path: Path, *schemes: str, act: int = 8):
    space = make_space(trace(pipe), fingerprint(pipe.denoiser))
    config = space.uniform(schemes[0], act)
    for i, name in enumerate(space.layers):
        config = config.with_layer(name, schemes[i % len(schemes)])
    return packing.quantize(pipe, config, bank=str(tmp_path / "bank"))


@pytest.mark.parametrize("shape", [(16, 24), (16, 8, 3, 3), (16, 24, 1, 1), (6, 7)], ids=str)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_format_of_a_scheme_is_that_of_its_fits(text: str, shape: tuple[int, ...]) -> None:
    scheme = Scheme.parse(text)
    fitted = quantize_weight(
        torch.randn(shape), scheme, torch.eye(prod(shape[1:])) if scheme.calibrated else None
    )
    assert format_for(scheme, shape) == format_of(fitted)


def test_requests_are_those_of_the_forward_in_both_modes(pipe, tmp_path) -> None:
    made = packed(pipe, tmp_path, "usq4", "vq3", "usq3g8")
    call, layers = example_call(made.pipe.denoiser), made.model.layers
    asked, seen = requests_of(layers, call), []
    with dispatch.observed(lambda weight, request, _: seen.append((id(weight), request.key))):
        call()
    names = {id(layer.packed): name for name, layer in layers.items()}
    assert sorted((names[w], key) for w, key in seen) == sorted(
        (n, r.key) for n, row in asked.items() for r, k in row.items() for _ in range(k)
    )
    fresh = {
        name: quant_layer(pipe.denoiser.get_submodule(name), layer.split) for name, layer in layers.items()
    }
    for name, layer in fresh.items():
        owner, _, leaf = name.rpartition(".")
        setattr(pipe.denoiser.get_submodule(owner), leaf, layer)
    dense = requests_of(fresh, example_call(pipe.denoiser))
    for name, layer in layers.items():
        again = {at_scheme(r, layer.scheme, layer.act).key: k for r, k in dense[name].items()}
        assert again == {r.key: k for r, k in asked[name].items()}, name


def test_copies_save_most_time_per_byte_within_a_quarter(pipe, tmp_path, timed) -> None:
    gains = {}

    def times(request: Request) -> dict[str, float]:
        gain = gains.setdefault(request.key, len(gains) % 5 * 1e-3)  # one in five gains nothing
        return {"reference": 2e-3 + gain, "dense": 2e-3}

    timed(times)
    made = packed(pipe, tmp_path, "usq4", "vq3", act=16)
    layers, call = made.model.layers, example_call(made.pipe.denoiser)
    none = place_(layers, call)
    before = call().sample
    assert (
        none.copies == ()
        and none.backends == {"reference": len(layers)}
        and none.resident == resident_bytes(layers.values())
    )
    some = place_(layers, call, "auto")
    size = {n: 4 * prod(layer.shape) for n, layer in layers.items()}
    asked = tune(layers, call)
    worth = {n: sum(gains[r.key] * k for r, k in row.items()) / size[n] for n, row in asked.items()}
    spent = sum(size[n] for n in some.copies)
    assert 0 < spent <= sum(size.values()) / 4 and some.dense == sum(size.values())
    assert some.resident == none.resident + spent == resident_bytes(layers.values())
    assert all(worth[n] > 0 for n in some.copies)
    left = [n for n in layers if n not in some.copies and worth[n] > max(worth[m] for m in some.copies)]
    assert all(size[n] > sum(size.values()) / 4 for n in left), "what is worth more and has room is kept"
    assert some.backends == {
        k: v for k, v in (("reference", len(layers) - len(some.copies)), ("dense", len(some.copies))) if v
    }
    torch.testing.assert_close(call().sample, before, rtol=0, atol=1e-4)
    assert place_(layers, call, "packed") == none, "copies are dropped again"
    assert none.slower == len(some.copies) + some.slower > len(some.copies), "no room for all"


def test_no_copy_is_kept_where_coded_kernels_are_as_fast(dit, tmp_path, timed) -> None:
    timed(lambda r: {"reference": 1e-3, "dense": 0.99e-3})
    made = packed(dit, tmp_path, "usq4")
    found = place_(made.model.layers, example_call(made.pipe.denoiser), "auto")
    assert (found.copies, found.slower) == ((), 0)
    with pytest.raises(AquabitError, match="memory 'huge' is unknown; it must be packed or auto"):
        place_(made.model.layers, example_call(made.pipe.denoiser), "huge")


def test_generate_tells_what_ran_and_gives_the_same_images(dit, tmp_path, timed) -> None:
    timed(lambda r: {"reference": 2e-3, "dense": 1e-3})
    packed(dit, tmp_path, "usq4", "vq3", act=16).save(tmp_path / "packed")
    told = []
    small = packing.generate(str(tmp_path / "packed"), images=3, steps=2, told=told.append)
    large = packing.generate(str(tmp_path / "packed"), images=3, steps=2, memory="auto", told=told.append)
    torch.testing.assert_close(small, large, rtol=0, atol=1e-4)
    assert told[0].copies == () and told[1].copies and told[1].resident > told[0].resident
    assert packing.generate(dit, images=2, steps=1, told=told.append).shape[0] == 2 and len(told) == 2, (
        "a dense pipeline has no kernels"
    )
    with pytest.raises(AquabitError, match="memory 'all'"):
        packing.generate(str(tmp_path / "packed"), images=2, steps=1, memory="all")


def test_the_first_call_is_one_call_of_the_micro_batch(pipe) -> None:
    protocol = Protocol(images=3, steps=5, micro_batch=4, guidance=2.0)
    shapes: list[int] = []
    handle = pipe.denoiser.register_forward_pre_hook(
        lambda _, args, kw: shapes.append(len(args[0])), with_kwargs=True
    )
    call = Adapter(pipe).first_call(protocol)
    call()
    call()
    assert shapes == [8, 8, 8]
    handle.remove()
    assert not pipe.denoiser._forward_pre_hooks


# ---- latency as a cost


@pytest.fixture
def evaluator(dit, tmp_path) -> Evaluator:
    model = open_model(dit)
    return Evaluator(dit, model.graph, Bank(tmp_path / "bank"), model.fingerprint)


def test_a_configuration_costs_what_its_kernels_take(dit, evaluator, timed) -> None:
    timed(
        lambda r: {
            "reference": (r.format.bits + (r.act >= 16)) * r.multiply_adds * 1e-12 + 1e-6,
            "dense": 1e-9,
        }
    )
    space = make_space(
        trace(dit),
        evaluator.fingerprint,
        schemes=["usq2", "usq4", "vq3"],
        activations=[16, 8],
        excluded=["proj_out_2"],
    )
    table = latency.latency_table(evaluator, space)
    assert table.activations == (16, 8) and table.rest >= 0
    allowed = space.allowed()
    free = np.array([row != (FP,) for row in space.choices.values()])
    assert (np.isfinite(table.layers).all(2) == (allowed & free[:, None])).all() and np.isnan(
        table.layers[allowed & ~free[:, None], 1]
    ).all()
    costs = CostModel(trace(dit), space).timed(table)
    for config in space.sample(3, 1):
        with evaluator.packed(config) as model:
            asked = tune(model.layers, example_call(model.denoiser))
        times = dispatch.machine_timings().entries
        expected = 1e3 * sum(
            k * (times[r.key].get("full") or times[r.key]["reference"])
            for row in asked.values()
            for r, k in row.items()
        )
        assert costs.totals(Choices.of(space, [config]))["latency_ms"][0] == pytest.approx(
            expected + table.rest
        )
    assert all(layer.packed is None for layer in evaluator.quantized.layers.values()), "dense again"


def test_whole_calls_are_measured_packed(dit, evaluator) -> None:
    space = make_space(trace(dit), evaluator.fingerprint, schemes=["usq2", "usq4"])
    seen = []
    with dispatch.observed(lambda weight, *_: seen.append(weight)):
        found = latency.packed_latencies(evaluator, [space.uniform("usq4"), space.full_precision()])
    assert seen and all(0 < ms < 1e4 for ms in found)


def test_packed_measurements_do_not_depend_on_timings_or_workers(dit, tmp_path, timed) -> None:
    model = open_model(dit)
    names = codebook_names(model.graph)
    space = make_space(model.graph, model.fingerprint, calibration=Calibration(images=4, steps=2))
    config = space.uniform("usq3").with_layer(next(iter(names)), "vq4")
    protocol = Protocol(images=6, steps=2, micro_batch=4)
    tasks = [Measure(config, protocol.block(b), packed=True) for b in (0, 1)]
    bank = Bank(tmp_path / "bank")

    def results(pool) -> dict[str, dict[str, float]]:
        return {m.protocol: dict(m.metrics) for _, (m, _) in pool.run(tasks)}

    inline = Evaluator(dit, model.graph, bank, model.fingerprint)
    ran = []
    with dispatch.observed(lambda _, request, name: ran.append((request.threads, name))):
        one = results(InlinePool(inline))
    assert {t for t, _ in ran} == {1} and inline.quantized.layers[space.layers[0]].packed is None
    measured = inline.measure(config, protocol, packed=True)[0]
    assert measured.environment["weights"] == "packed" and dict(measured.metrics) == one[protocol.digest]
    dense = inline.measure(config, protocol, packed=False)[0]
    assert dense.environment["weights"] == "decoded" and dense.metrics["fid"] == pytest.approx(
        one[protocol.digest]["fid"], rel=1e-2
    )
    timed(lambda r: {b.name: 1.0 for b in BACKENDS})  # other timings, same images
    assert results(InlinePool(inline)) == one
    dit.save_pretrained(tmp_path / "pipe")
    from aquabit.graph import to_json

    begin = Begin(str(tmp_path / "pipe"), to_json(model.graph), str(bank.folder), model.fingerprint)
    pool = ProcessPool(2, begin)
    try:
        assert results(pool) == one
    finally:
        pool.close()


@pytest.mark.parametrize("integers", [True, False])
def test_measured_packed_where_integers_meet_on_all_layers(dit, evaluator, monkeypatch, integers) -> None:
    """By default; and a measurement that names a way takes it."""
    from aquabit.measuring import evaluator as module

    monkeypatch.setattr(module, "multiplies_integers", lambda: integers)
    space = make_space(trace(dit), evaluator.fingerprint)
    protocol = Protocol(images=4, steps=2, micro_batch=4)
    rounded = space.uniform("usq3", act=8)
    dense = rounded.with_layer(space.layers[0], "fp", 16)  # weights as they are: dense either way
    some = rounded.with_layer(space.layers[0], "usq3", 16)
    floats = rounded.with_layer(space.layers[0], "usq3", "f8")

    def way(config, packed=None) -> str:
        return evaluator.measure(config, protocol, packed)[0].environment["weights"]

    assert [way(c) for c in (rounded, dense)] == ["packed" if integers else "decoded"] * 2
    others = (some, floats, space.full_precision())
    assert [way(c) for c in others] == ["decoded"] * 3
    assert way(rounded, False) == "decoded" and way(some, True) == "packed"
    both = [evaluator.measure(rounded, protocol, p)[0].metrics["psnr"] for p in (False, True)]
    assert both[0] == pytest.approx(both[1], abs=0.3)


def test_fitting_goes_on_after_a_packed_measurement(dit, tmp_path) -> None:
    model = open_model(dit)
    inline = Evaluator(dit, model.graph, Bank(tmp_path / "bank"), model.fingerprint)
    layer = next(iter(inline.quantized.layers))
    config = QuantConfig(model.fingerprint, {}, calibration=Calibration(images=4, steps=2)).with_layer(
        layer, "usq3h", 8
    )
    protocol = Protocol(images=4, steps=2, micro_batch=4)
    for scheme in ("usq3h", "usq2h"):
        inline.measure(config.with_layer(layer, scheme, 8), protocol, packed=True)
    other = config.with_layer(list(inline.quantized.layers)[3], "usq2h", 6)
    assert inline.measure(other, protocol)[0].status == "ok"


# ---- bench


def test_bench_times_formats_at_shapes() -> None:
    rows = bench_formats("usq4, vq3c,aq2x3k", "12x16@5,6x4x3x3@8x7", 16)
    assert [(r.shape, r.format) for r in rows] == [
        ("12x16@5", "usq4"),
        ("12x16@5", "vq3c"),
        ("6x4x3x3@8x7", "usq4"),
        ("6x4x3x3@8x7", "vq3c"),
        ("6x4x3x3@8x7", "aq2x3k"),
    ]
    for r in rows:
        plain = json.loads(json.dumps(r.to_dict()))
        assert (
            plain["best"] == min(plain["milliseconds"], key=plain["milliseconds"].get)
            and "reference" in plain["milliseconds"]
        )
        assert plain["ratio"]["float32"] == pytest.approx(
            plain["dense"]["float32"] / plain["milliseconds"][plain["best"]]
        )
        assert plain["machine"]["threads"] == str(torch.get_num_threads())
    with torch_threads(2) as count:
        assert count == torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "text",
    [
        "12x16",
        "12@4",
        "0x4@4",
        "12x16@4x4",
        "12x16x3@4",
        "axb@c",
        "",
        "4x4@99999999",
        "4x4@" + "9" * 5000,
        "٣x4@4",
    ],
)
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(AquabitError, match="must be OUTxIN@TOKENS"):
        parse_shape(text, Scheme.parse("usq4"))


def test_formats_that_are_none() -> None:
    for formats in ("fp", "aq2x3k"):
        with pytest.raises(AquabitError, match="formats of bench are coded ones"):
            bench_formats(formats, "12x16@5")


def test_bench_compares_whole_denoisers(tmp_path, timed) -> None:
    timed(lambda r: {"reference": 2e-3, "dense": 1e-3})
    pipe = tiny_pipeline("dit")
    packed(pipe, tmp_path, "usq4").save(tmp_path / "packed")
    rows = {r.name: r for r in bench_artifact(tmp_path / "packed")}
    assert list(rows) == ["packed, memory=packed", "packed, memory=auto", "dense float32", "dense bfloat16"]
    assert all(r.milliseconds > 0 for r in rows.values())
    assert (
        rows["packed, memory=packed"].resident
        < rows["packed, memory=auto"].resident
        < rows["dense float32"].resident
    )
    assert set(rows["packed, memory=packed"].backends) == {"reference"} and set(
        rows["dense bfloat16"].backends
    ) == {"full"}
    with pytest.raises(AquabitError, match="holds no packed denoiser"):
        bench_artifact(tmp_path)
    with pytest.raises(AquabitError, match="'float16' is not timed"):
        bench_artifact(tmp_path / "packed", "float16")


def test_the_dense_model_of_an_artifact_has_its_weights(dit, tmp_path) -> None:
    packed(dit, tmp_path, "usq4", act=16).save(tmp_path / "packed")
    dense = decoded_(load_packed_denoiser(tmp_path / "packed" / "denoiser"), torch.float32)
    coded = load(str(tmp_path / "packed")).denoiser
    assert all(
        isinstance(m, QuantLinear | QuantConv2d) and m.packed is None for m in layers_of(dense).values()
    )
    for layer in layers_of(coded).values():
        layer.accuracy = "exact"
    torch.testing.assert_close(example_call(dense)().sample, example_call(coded)().sample, rtol=0, atol=1e-4)
