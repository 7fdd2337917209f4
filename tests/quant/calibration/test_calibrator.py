"""Second moments of layer inputs: against numpy, layer by layer; which calls are recorded; which layers
share an input."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

from aquabit.pipelines import Adapter, trace
from aquabit.quant.calibration import moments as moments_module
from aquabit.quant.calibration.hessian import DAMPING, check_hessian
from aquabit.quant.calibration.input_groups import input_groups
from aquabit.quant.calibration.moments import moments, portions, shared_out
from aquabit.quant.calibration.recording import record_calls
from aquabit.quant.model import QuantizedDenoiser
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, Protocol, QuantConfig, Scheme

PROTOCOL = Protocol(images=8, steps=4, micro_batch=4)
TO_Q, TO_OUT, PROJ = (
    "transformer_blocks.1.attn1.to_q",
    "transformer_blocks.1.attn1.to_out.0",
    "transformer_blocks.1.ff.net.2",
)


def runs(pipe, protocol: Protocol = PROTOCOL) -> list:
    adapter = Adapter(pipe)
    return [lambda batch=batch: adapter.images(protocol, batch) for batch in adapter.batches(protocol)]


def recorded(pipe, limit: int = 100) -> tuple[QuantizedDenoiser, list]:
    model = QuantizedDenoiser(pipe.denoiser, trace(pipe))
    return model, record_calls(model.denoiser, runs(pipe), limit)


def inputs_of(model: QuantizedDenoiser, calls: list, name: str) -> list[np.ndarray]:
    """What one layer reads in each call, by a hook of this test's own."""
    found = []
    handle = model.layers[name].register_forward_pre_hook(
        lambda _, args: found.append(args[0].numpy().copy())
    )
    with torch.no_grad():
        for args, kwargs in calls:
            model.denoiser(*args, **kwargs)
    handle.remove()
    return found


def damped(h: np.ndarray) -> np.ndarray:
    return h + DAMPING * np.trace(h) / len(h) * np.eye(len(h))


def grid(values: np.ndarray, bits: int, zero: bool) -> np.ndarray:
    """One range of values on its grid; float32 as the kernels are, so that no value falls to another grid
    point."""
    low, high = values.min(), values.max()
    if zero:
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
    levels = np.float32(2**bits - 1)
    scale = (high * np.float32(0.5) - low * np.float32(0.5)) / (levels * np.float32(0.5))
    inverse = np.float32(1) / scale
    start = np.round(-low * inverse)
    return np.clip(np.round(values * inverse), -start, levels - start) * scale


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_linear_layers_equal_numpy(dit, bits: int) -> None:
    model, calls = recorded(dit)
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs_of(model, calls, PROJ)])
    rounded = rows if bits == 16 else np.stack([grid(row, bits, zero=False) for row in rows])
    result = moments(model.full_precision, calls, [(PROJ,)], [bits], rows=10**9)[PROJ, bits]
    assert result.rows == len(rows) and not result.diagonal
    close(result.hessian, damped(rounded.T.astype(np.float64) @ rounded / len(rows)))
    assert torch.equal(result.hessian, result.hessian.T)


class Convs(nn.Module):
    """One convolution after an activation."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.conv = nn.Linear(9, 9), nn.Conv2d(4, 6, **options)

    def forward(self, x):
        return self.conv(torch.sin(3 * self.before(x)) + 0.3)


def quantized(net: nn.Module, split: dict[str, int] | None = None) -> QuantizedDenoiser:
    """A network under a hand-made graph of its layers."""
    graph = nx.DiGraph()
    for depth, (name, layer) in enumerate(net.named_children()):
        kind, shape = "conv" if isinstance(layer, nn.Conv2d) else "linear", tuple(layer.weight.shape)
        graph.add_node(
            name, kind=kind, operator=name, shape=shape, depth=depth, split=(split or {}).get(name)
        )
    return QuantizedDenoiser(net, graph)


def convolution(split: int | None = None, **options) -> QuantizedDenoiser:
    return quantized(Convs(**options), {} if split is None else {"conv": split})


def calls_of_convolution(count: int = 2, samples: int = 3) -> list:
    torch.manual_seed(1)
    return [((torch.randn(samples, 4, 8, 9),), {}) for _ in range(count)]


def patch_gram(inputs: np.ndarray, kernel, stride, pads, dilation, groups: int) -> tuple[np.ndarray, int]:
    """Mean of x x^T over the patches of [n, c, h, w], by loops; [groups, R, R] and the number of patches."""
    (top, bottom), (left, right) = pads
    padded = np.pad(inputs, ((0, 0), (0, 0), (top, bottom), (left, right)))
    per = inputs.shape[1] // groups
    total, count = 0.0, 0
    for sample in padded:
        for y in range(0, sample.shape[1] - dilation[0] * (kernel[0] - 1), stride[0]):
            for x in range(0, sample.shape[2] - dilation[1] * (kernel[1] - 1), stride[1]):
                ends = y + dilation[0] * (kernel[0] - 1) + 1, x + dilation[1] * (kernel[1] - 1) + 1
                patch = sample[:, y : ends[0] : dilation[0], x : ends[1] : dilation[1]].astype(np.float64)
                vectors = patch.reshape(groups, per * kernel[0] * kernel[1])
                total, count = total + vectors[:, :, None] * vectors[:, None, :], count + 1
    return total / count, count


@pytest.mark.parametrize("bits", [16, 6])
@pytest.mark.parametrize(
    ("options", "pads"),
    [
        ({"kernel_size": 3, "padding": 1}, ((1, 1), (1, 1))),
        ({"kernel_size": 1}, ((0, 0), (0, 0))),
        ({"kernel_size": 3, "stride": 2, "padding": (0, 2)}, ((0, 0), (2, 2))),
        (
            {"kernel_size": (2, 3), "stride": (1, 2), "padding": 1, "dilation": (2, 1), "groups": 2},
            ((1, 1), (1, 1)),
        ),
        ({"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "split": 1}, ((1, 2), (2, 2))),
        ({"kernel_size": (3, 2), "padding": "valid", "split": 3}, ((0, 0), (0, 0))),
    ],
)
def test_convolutions_equal_numpy(options, pads, bits: int, monkeypatch) -> None:
    monkeypatch.setattr(moments_module, "PATCHES", 1000)  # several parts a call
    monkeypatch.setattr(moments_module, "BLOCK", 7)  # several blocks
    model, calls = convolution(**options), calls_of_convolution()
    layer, split = model.layers["conv"], options.get("split", 0)
    inputs = np.concatenate(inputs_of(model, calls, "conv"))
    if bits < 16:
        parts = [inputs[:, :split], inputs[:, split:]] if split else [inputs]
        inputs = np.concatenate(
            [np.stack([grid(s, bits, zero=True) for s in part]) for part in parts], axis=1
        )
    expected, count = patch_gram(inputs, layer.shape[2:], layer.stride, pads, layer.dilation, layer.groups)
    result = moments(model.full_precision, calls, [("conv",)], [bits], rows=10**9)["conv", bits]
    assert result.rows == count
    for found, h in zip(result.hessian if layer.groups > 1 else result.hessian[None], expected, strict=True):
        close(found, damped(h))
    check_hessian(result.hessian, layer.weight)


def test_h_predicts_the_output_error() -> None:
    """tr(dW H dW^T) is the mean squared change of the output: the order of H is that of weight.flatten(1)."""
    model, calls = convolution(kernel_size=(3, 2), stride=2, padding=1), calls_of_convolution()
    layer = model.layers["conv"]
    h = moments(model.full_precision, calls, [("conv",)], [16], rows=10**9)["conv", 16].hessian
    h = h - torch.eye(len(h)) * h.trace() / len(h) * DAMPING / (1 + DAMPING)
    change = torch.randn(layer.shape, generator=torch.Generator().manual_seed(2))
    x = torch.cat([torch.from_numpy(x) for x in inputs_of(model, calls, "conv")])
    change_of_output = nn.functional.conv2d(x, change, None, layer.stride, layer.padding)
    rows = change.flatten(1)
    assert float(((rows @ h) * rows).sum()) == pytest.approx(
        float(change_of_output.square().sum(1).mean()), rel=1e-3
    )


def test_the_blocked_product_equals_the_whole() -> None:
    rows = torch.randn(1, 50, 2 * moments_module.BLOCK + 17, generator=torch.Generator().manual_seed(0))
    into = torch.zeros(1, rows.shape[2], rows.shape[2])
    moments_module._add_gram_(into, rows)
    torch.testing.assert_close(into[0].triu(), (rows[0].T @ rows[0]).triu(), atol=1e-4, rtol=1e-4)


def test_only_the_input_of_the_layer_is_rounded(pipe) -> None:
    model, calls = recorded(pipe)
    groups = input_groups(model.full_precision, calls)
    alone = moments(model.full_precision, calls, groups, [16])
    names = list(model.layers)
    model.apply(
        QuantConfig("", {}).with_layer(names[0], "fp", 4).with_layer(names[5], "fp", 4)
    )  # what was applied before is taken back
    together = moments(model.full_precision, calls, groups, [4, 16, 8])
    assert all(torch.equal(h.hessian, together[key].hessian) for key, h in alone.items())
    assert not any(torch.equal(together[n, 4].hessian, together[n, 16].hessian) for n in names)
    assert {layer.act for layer in model.layers.values()} == {16}


def test_every_layer_gets_moments_that_fit_its_weight(pipe) -> None:
    model, calls = recorded(pipe)
    groups = input_groups(model.full_precision, calls)
    assert sorted(n for group in groups for n in group) == sorted(model.layers)
    found = moments(model.full_precision, calls, groups, [8, 6])
    assert set(found) == {(n, a) for n in model.layers for a in (8, 6)}
    for (name, _), result in found.items():
        check_hessian(result.hessian, model.layers[name].weight)
    for group in groups:
        assert len({id(found[n, 8]) for n in group}) == 1


def test_groups_of_a_dit(dit) -> None:
    model, calls = recorded(dit)
    groups = input_groups(model.full_precision, calls)
    for block in range(2):
        attention = f"transformer_blocks.{block}.attn1"
        assert (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v") in groups
        assert (f"{attention}.to_out.0",) in groups
    assert groups.index((TO_OUT,)) < groups.index((PROJ,))


def test_groups_of_a_unet(unet) -> None:
    model, calls = recorded(unet)
    together = [group for group in input_groups(model.full_precision, calls) if len(group) > 1]
    embedded = tuple(n for n in model.layers if n.endswith("time_emb_proj"))
    assert embedded in together and len(embedded) > 3
    attentions = [n.removesuffix("to_q") for n in model.layers if n.endswith("to_q")]
    assert set(together) == {embedded, *((f"{a}to_q", f"{a}to_k", f"{a}to_v") for a in attentions)}


class Fork(nn.Module):
    """Layers that read the same values: all, in some calls only, twice, or with one property of their own."""

    def __init__(self):
        super().__init__()
        usual = {"kernel_size": 3, "padding": 1}
        self.a, self.b, self.c, self.twice, self.split = (nn.Conv2d(4, 4, **usual) for _ in range(5))
        self.strided, self.dilated = nn.Conv2d(4, 4, **usual, stride=2), nn.Conv2d(4, 4, **usual, dilation=2)
        self.unpadded, self.grouped, self.other = (
            nn.Conv2d(4, 4, 3),
            nn.Conv2d(4, 4, **usual, groups=2),
            nn.Conv2d(4, 8, **usual),
        )

    def forward(self, x, t):
        for layer in (self.strided, self.dilated, self.unpadded, self.grouped, self.split, self.other):
            layer(x)
        return self.a(x) + self.b(x) + self.c(x * t) + self.twice(self.twice(x))


def test_members_of_a_group_agree_in_every_call_and_in_geometry() -> None:
    model = quantized(Fork(), {"split": 2})
    calls = [((torch.randn(1, 4, 5, 5), torch.tensor(float(t))), {}) for t in (1, 1, 2)]
    alone = [("strided",), ("dilated",), ("unpadded",), ("grouped",), ("split",)]
    assert input_groups(model.full_precision, calls) == [*alone, ("other", "a", "b"), ("c",), ("twice",)]
    assert input_groups(model.full_precision, calls[:2]) == [*alone, ("other", "a", "b", "c"), ("twice",)]
    assert moments(model.full_precision, calls, [("twice",)], [16])["twice", 16].rows == 2 * 3 * 25


def test_rows_are_drawn_alike_whatever_else_is_calibrated(pipe) -> None:
    model, calls = recorded(pipe)
    groups = input_groups(model.full_precision, calls)
    together = moments(model.full_precision, calls, groups, [8], rows=41, seed=3)
    for group in groups[:: len(groups) // 5]:
        alone = moments(model.full_precision, calls, [group[-1:]], [8], rows=41, seed=3)[group[-1], 8]
        assert torch.equal(alone.hessian, together[group[-1], 8].hessian)
    name = next(g[0] for g in groups if g[0].endswith("to_q"))
    assert together[name, 8].rows == 41
    other = moments(model.full_precision, calls, [(name,)], [8], rows=41, seed=4)[name, 8]
    assert not torch.equal(other.hessian, together[name, 8].hessian)


@pytest.mark.parametrize("name", [TO_OUT, "pos_embed.proj"])
def test_drawn_rows_are_unbiased_and_spread_over_calls(dit, name: str) -> None:
    model, calls = recorded(dit)
    whole = moments(model.full_precision, calls, [(name,)], [16], rows=10**9)[name, 16]
    some = [
        moments(model.full_precision, calls, [(name,)], [16], rows=64, seed=s)[name, 16] for s in range(40)
    ]
    assert {m.rows for m in some} == {64} and whole.rows > 64

    def error(h: torch.Tensor) -> float:
        return float((h - whole.hessian).norm() / whole.hessian.norm())

    mean = error(torch.stack([m.hessian for m in some]).mean(0))
    each = np.mean([error(m.hessian) for m in some])
    assert 0 < mean < each / 4, "errors of independent draws average out as 1 / sqrt(40)"
    assert len(set(moments_module._drawn(100, 40, 0).tolist())) == 40


def test_each_call_gives_the_same_number_of_rows(monkeypatch) -> None:
    model, calls = convolution(kernel_size=3), calls_of_convolution(count=5)
    drawn = []
    original = moments_module._drawn
    monkeypatch.setattr(
        moments_module,
        "_drawn",
        lambda total, share, seed: drawn.append((share, seed)) or original(total, share, seed),
    )
    moments(model.full_precision, calls, [("conv",)], [8], rows=22)
    assert sum(share for share, _ in drawn) == 22 and {share for share, _ in drawn} == {4, 5}
    assert len({seed for _, seed in drawn}) == 5


class Steps(nn.Module):
    def forward(self, x, timestep=None, extra=None):
        return x


def run_of(denoiser: nn.Module, condition: int, steps: int):
    def run() -> None:
        for t in range(steps):
            denoiser(
                torch.full((2,), float(condition)),
                timestep=torch.tensor(t),
                extra={"text": [torch.tensor([condition])]},
            )

    return run


@pytest.mark.parametrize(
    ("count", "steps", "limit"),
    [(8, 10, 40), (8, 10, 33), (4, 10, 12), (7, 10, 23), (8, 7, 41), (5, 4, 3), (6, 3, 17)],
)
def test_every_step_is_recorded_equally_often_with_different_conditions(
    count: int, steps: int, limit: int
) -> None:
    denoiser = Steps()
    calls = record_calls(denoiser, [run_of(denoiser, c, steps) for c in range(count)], limit)
    pairs = [(int(kwargs["timestep"]), int(args[0][0])) for args, kwargs in calls]
    assert len(pairs) == len(set(pairs)) == limit
    times = Counter(t for t, _ in pairs)
    assert max(times.values()) - min(times[t] for t in range(steps)) <= 1
    shares = Counter(c for _, c in pairs)
    assert max(shares.values()) - min(shares[c] for c in range(count)) <= 1
    assert [c for _, c in pairs] == sorted(c for _, c in pairs), "in the order of the runs"


def test_conditions_that_repeat_still_meet_every_step() -> None:
    """Even runs hold one half of the classes, odd runs the other: half of the steps each, but not always
    the same half."""
    denoiser = Steps()
    calls = record_calls(denoiser, [run_of(denoiser, c % 2, 10) for c in range(8)], 40)
    assert Counter((int(k["timestep"]), int(a[0][0])) for a, k in calls) == {
        (t, c): 2 for t in range(10) for c in range(2)
    }


def test_all_calls_are_kept_where_there_is_room_and_copied() -> None:
    denoiser, x = Steps(), torch.zeros(2)

    def run() -> None:
        for _ in range(3):
            x.add_(1)
            denoiser(x, extra=(torch.ones(4), None))

    calls = record_calls(denoiser, [run, run], 100)
    assert [int(args[0][0]) for args, _ in calls] == [1, 2, 3, 4, 5, 6]
    assert len({kwargs["extra"][0].data_ptr() for _, kwargs in calls}) == 1, "a text embedding is kept once"
    assert not denoiser._forward_pre_hooks


def test_fewer_images_than_the_limit_are_no_error_but_none_are(dit) -> None:
    denoiser = dit.denoiser
    assert len(record_calls(denoiser, runs(dit, replace(PROTOCOL, images=1)), 999)) == PROTOCOL.steps
    for made, limit in (([], 5), ([lambda: None], 5), (runs(dit), 0)):
        with pytest.raises(AquabitError, match="no denoiser call was recorded"):
            record_calls(denoiser, made, limit)
    with pytest.raises(AquabitError, match="no denoiser call was recorded"):
        input_groups(QuantizedDenoiser(denoiser, trace(dit)).full_precision, [])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_name_the_layer(value: float) -> None:
    model, calls = convolution(kernel_size=3), calls_of_convolution()
    calls[1][0][0][1, 2, 3, 4] = value
    with pytest.raises(AquabitError, match=r"conv reads NaN or infinity in recorded call 2 of 2"):
        moments(model.full_precision, calls, [("conv",)], [8], rows=2)
    calls[1][0][0][:] = 1e30
    with pytest.raises(AquabitError, match=r"before overflow float32"):
        moments(model.full_precision, calls, [("before",)], [16])


def test_what_cannot_be_calibrated(dit) -> None:
    model, calls = recorded(dit)
    with pytest.raises(AquabitError, match="rows=0"):
        moments(model.full_precision, calls, [(TO_Q,)], [8], rows=0)
    with pytest.raises(AquabitError, match=f"{TO_Q} read nothing"):
        moments(model.full_precision, [], [(TO_Q,)], [8])
    scheme = Scheme.parse("usq4")
    model.layers[TO_Q].set_packed_(quantize_weight(model.full(TO_Q), scheme), scheme)
    with pytest.raises(AquabitError, match="packed"):
        moments(model.full_precision, calls, [(TO_Q,)], [8])


@pytest.mark.parametrize("groups", [1, 2])
def test_wide_layers_keep_the_diagonal(monkeypatch, groups: int) -> None:
    model, calls = convolution(kernel_size=3, groups=groups), calls_of_convolution()
    whole = moments(model.full_precision, calls, [("conv",), ("before",)], [8])["conv", 8].hessian
    monkeypatch.setattr(moments_module, "WIDEST", 17)
    found = moments(model.full_precision, calls, [("conv",), ("before",)], [8])
    result = found["conv", 8]
    assert result.diagonal and not found["before", 8].diagonal
    expected = whole.diagonal() if groups == 1 else whole.diagonal(dim1=1, dim2=2).mean(0)
    torch.testing.assert_close(result.hessian, expected)
    check_hessian(result.hessian, model.layers["conv"].weight)


def test_plan_stays_within_its_limit(unet) -> None:
    model, calls = recorded(unet)
    groups = input_groups(model.full_precision, calls)
    sizes = {g: 4 * model.layers[g[0]].weight[0].numel() ** 2 * 2 for g in groups}
    assert portions(groups, model.layers, [8, 6]) == [groups]
    limit = max(sizes.values()) // 2
    chunks = portions(groups, model.layers, [8, 6, 8], limit)
    assert [g for chunk in chunks for g in chunk] == groups
    assert all(len(chunk) == 1 or sum(sizes[g] for g in chunk) <= limit for chunk in chunks)
    assert 1 < len(chunks) < len(groups)
    assert all(sum(sizes[g] for g in a) + sizes[b[0]] > limit for a, b in pairwise(chunks)), (
        "no chunk too small"
    )


@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_a_portion_is_shared_out_in_parts_of_about_the_same_work(unet, count: int) -> None:
    model, calls = recorded(unet)
    groups = input_groups(model.full_precision, calls)
    work = {g: sum(moments_module._work(model.layers[n]) for n in g) for g in groups}
    parts = shared_out(groups, model.layers, count)
    assert sorted(g for part in parts for g in part) == sorted(groups), "layers of one input stay together"
    assert len(parts) == min(count, len(groups)) and all(parts)
    assert all([groups.index(g) for g in part] == sorted(groups.index(g) for g in part) for part in parts)
    loads = [sum(work[g] for g in part) for part in parts]
    assert max(loads) - min(loads) <= max(work.values()), "no part could give one away and be the smaller one"
    assert parts == shared_out(groups, model.layers, count)


def test_progress_counts_the_calls(dit) -> None:
    model, calls = recorded(dit)
    told = []
    moments(model.full_precision, calls, [(TO_Q,)], [8], progress=lambda *event: told.append(event))
    assert [e[1:] for e in told] == [(i, len(calls)) for i in range(len(calls) + 1)]
