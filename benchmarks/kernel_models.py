"""Whole denoisers of random codes, packed, against their decoded weights in float32 and bfloat16: calls of
all in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from aquabit.graph import example_inputs, trace
from aquabit.jsonio import read_json
from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends import Weight
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.dispatch import held
from aquabit.kernels.time_requests import random_weight
from aquabit.pipelines.loading import BUNDLED
from aquabit.quant.attention import patch_attention_
from aquabit.quant.feed_forward import patch_feed_forwards_
from aquabit.quant.kernel_tuning import Placement, format_for, layers_of, place_
from aquabit.quant.layers import quant_layer, resident_bytes
from aquabit.scheme import Progress, Scheme
from benchmarks.additive import LDM4
from benchmarks.kernel_timing import paired, ratio, threads

DIT = {
    "class": "DiTTransformer2DModel",
    "sample_size": 32,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
}  # facebook/DiT-XL-2-256
SCHEMES = (
    ("usq2", 8),
    ("aq4x4k", 16),
    ("aq2x6k", 16),
)  # with activation bits; k is groups of 8 where there is no kernel: 2, 2 and 1.5 bits
SMALL = (("usq4", 8), ("usq2", 8))
BITS = (("usq2", 8), ("usq4", 8))
SD15 = {
    "class": "UNet2DConditionModel",
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # stable-diffusion-v1-5


def bundled(name: str) -> dict[str, Any]:
    """The configuration of a bundled denoiser."""
    config = read_json(BUNDLED / name / "denoiser" / "config.json")
    return {"class": config["_class_name"]} | {k: v for k, v in config.items() if not k.startswith("_")}


CASES = {  # name: config, samples in a call (guidance takes two), threads, seconds, schemes
    "DiT-XL/2, one block": (DIT | {"num_layers": 1}, (2,), (1, 2), 5.0, SCHEMES),
    "DiT-XL/2, 28 blocks": (DIT, (2,), (2,), 30.0, BITS),
    "U-Net of LDM-4's shapes": (LDM4, (2,), (2,), 40.0, (*BITS, SCHEMES[1])),
    "SD 1.5's U-Net at 64 x 64": (SD15, (2,), (2,), 60.0, BITS),
}
BUNDLED_CASES = {
    n: (bundled(n), (1, 16), (1,), 4.0, SMALL)
    for n in ("digits-unet", "digits-dit", "fashion-unet", "fashion-dit")
}
ROUNDS = (3, 30)
DENSE, TWO_BITS = "dense float32", "usq2 a8 packed"

Call = Callable[[], Tensor]


def models(
    progress: Progress,
    quick: bool,
    only: str = "",
    cases: Mapping[str, Any] = CASES,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Every case whose name holds ``only``, by ``clock``; ``quick``: only the first, on most threads."""
    rows: list[dict[str, Any]] = []
    for name, (config, batches, counts, seconds, schemes) in list(cases.items())[: 1 if quick else None]:
        if only not in name:
            continue
        variants = built(config, schemes, progress)
        for batch, count in [(b, c) for b in batches for c in (counts[-1:] if quick else counts)]:
            with threads(count):
                rows += timed(
                    variants,
                    batch,
                    0.0 if quick else seconds,
                    {"model": name, "batch": batch, "threads": count},
                    progress,
                    clock,
                )
        del variants
    return rows


# ---- denoisers of random codes
# ----------------------------------------------------------------------------------------------------------


def built(
    config: dict[str, Any], schemes: tuple[tuple[str, int], ...], progress: Progress
) -> dict[str, nn.Module]:
    """Packed denoisers of each scheme, to run with memory packed and auto; the first one's codes in
    bfloat16 too, and decoded in both types."""
    made = Maker(config)
    (scheme, act), names = (
        schemes[0],
        [(f"{s} a{a} {memory}", s, a) for s, a in schemes for memory in ("packed", "auto")],
    )
    found: dict[str, nn.Module] = {}
    for done, (name, s, a) in enumerate(names):
        progress("making models", done, len(names) + 1)
        found[name] = made(s, a)
    found[f"{scheme} a{act}, V a16 packed"] = with_plain_softmax_(made(scheme, act))
    found[f"{scheme} a{act} packed bfloat16"] = made(scheme, act).bfloat16()
    found[DENSE] = made(scheme, 16, dense=True)
    found["dense bfloat16"] = made(scheme, 16, dense=True).bfloat16()
    progress("making models", len(names) + 1, len(names) + 1)
    return found


class Maker:
    """Makes denoisers whose Linear and Conv2d layers all hold random codes, the same for equal schemes.
    Nothing else is quantized but, below 16 bits of activations, what packed artifacts quantize (softmax
    outputs, Q, K and V)."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.nodes = [(n, a) for n, a in trace(self.empty()).nodes(data=True) if a["kind"] != "merge"]
        self.codes: dict[tuple[str, tuple[int, ...]], CodebookWeight] = {}
        self.weights: dict[tuple[str, tuple[int, ...]], Weight] = {}
        self.decoded: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def empty(self) -> nn.Module:
        """On the meta device."""
        with init_empty_weights(include_buffers=False):
            denoiser: nn.Module = getattr(diffusers, self.config["class"])(
                **{k: v for k, v in self.config.items() if k != "class"}
            )
        return denoiser

    def __call__(self, scheme: str, act: int, dense: bool = False, functions: bool = True) -> nn.Module:
        """``functions``: feed-forward blocks have theirs applied by kernels."""
        denoiser, rng = self.empty(), torch.Generator().manual_seed(0)
        for name, node in self.nodes:
            layer = quant_layer(denoiser.get_submodule(name), node.get("split"))
            layer.weight, layer.bias = (
                torch.empty(0),
                None if layer.bias is None else torch.zeros(layer.shape[0]),
            )
            key = (scheme, tuple(layer.shape))
            if dense:
                layer.set_dense_(self._decoded(key), Scheme.parse(scheme))
            else:
                layer.set_packed_(self._weight(key), Scheme.parse(scheme))
            layer.act, layer.act_output = act, act if node.get("attention") else 16
            _put(denoiser, name, layer)
        for name, parameter in list(denoiser.named_parameters()):
            if not parameter.is_meta:  # of a layer above: norms and embeddings are left
                continue
            norm = parameter.ndim == 1 and name.endswith("weight")
            value = (
                torch.ones(parameter.shape) if norm else 0.02 * torch.randn(parameter.shape, generator=rng)
            )
            _put(denoiser, name, nn.Parameter(value, requires_grad=False))
        patch_attention_(denoiser)
        if functions:
            patch_feed_forwards_(denoiser)
        return denoiser.eval().requires_grad_(False)

    def _coded(self, key: tuple[str, tuple[int, ...]]) -> CodebookWeight:
        if key not in self.codes:
            made = random_weight(format_for(Scheme.parse(key[0]), key[1]), seed=len(key[1]) + sum(key[1]))
            if made.codebooks is None and made.scale is not None:
                # around zero, and as large at any bits: else values grow through the layers until
                # some are not finite, which the kernel of attention leaves
                most = (1 << made.bits) - 1
                scale = made.scale * 3 / most
                made = replace(made, scale=scale, offset=-scale * most / 2)
            self.codes[key] = made
        return self.codes[key]

    def _weight(self, key: tuple[str, tuple[int, ...]]) -> Weight:
        """Codes of one layer are those of all of its shape, but in memory of their own, as in a real
        model."""
        if key not in self.weights:
            self.weights[key] = held(self._coded(key))
        return own(self.weights[key])

    def _decoded(self, key: tuple[str, tuple[int, ...]]) -> Tensor:
        if key not in self.decoded:
            self.decoded[key] = self._coded(key).dequantize()
        return self.decoded[key].clone()


def with_plain_softmax_(denoiser: nn.Module) -> nn.Module:
    """V layers at 16 bits of activations, so that softmax outputs are not rounded and torch's own fused
    attention runs."""
    for name, layer in layers_of(denoiser).items():
        if name.endswith("to_v"):
            layer.act = layer.act_output = 16
    return denoiser


def _put(denoiser: nn.Module, name: str, value: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(denoiser.get_submodule(owner), leaf, value)


def own(weight: Weight) -> Weight:
    """The same weight in memory of its own, as every layer of a real model has it."""
    if isinstance(weight, Arranged):
        return replace(weight, codes=weight.codes.clone())
    return replace(weight, packed=weight.packed.clone())


def call_of(denoiser: nn.Module, batch: int, dtype: torch.dtype, device: str = "cpu") -> Call:
    """One call with ``batch`` samples of random inputs, the same for every denoiser of a class."""
    inputs = inputs_of(denoiser, batch, dtype, device)

    def call() -> Tensor:
        with torch.inference_mode():
            return denoiser(**inputs).sample

    return call


def inputs_of(denoiser: nn.Module, batch: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Random inputs of one call, the same for every denoiser of a class."""
    rng = torch.Generator().manual_seed(0)

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: real(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        shape = (batch, *value.shape[1:]) if value.ndim else ()
        return (
            torch.randn(shape, generator=rng).to(device, dtype)
            if value.is_floating_point()
            else torch.zeros(shape, dtype=value.dtype, device=device)
        )

    return {k: real(v) for k, v in example_inputs(denoiser).items()}


# ---- timing
# ------------------------------------------------------------------------------------------------------------


def timed(
    variants: dict[str, nn.Module],
    batch: int,
    seconds: float,
    facts: dict[str, Any],
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """A row a variant: milliseconds of a call, ratios, bytes that its layers hold, layers by kernel, dense
    copies, and how far its output is from the dense model of the same weights (rounded activations
    included). One with memory=auto that keeps no copy has its packed twin's times."""
    calls, placed, outputs = dict[str, Call](), dict[str, Placement](), dict[str, Tensor]()
    for name, model in variants.items():
        call = call_of(model, batch, torch.bfloat16 if "bfloat16" in name else torch.float32)
        placed[name] = place_(layers_of(model), call, "auto" if name.endswith("auto") else "packed", progress)
        calls[name] = lambda name=name, call=call: outputs.__setitem__(name, call())  # type: ignore[misc]
    same = {
        n: n.replace("auto", "packed") for n, p in placed.items() if n.endswith("auto") and not p.copies
    }  # runs as packed does
    progress(f"timing {facts['model']}", 0, 1)
    times = paired({n: call for n, call in calls.items() if n not in same}, seconds, ROUNDS, clock=clock)
    progress(f"timing {facts['model']}", 1, 1)
    reference, first, rows = outputs[DENSE].float(), next(iter(variants)).split()[0], []
    for name, model in variants.items():
        own_times, y, place, layers = (
            times[same.get(name, name)],
            outputs[same.get(name, name)].float(),
            placed[name],
            layers_of(model),
        )
        size = sum(prod(layer.shape) for layer in layers.values())
        stored = sum(
            sum(layer.scheme.stored_bytes(layer.shape))
            for layer in layers.values()
            if layer.packed is not None
        )
        alike = name.split()[0] in (first, "dense") and bool(
            torch.isfinite(y).all() and torch.isfinite(reference).all()
        )
        rows.append(
            {
                **facts,
                "variant": name,
                "ms": 1e3 * statistics.median(own_times),
                "rounds": len(own_times),
                "over_float32": ratio(times[DENSE], own_times),
                "over_bfloat16": ratio(times["dense bfloat16"], own_times),
                **({"over_two_bits": ratio(times[TWO_BITS], own_times)} if TWO_BITS in times else {}),
                "resident": resident_bytes(layers.values()),
                "dense_float32": 4 * size,
                "bits": 8 * stored / size if stored else None,
                "kernels": dict(place.backends),
                "copies": len(place.copies),
                "finite": bool(torch.isfinite(y).all()),
                "difference": float((y - reference).norm() / reference.norm()) if alike else None,
            }
        )
    return rows
