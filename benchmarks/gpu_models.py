"""The parts ``bundled``, ``dit`` and ``unet`` of benchmarks/gpu.py: whole models on the device, packed beside
dense."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import aquabit
from aquabit.graph import trace as trace_network
from aquabit.kernels.dispatch import using
from aquabit.measuring.evaluator import Evaluator
from aquabit.memory import peaks
from aquabit.packing import quantize
from aquabit.pipelines import denoiser_of, load, trace
from aquabit.quant.bank import Bank
from aquabit.quant.kernel_tuning import layers_of, ran
from aquabit.quant.layers import resident_bytes
from aquabit.quant.model import fingerprint
from aquabit.scheme import Protocol
from aquabit.space import make_space
from benchmarks.common import MODELS
from benchmarks.gpu_steps import Steps, milliseconds, psnr, timed
from benchmarks.kernel_models import DIT, Maker, call_of, with_plain_softmax_

UNIFORM = ("usq4", "usq3", "usq2")
IMAGES = {"sdxl": 32, "tiny": 2}
STEPS = {"sdxl": 10, "tiny": 2}
SDXL = {
    "class": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = SDXL | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 48,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
TINY_DIT = DIT | {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
# config and samples in a call
CASES: dict[tuple[str, str], tuple[dict[str, Any], tuple[int, ...]]] = {
    ("dit", "sdxl"): (DIT, (1, 32)),
    ("dit", "tiny"): (TINY_DIT, (1, 2)),
    ("unet", "sdxl"): (SDXL, (1, 4)),
    ("unet", "tiny"): (TINY, (1, 2)),
}
# name: scheme, activation bits, whether decoded, whether softmax outputs are rounded
VARIANTS = {
    "dense bfloat16": ("usq4", 16, True, False),
    "usq4 a16": ("usq4", 16, False, False),
    "usq4 a8, softmax not rounded": ("usq4", 8, False, False),
    "usq4 a8": ("usq4", 8, False, True),
}


# ---- bundled models, whole flow


def bundled(name: str, device: str, size: str) -> dict[str, Any]:
    """Uniform configurations measured on the CPU and on the device, and the packed model's images on both."""
    opened = load(name)
    graph, own = trace(opened), fingerprint(denoiser_of(opened))
    space = make_space(graph, own, name, schemes=UNIFORM)
    configs = [space.full_precision(), *(space.uniform(s) for s in UNIFORM)]
    found: dict[str, Any] = {"configurations": ["fp", *UNIFORM]}
    with tempfile.TemporaryDirectory() as folder:
        bank = Bank(Path(folder) / "bank")
        half = [] if device == "cpu" else [(device, "float16")]
        for where, dtype in (("cpu", "float32"), (device, "float32"), *half):
            protocol = Protocol(images=IMAGES[size], steps=STEPS[size], objective="psnr", dtype=dtype)
            evaluator = Evaluator(name, graph, bank, own, where, dtype)
            measured = [evaluator.measure(c, protocol).measurement for c in configs]
            found[f"{where} {dtype}"] = {
                "psnr": [m.metrics["psnr"] for m in measured[1:]],
                "seconds": median(m.seconds for m in measured),
            }
        packed, images = str(Path(folder) / "packed"), list[Tensor]()
        quantize(name, space.uniform("usq4"), bank=str(bank.folder)).save(packed)
        for where in ("cpu", device):
            with timed(where) as clock:
                images.append(aquabit.generate(packed, IMAGES[size], steps=STEPS[size], device=where).cpu())
            found[f"packed {where}"] = {"seconds": clock.seconds}
    return found | {"packed_psnr": psnr(*images)}


# ---- large denoisers of random codes, one call


@cache
def maker(part: str, size: str) -> Maker:
    return Maker(CASES[part, size][0])


@cache
def graph_of(part: str, size: str) -> Any:
    return trace_network(maker(part, size).empty())


_outputs: dict[tuple[str, int], Tensor] = {}  # of the dense model, by part and samples


def called(part: str, variant: str, device: str, size: str) -> dict[str, Any]:
    """Kernels in their fixed order. Milliseconds of a call, the device's peak beside what is expected, and
    how far outputs are from those of the same weights decoded (rounding of activations included)."""
    scheme, act, dense, rounded = VARIANTS[variant]
    with timed(device) as clock:
        model: nn.Module = maker(part, size)(scheme, act, dense).to(device, torch.bfloat16)
    if not rounded:
        with_plain_softmax_(model)
    layers, rows = layers_of(model), []
    for batch in CASES[part, size][1]:
        call = call_of(model, batch, torch.bfloat16, device)
        with using({}):
            with timed(device) as first:
                y = call().float().cpu()
            with timed(device) as once:
                call()
            row = {"samples": batch, "ms": milliseconds(call, device), "first_seconds": first.seconds}
            row |= {"peak": once.bytes, "kernels": ran(layers, call)}
        if dense:
            _outputs[part, batch] = y
        else:
            peak = peaks(graph_of(part, size), batch, scheme=scheme)
            run = next(p for p in peak if (p.task, p.dtype) == ("run packed", "bfloat16"))
            row["expected"] = run.total - run.parts["libraries"]
        reference = None if dense else _outputs.get((part, batch))
        row["difference"] = None if reference is None else float((y - reference).norm() / reference.norm())
        rows.append(row | {"finite": bool(y.isfinite().all())})
    return {"calls": rows, "resident": resident_bytes(layers.values()), "making": clock.seconds}


def bundled_steps(device: str, size: str) -> Steps:
    return {name: partial(bundled, name, device, size) for name in MODELS}


def dit_steps(device: str, size: str) -> Steps:
    return {name: partial(called, "dit", name, device, size) for name in VARIANTS}


def unet_steps(device: str, size: str) -> Steps:
    return {name: partial(called, "unet", name, device, size) for name in VARIANTS}
