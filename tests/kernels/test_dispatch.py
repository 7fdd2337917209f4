"""Dispatch: what is chosen and why, with stand-ins for kernels; the table of timings; the public functions
against float64."""

from __future__ import annotations

import copy
import gc
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from aquabit import quantize_weight
from aquabit.kernels import CodebookWeight, codebook_conv2d, codebook_linear, dispatch, fake_quantize, timings
from aquabit.kernels import time_requests as measuring
from aquabit.kernels.arranged import Arranged, arrange
from aquabit.kernels.backends import BACKENDS, Backend
from aquabit.kernels.backends.reference import decoded
from aquabit.kernels.dispatch import held, observed, select, serving, static_order, using
from aquabit.kernels.geometry import Geometry
from aquabit.kernels.registry import weight_at
from aquabit.kernels.request import Format, Request, bucket, empty_like, format_of
from aquabit.kernels.time_requests import measure, random_weight
from aquabit.kernels.timings import Timings
from aquabit.quant.kernel_tuning import format_for
from aquabit.scheme import AquabitError, Rounding, Scheme

USQ = Format((24, 16), 4, 1, 1, "inputs", "uniform", 1, True)
AQ = Format((24, 16), 4, 2, 8, "inputs", "shared", 1, False)
PER_ROW = Format((24, 16), 3, 1, 1, "inputs", "channel", None, False)
WIDE = Format((24, 16), 12, 1, 8, "inputs", "shared", 1, False, "codes of 12 bits do not fit a byte")
CONV = Format((6, 4, 3, 3), 3, 1, 9, "kernel", "shared", 1, False)
FORMATS = (USQ, AQ, PER_ROW, WIDE, replace(USQ, scales=2), CONV, replace(USQ, shape=(6, 4, 3, 3)))


def stand_in(name: str, log: list[tuple[str, Tensor]], quantizes: bool = False) -> Backend:
    """A kernel that serves all on a CPU but codes of more than 8 bits; it runs the reference and tells
    ``log`` what it was given."""
    real = next(b for b in BACKENDS if b.name == "reference")

    def refuses(request: Request) -> str | None:
        return request.format.unarranged or ("it is for the CPU" if request.device != "cpu" else None)

    def linear(x, weight, bias, request, dense):
        log.append((name, x))
        return real.linear(fake_quantize(x, request.act) if quantizes else x, weight, bias, request, dense)

    def conv2d(x, weight, bias, request, dense):
        log.append((name, x))
        return real.conv2d(
            fake_quantize(x, request.act, "sample", request.split) if quantizes else x,
            weight,
            bias,
            request,
            dense,
        )

    return Backend(name, "a stand-in", refuses, linear, conv2d, quantizes)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch):
    """Dispatch with stand-ins for lut and decode, and no timings; yields what they were given."""
    given: list[tuple[str, Tensor]] = []
    fakes = {"lut": stand_in("lut", given), "decode": stand_in("decode", given, quantizes=True)}
    own = tuple(fakes.get(b.name, b) for b in BACKENDS)
    for module in (dispatch, measuring):
        monkeypatch.setattr(module, "BACKENDS", own)
    with using({}):
        yield given


def request(form: Format = AQ, **options) -> Request:
    kind = "linear" if len(form.shape) == 2 else "conv2d"
    size = {} if kind == "linear" else {"size": (8, 8), "geometry": Geometry(padding=(1, 1))}
    return Request(kind, form, 16, **{**size, **options})


# ---- the choice


def test_without_measurements_the_documented_order_counts(log) -> None:
    assert select(request(AQ), {}) == "lut"
    assert select(request(AQ, act=8), {}) == "lut"
    assert select(request(USQ), {}) == select(request(USQ, act=8), {}) == "decode"
    narrow = request(replace(USQ, bits=3))
    assert select(narrow, {}) == "lut"
    assert select(replace(narrow, act=8), {}) == select(replace(narrow, rows=2), {}) == "decode"
    assert select(request(replace(USQ, bits=3, scales=4)), {}) == "decode", "its sums end with each group"
    assert select(request(replace(USQ, bits=3, shape=(6, 4, 3, 3))), {}) == "decode"
    assert select(request(USQ, act=8, dense=True), {}) == "dense"
    assert select(request(WIDE), {}) == "reference"
    assert all(set(static_order(request(f))) == {b.name for b in BACKENDS} for f in FORMATS)


def test_the_fastest_measured_one_that_can_serve_wins(log) -> None:
    r = request(USQ, act=8)
    assert select(r, {r.key: {"lut": 2.0, "decode": 1.0, "reference": 9.0}}) == "decode"
    assert (
        select(r, {r.key: {"lut": 1.0, "decode": 2.0, "triton": 0.1, "dense": 0.1, "plain float32": 0.01}})
        == "lut"
    )
    assert select(replace(r, dense=True), {r.key: {"lut": 1.0, "dense": 0.1}}) == "dense"
    assert select(replace(r, dense=True), {r.key: {"lut": 1.0, "dense": 1.1}}) == "lut"
    assert select(r, {r.key: {"lut": 1.0, "decode": 1.0}}) == "decode", (
        "of equally fast ones the first in the static order"
    )
    assert select(r, {request(AQ).key: {"reference": 1e-9}}) == "decode", (
        "times of another request say nothing"
    )


@given(
    st.dictionaries(st.sampled_from(["lut", "decode", "dense", "triton", "reference"]), st.floats(1e-6, 1.0)),
    st.sampled_from(FORMATS),
)
def test_what_is_chosen_can_always_serve(times: dict[str, float], form: Format) -> None:
    for r in (
        request(form),
        request(form, act=8, dense=True),
        request(form, device="cuda"),
        request(form, dtype="float16", gradient=True),
    ):
        chosen = select(r, {r.key: times})
        can = serving(r)
        assert can[chosen] is None and can["reference"] is None
        assert (
            all(times[chosen] <= t for name, t in times.items() if can[name] is None)
            if chosen in times
            else True
        )
        assert select(r, {r.key: times}) == chosen == select(r, {r.key: times}, chosen)


def test_a_backend_that_cannot_serve_says_why_and_which_can(log) -> None:
    with pytest.raises(
        AquabitError,
        match=r"'lut' cannot run linear 24x16 .*12 bits do not fit a byte; these can: reference$",
    ):
        select(request(WIDE), {}, "lut")
    with pytest.raises(AquabitError, match=r"'triton' cannot run .* these can: lut, decode, reference$"):
        select(request(AQ), {}, "triton")
    with pytest.raises(AquabitError, match=r"'dense' cannot run .*no dense copy"):
        select(request(AQ), {}, "dense")
    with pytest.raises(
        AquabitError, match=r"'magic' is unknown; known: dense, triton, triton_int8, lut, decode, reference"
    ):
        select(request(AQ), {}, "magic")
    weight = random_weight(WIDE)
    with pytest.raises(AquabitError, match="these can: reference"):
        codebook_linear(torch.randn(2, 16), weight, backend="decode")


def test_kernels_without_gradients_are_not_asked_for_any() -> None:
    for b in BACKENDS:
        if b.name not in ("dense", "reference"):
            assert b.refuses(request(AQ, gradient=True)), b.name
    x = torch.randn(3, 16, requires_grad=True)
    codebook_linear(x, random_weight(AQ)).sum().backward()
    expected = random_weight(AQ).dequantize().sum(0)
    torch.testing.assert_close(x.grad, expected.expand(3, 16))


def test_keys_tell_what_takes_another_time_apart_and_nothing_else() -> None:
    r = request(CONV, act=8)
    others = [
        request(replace(CONV, bits=4)),
        replace(r, rows=32),
        replace(r, size=(8, 9)),
        replace(r, geometry=Geometry((2, 2), (1, 1))),
        replace(r, geometry=Geometry(padding=(0, 1))),
        replace(r, geometry=Geometry(padding=(1, 1), dilation=(2, 2))),
        replace(r, geometry=Geometry(padding=(1, 1), groups=2)),
        replace(r, act=16),
        replace(r, act="i8"),
        replace(r, act="f8"),
        replace(r, split=2),
        replace(r, accuracy="exact"),
        replace(r, dtype="bfloat16"),
        replace(r, device="cuda"),
    ]
    assert len({r.key, *(o.key for o in others)}) == len(others) + 1
    assert {replace(r, act=6).key, replace(r, dense=True).key, replace(r, gradient=True).key} == {r.key}
    assert len({request(f).key for f in FORMATS}) == len(FORMATS)


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_buckets_are_powers_of_two_nearby(rows: int, pixels: int) -> None:
    found = bucket(rows, pixels)
    assert found & (found - 1) == 0 and found >= 1
    assert found * pixels <= 4096 or found == 1
    if rows * pixels <= 2048:
        assert 0.7 < found / rows < 1.42
    assert bucket(found, pixels) == found


# ---- weights


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_facts_of_a_weight_survive_its_arrangement(form: Format) -> None:
    weight = random_weight(form)
    assert format_of(weight) == form == format_of(empty_like(form))
    for name in (
        ("shape", "span", "width", "segments", "scalar", "channels")
        if form.unarranged is None
        else ("shape", "groups")
    ):
        assert getattr(empty_like(form), name) == getattr(held(weight), name), (
            "what has no numbers is otherwise the same"
        )
    assert (form.unarranged is None) == isinstance(held(weight), Arranged)
    assert format_of(held(weight)) == form
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)):
        assert torch.equal(decoded(held(weight), like), weight.dequantize().to(like.dtype))
    assert not isinstance(held(weight), Arranged) or torch.equal(held(weight).restore().packed, weight.packed)


def test_a_weight_is_arranged_once_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    monkeypatch.setattr(dispatch, "arrange", lambda w: count.append(1) or arrange(w))
    weight, x = random_weight(AQ), torch.randn(5, 16)
    first = codebook_linear(x, weight)
    assert torch.equal(codebook_linear(x, weight), first) and count == [1]
    before = len(dispatch._arranged)
    del weight
    gc.collect()
    assert len(dispatch._arranged) == before - 1


def test_shared_codebooks_stay_one_tensor() -> None:
    one = random_weight(AQ)
    other = replace(random_weight(AQ, seed=1), codebooks=one.codebooks)
    a, b = held(one), held(other)
    assert a.tables is b.tables and a.stored.codebooks is b.stored.codebooks


# ---- the functions


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("act", [16, 8, 6, "i8", "f8"])
@pytest.mark.parametrize("backend", ["reference", "lut", "decode", None])
@pytest.mark.parametrize("form", [f for f in FORMATS if len(f.shape) == 2 and f is not WIDE], ids=str)
def test_linear_equals_rounding_and_a_float64_product(
    log, form: Format, backend: str | None, act: Rounding
) -> None:
    weight, bias, x = random_weight(form), torch.randn(24), torch.randn(2, 7, 16)
    exact = functional.linear(fake_quantize(x, act).double(), weight.dequantize().double(), bias.double())
    for w in (weight, held(weight)):
        assert relative(codebook_linear(x, w, bias, backend=backend, act=act), exact) < 1e-6
    for name, seen in log:
        rounded = fake_quantize(x, act)
        assert torch.equal(seen, x if name == "decode" else rounded), "who rounds by itself gets x as it is"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": (2, 1), "dilation": (1, 2)},
        {"groups": 2},
        {"split": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "lut", "decode"])
def test_convolution_equals_rounding_and_a_float64_product(log, options: dict, backend: str) -> None:
    options = dict(options)
    groups, split = options.get("groups", 1), options.pop("split", None)
    for kernel in ((3, 3), (2, 4), (1, 1)):
        weight = random_weight(replace(USQ, shape=(6, 4 // groups, *kernel)))
        bias, x = torch.randn(6), torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last)
        rounded = fake_quantize(x, 8, "sample", split).double()
        exact = functional.conv2d(rounded, weight.dequantize().double(), bias.double(), **options)
        y = codebook_conv2d(x, weight, bias, **options, backend=backend, act=8, split=split)
        assert y.shape == exact.shape and relative(y, exact) < 1e-6
        single = codebook_conv2d(x[1], weight, bias, **options, backend=backend, act=8, split=split)
        assert relative(single, exact[1]) < 1e-6


def test_empty_inputs_and_dense_copies(log) -> None:
    weight = random_weight(USQ)
    assert codebook_linear(torch.randn(0, 16), weight, act=8).shape == (0, 24) and not log
    x, other = torch.randn(3, 16), torch.randn(24, 16)
    assert torch.equal(codebook_linear(x, weight, dense=other), functional.linear(x, other)), (
        "a kept copy is used"
    )
    seen = []
    with observed(lambda *call: seen.append(call)):
        codebook_linear(x, weight, dense=other)
        codebook_linear(x, weight)
    assert [s[2] for s in seen] == ["dense", "decode"] and seen[0][1].key == seen[1][1].key


def test_bad_arguments_name_the_value() -> None:
    linear, conv = random_weight(USQ), random_weight(CONV)
    cases = {
        "accuracy 'best' is unknown": lambda: codebook_linear(torch.randn(2, 16), linear, accuracy="best"),
        "the input has 15 channels": lambda: codebook_linear(torch.randn(2, 15), linear),
        r"shape \[6, 4, 3, 3\] does not fit": lambda: codebook_linear(torch.randn(2, 4), conv),
        r"shape \[2, 4\] does not fit a convolution": lambda: codebook_conv2d(torch.randn(2, 4), conv),
        "the input has 5 channels": lambda: codebook_conv2d(torch.randn(2, 5, 8, 8), conv),
        "4 groups do not divide": lambda: codebook_conv2d(torch.randn(2, 16, 8, 8), conv, groups=4),
        "padding 'around' with stride": lambda: codebook_conv2d(
            torch.randn(2, 4, 8, 8), conv, padding="around"
        ),
        "the input is on meta": lambda: codebook_linear(torch.randn(2, 16, device="meta"), linear),
    }
    for message, call in cases.items():
        with pytest.raises(AquabitError, match=message):
            call()


def test_a_copy_of_a_weight_that_cannot_be_arranged_has_a_number_of_its_own() -> None:
    weight = held(random_weight(WIDE))
    other = copy.copy(weight)
    assert held(other) is other and held(weight) is weight and isinstance(other, CodebookWeight)
    numbers = [vars(w)["number"] for w in (weight, other)]
    assert numbers[0] != numbers[1] and [weight_at(n) for n in numbers] == [weight, other]


# ---- timings


def test_the_table_is_kept_merged_and_read_again(tmp_path: Path) -> None:
    one, other = Timings(1, tmp_path), Timings(1, tmp_path)
    one.add({"a": {"lut": 1.0}})
    other.add({"a": {"lut": 5.0, "decode": 2.0}, "b": {"lut": 3.0}})
    assert (
        Timings(1, tmp_path).entries == other.entries == {"a": {"lut": 1.0, "decode": 2.0}, "b": {"lut": 3.0}}
    ), "the first time stays"
    assert Timings(2, tmp_path).entries == {} and Timings(2, tmp_path).path != one.path
    assert one.missing(["b", "a", "b"]) == ["b"] and [p.suffix for p in sorted(tmp_path.iterdir())] == [
        ".json",
        ".lock",
    ]
    with pytest.raises(AquabitError, match="positive seconds"):
        one.add({"c": {"lut": -1.0}})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"entries": 3}',
        '{"entries": {"a": {"lut": "fast"}}}',
        '{"entries": {"a": {"lut": -1}}}',
        "\x00",
    ],
)
def test_a_damaged_table_is_measured_anew_with_one_warning(tmp_path: Path, text: str) -> None:
    path = Timings(1, tmp_path).path
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="measured anew") as said:
        table = Timings(1, tmp_path)
    assert table.entries == {} and len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.add({"a": {"lut": 1.0}})
        assert Timings(1, tmp_path).entries == {"a": {"lut": 1.0}}
    assert json.loads(path.read_text())["machine"]["threads"] == "1"


def test_a_folder_that_cannot_be_written_serves_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = Timings(1, tmp_path / "file" / "inside")
    with pytest.warns(RuntimeWarning, match="are not kept, and serve this process only"):
        table.add({"a": {"lut": 1.0}})
    assert table.entries == {"a": {"lut": 1.0}}


def test_other_machines_have_other_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Timings(1, tmp_path).path
    monkeypatch.setattr(timings, "_extension", lambda: "another build")
    assert Timings(1, tmp_path).path != here
    assert {"cpu", "level", "threads", "extension"} <= set(timings.machine(1)) and all(
        timings.machine(1)[k] for k in ("cpu", "level")
    )


def test_measuring_times_all_that_can_serve_and_the_dense_layers(log) -> None:
    for form in (USQ, CONV):
        found = measure(request(form, act=8), (3, 4), 0.0)
        assert set(found) == {"lut", "decode", "reference", "dense", "plain float32", "plain bfloat16"}
        assert all(0 < v < 1 for v in found.values())
    assert set(measure(request(replace(WIDE, tables="none", unarranged="it is not coded")), (1, 1))) == {
        "full"
    }


def test_measured_times_are_kept_and_used(log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUABIT_TIMINGS", str(tmp_path))
    dispatch.forget()
    lut = next(b for b in dispatch.BACKENDS if b.name == "lut")
    slow = replace(lut, linear=lambda *call: (time.sleep(0.01), lut.linear(*call))[1])
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(slow if b is lut else b for b in dispatch.BACKENDS))
    weight, x = random_weight(AQ), torch.randn(16, 16)

    def chosen() -> tuple[Request, str]:
        seen: list[tuple[Request, str]] = []
        with observed(lambda _, r, name: seen.append((r, name))):
            codebook_linear(x, weight)
        return seen[0]

    token = dispatch._choices.set(dispatch._by_machine)
    try:
        first = chosen()
        assert first[1] == "lut" and not list(tmp_path.iterdir()), "a forward never measures"
        measuring.measure_missing([first[0]])
        tuned = chosen()
        dispatch.forget()
        assert tuned[0] == first[0] and tuned[1] != "lut" and chosen() == tuned
        assert len(list(tmp_path.glob("*.json"))) == 1
        with using({}):
            assert chosen() == first
    finally:
        dispatch._choices.reset(token)
        dispatch.forget()


@pytest.mark.parametrize("act", [8, "i8", "f8"])
@pytest.mark.parametrize("form", [USQ, CONV, WIDE], ids=str)
def test_compiled_layers_have_no_graph_breaks_and_choose_as_they_run(
    log, form: Format, act: Rounding
) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = held(random_weight(form))

        def forward(self, x: Tensor) -> Tensor:
            if form is CONV:
                return codebook_conv2d(x, self.held, None, 2, 1, act=act, split=1) * 2
            return codebook_linear(x, self.held, act=act) * 2

    torch._dynamo.reset()  # it counts what it has compiled of one function
    layer, x = Layer(), torch.randn(2, 4, 8, 8) if form is CONV else torch.randn(5, 16)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    log.clear()
    torch.testing.assert_close(compiled(x), expected)
    assert len(log) == (form is not WIDE)
    other = torch.cat([x, x, x])
    torch.testing.assert_close(compiled(other), layer(other))


def test_the_weight_type_is_public() -> None:
    assert isinstance(random_weight(USQ), CodebookWeight)


def test_levels_of_formats_are_timed_as_they_are() -> None:
    """Which of them are whole numbers decides which kernel is fastest."""
    schemes = ("mxfp4", "iq4_nl", "nf4g64", "int4g32", "usq4g32", "q4_K")
    weights = {s: quantize_weight(torch.randn(8, 256), s) for s in schemes}
    forms = {s: format_of(w) for s, w in weights.items()}
    assert len({str(f) for f in forms.values()}) == len(schemes) - 1  # q4_K is arranged as usq4g32 is
    for scheme, form in forms.items():
        assert form == format_for(Scheme.parse(scheme), (8, 256)) == format_of(held(weights[scheme]))
        made = random_weight(form)
        assert made.levels == weights[scheme].levels and made.dequantize().isfinite().all()
        assert format_of(made) == form
