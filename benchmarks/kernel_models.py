"""Whole denoisers of random codes, packed, against their decoded weights in float32 and bfloat16: calls of all in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from aquabit.graph import example_inputs, trace
from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends import Weight
from aquabit.kernels.dispatch import held
from aquabit.kernels.measuring import random_weight
from aquabit.quant.attention import patch_attention_
from aquabit.quant.bench import decoded_
from aquabit.quant.layers import quant_layer, resident_bytes
from aquabit.quant.tuning import format_for, layers_of, place_
from aquabit.scheme import Progress, Scheme
from benchmarks.additive import LDM4
from benchmarks.kernel_timing import paired, ratio, threads

DIT = {"class": "DiTTransformer2DModel", "sample_size": 32, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72,
       "in_channels": 4, "out_channels": 8}  # fmt: skip  # facebook/DiT-XL-2-256
SCHEMES = (("usq2", 8), ("aq4x4k", 16), ("aq2x6k", 16))  # with activation bits; k is groups of 8 where there is no kernel: 2, 2 and 1.5 bits
CASES = {  # name: config, samples in a call (guidance takes two), threads, seconds, schemes
    "DiT-XL/2, one block": (DIT | {"num_layers": 1}, 2, (1, 2), 5.0, SCHEMES),
    "DiT-XL/2, 28 blocks": (DIT, 2, (2,), 30.0, SCHEMES[:2]),
    "U-Net of LDM-4's shapes": (LDM4, 2, (2,), 40.0, SCHEMES[:2]),
}
ROUNDS = (3, 30)
DENSE = "dense float32"

Call = Callable[[], Tensor]


def models(progress: Progress, quick: bool) -> list[dict[str, Any]]:
    """Every case; ``quick``: only the block, on two threads."""
    rows: list[dict[str, Any]] = []
    for name, (config, batch, counts, seconds, schemes) in list(CASES.items())[: 1 if quick else None]:
        variants = built(config, schemes, progress)
        for count in counts[-1:] if quick else counts:
            with threads(count):
                rows += timed(variants, batch, 0.0 if quick else seconds, {"model": name, "batch": batch, "threads": count}, progress)
        del variants
    return rows


# ---- denoisers of random codes ----------------------------------------------------------------------------------------------------------


def built(config: dict[str, Any], schemes: tuple[tuple[str, int], ...], progress: Progress) -> dict[str, nn.Module]:
    """Packed denoisers, one of each scheme with memory packed and auto in float32 and one in bfloat16; and the first one's weights dense."""
    found: dict[str, nn.Module] = {}
    for done, (scheme, act) in enumerate(schemes):
        progress("making models", done, len(schemes) + 1)
        model = found[f"{scheme} a{act} packed"] = packed(config, scheme, act)
        found[f"{scheme} a{act} auto"] = copied(model)
        found[f"{scheme} a{act} packed bfloat16"] = copied(model).bfloat16()
    dense = found[DENSE] = decoded_(copied(next(iter(found.values()))), torch.float32)
    found["dense bfloat16"] = decoded_(copied(next(iter(found.values()))), torch.bfloat16).bfloat16()
    assert dense is not None
    progress("making models", len(schemes) + 1, len(schemes) + 1)
    return found


def packed(config: dict[str, Any], scheme: str, act: int) -> nn.Module:
    """A denoiser whose Linear and Conv2d layers all hold random codes of a scheme; nothing else of it is quantized but, below 16 bits of
    activations, what packed artifacts quantize (softmax outputs, Q, K and V)."""
    with init_empty_weights(include_buffers=False):
        denoiser: nn.Module = getattr(diffusers, config["class"])(**{k: v for k, v in config.items() if k != "class"})
    made: dict[tuple[int, ...], Weight] = {}
    for name, node in trace(denoiser).nodes(data=True):
        if node["kind"] == "merge":
            continue
        layer = quant_layer(denoiser.get_submodule(name), node.get("split"))
        layer.weight, layer.bias = torch.empty(0), None if layer.bias is None else torch.zeros(layer.shape[0])
        shape = tuple(layer.shape)
        if shape not in made:
            made[shape] = held(random_weight(format_for(Scheme.parse(scheme), shape), seed=len(made)))
        layer.set_packed_(own(made[shape]), Scheme.parse(scheme))
        layer.act = act
        layer.act_output = act if node.get("attention") else 16
        owner, _, leaf = name.rpartition(".")
        setattr(denoiser.get_submodule(owner), leaf, layer)
    for name, parameter in list(denoiser.named_parameters()):  # norms and embeddings
        owner, _, leaf = name.rpartition(".")
        value = torch.ones(parameter.shape) if leaf == "weight" and parameter.ndim == 1 else 0.02 * torch.randn(parameter.shape)
        setattr(denoiser.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    patch_attention_(denoiser)
    return denoiser.eval().requires_grad_(False)


def own(weight: Weight) -> Weight:
    """The same weight in memory of its own, as every layer of a real model has it."""
    if isinstance(weight, Arranged):
        return replace(weight, codes=weight.codes.clone(), derived={})
    return replace(weight, packed=weight.packed.clone())


def copied(denoiser: nn.Module) -> nn.Module:
    return copy.deepcopy(denoiser)


def call_of(denoiser: nn.Module, batch: int, dtype: torch.dtype) -> Call:
    """One call with ``batch`` samples of random inputs, the same for every denoiser of a class."""
    rng = torch.Generator().manual_seed(0)

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: real(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        shape = (batch, *value.shape[1:]) if value.ndim else ()
        return torch.randn(shape, generator=rng).to(dtype) if value.is_floating_point() else torch.zeros(shape, dtype=value.dtype)

    inputs = real(example_inputs(denoiser))

    def call() -> Tensor:
        with torch.inference_mode():
            return denoiser(**inputs).sample

    return call


# ---- timing ----------------------------------------------------------------------------------------------------------------------------


def timed(variants: dict[str, nn.Module], batch: int, seconds: float, facts: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """A row a variant: milliseconds of a call, ratios, bytes that its layers hold, layers by kernel, dense copies, and how far its output
    is from the dense model of the same weights (rounded activations included)."""
    calls, placed = {}, {}
    for name, model in variants.items():
        calls[name] = call_of(model, batch, torch.bfloat16 if "bfloat16" in name else torch.float32)
        placed[name] = place_(layers_of(model), calls[name], "auto" if name.endswith("auto") else "packed", progress)
    progress(f"timing {facts['model']}", 0, 1)
    times = paired(calls, seconds, ROUNDS)
    progress(f"timing {facts['model']}", 1, 1)
    reference, first, rows = calls[DENSE]().float(), next(iter(variants)).split()[0], []
    for name, own_times in times.items():
        y, place, model = calls[name]().float(), placed[name], variants[name]
        layers = layers_of(model)
        size = sum(prod(layer.shape) for layer in layers.values())
        stored = sum(layer.coded.nbytes for layer in layers.values() if layer.coded is not None)
        alike = name.split()[0] in (first, "dense")
        rows.append({
            **facts, "variant": name, "ms": 1e3 * statistics.median(own_times), "rounds": len(own_times),
            "over_float32": ratio(times[DENSE], own_times), "over_bfloat16": ratio(times["dense bfloat16"], own_times),
            "resident": resident_bytes(layers.values()), "dense_float32": 4 * size, "bits": 8 * stored / size if stored else None,
            "kernels": dict(place.backends), "copies": len(place.copies), "finite": bool(torch.isfinite(y).all()),
            "difference": float((y - reference).norm() / reference.norm()) if alike else None,
        })  # fmt: skip
    return rows
