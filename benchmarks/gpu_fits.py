"""The part ``fits`` of benchmarks/gpu.py: what measuring and quantizing take, on a pipeline with the layers
of SDXL (U-Net and VAE whole, text encoders of two layers) and random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from aquabit.measuring.evaluator import Evaluator
from aquabit.memory import peaks
from aquabit.pipelines import denoiser_of, load, trace
from aquabit.quant.bank import Bank
from aquabit.quant.model import fingerprint
from aquabit.scheme import Calibration, Protocol
from aquabit.space import SearchSpace, make_space
from benchmarks.gpu_models import SDXL, TINY
from benchmarks.gpu_steps import Steps, milliseconds, timed

PROMPTS = ("a cat", "two dogs", "a red car", "the sea")
FITTED = {"usq4": 12, "usq3h": 12, "aq2x8g8": 2}  # layers of each scheme, spread over the model
SKETCHED = 2  # steps of a backward pass
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
WIDTHS = {"sdxl": (768, 1280), "tiny": (16, 32)}  # of the two text encoders
PIXELS = {"sdxl": 512, "tiny": 32}


def filled(make: Callable[[], nn.Module], device: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """A network in one copy on the device, with random weights that keep the size of what goes through."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = make().eval()
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            spread, middle = (p[0].numel() ** -0.5, 0.0) if p.ndim > 1 else (0.05, float(name == "weight"))
            value = torch.empty(p.shape, device=device).normal_(middle, spread, generator=generator)
            module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
    return model.to(device)


def encoder(width: int, projected: bool) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def pipeline(size: str, device: str, dtype: torch.dtype) -> Any:
    """A StableDiffusionXLPipeline with the tokenizer of the tests (letters)."""
    import diffusers

    from tests.tiny_pipelines import clip_tokenizer, ddim

    unet = {k: v for k, v in (SDXL if size == "sdxl" else TINY).items() if k != "class"}
    vae = VAE if size == "sdxl" else VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    first, second = WIDTHS[size]
    return diffusers.StableDiffusionXLPipeline(
        filled(lambda: diffusers.AutoencoderKL(**vae), device, dtype, 1),
        encoder(first, False).to(device, dtype),
        encoder(second, True).to(device, dtype),
        clip_tokenizer(),
        clip_tokenizer(),
        filled(lambda: diffusers.UNet2DConditionModel(**unet), device, dtype, 0),
        ddim(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


class Opened(NamedTuple):
    evaluator: Evaluator
    space: SearchSpace
    protocol: Protocol
    facts: dict[str, Any]
    folder: tempfile.TemporaryDirectory[str]  # of the bank; goes with it


@cache
def opened(device: str, size: str) -> Opened:
    dtype = torch.float32 if device == "cpu" else torch.float16
    folder = tempfile.TemporaryDirectory()
    protocol = Protocol(
        images=4,
        steps=4,
        micro_batch=4,
        objective="psnr",
        guidance=5.0,
        conditions=PROMPTS,
        resolution=PIXELS[size],
        dtype=str(dtype).removeprefix("torch."),
    )
    with timed(device) as clock:
        pipe = load(pipeline(size, device, dtype), device, dtype)
        graph, own = trace(pipe), fingerprint(denoiser_of(pipe))
        space = make_space(graph, own, "sdxl-shaped", schemes=FITTED, calibration=Calibration.of(protocol))
        evaluator = Evaluator(pipe, graph, Bank(Path(folder.name)), own, device, protocol.dtype)
    expected = {
        p.task: p.total - p.parts["libraries"] for p in peaks(graph, 4, True) if p.dtype == protocol.dtype
    }
    facts = {"opening": clock.seconds, "weights": graph.graph["weights"], "expected": expected}
    return Opened(evaluator, space, protocol, facts, folder)


def spread(space: SearchSpace, scheme: str) -> list[str]:
    """Layers that have the scheme, spread over the model."""
    names = [n for n, row in space.choices.items() if scheme in map(str, row)]
    apart = max(1, len(names) // FITTED[scheme])
    return names[apart // 2 :: apart][: FITTED[scheme]]


def call(device: str, size: str) -> dict[str, Any]:
    """One denoiser call of four guided images, in full precision."""
    at = opened(device, size)
    with timed(device) as clock:
        ms = milliseconds(at.evaluator.adapter.first_call(at.protocol), device)
    return at.facts | {"ms": ms, "bytes": clock.bytes}


def fit(scheme: str, device: str, size: str) -> dict[str, Any]:
    """Seconds of fitting some layers with a scheme, and of one probe of the first."""
    at = opened(device, size)
    names = spread(at.space, scheme)
    with timed(device) as clock:
        at.evaluator.fit({n: [scheme] for n in names}, at.space.calibration)
    weights = sum(at.evaluator.quantized.layers[n].weight.numel() for n in names)
    found = {"layers": len(names), "weights": weights, "fitting": clock.seconds, "bytes": clock.bytes}
    full = at.space.full_precision()
    with timed(device) as clock:  # the first makes full precision's images too
        at.evaluator.probe(names[0], [scheme], (), at.protocol, full, 8)
    with timed(device) as again:
        at.evaluator.probe(names[-1], [scheme], (), at.protocol, full, 8)
    return found | {"first_probe": clock.seconds, "probe": again.seconds}


def sketches(device: str, size: str) -> dict[str, Any]:
    """One backward pass through the sampler: what usq4 does to the layers that it was fitted to, and a8 to
    all."""
    at = opened(device, size)
    fitted = spread(at.space, "usq4")
    at.evaluator.fit({n: ["usq4"] for n in fitted}, at.space.calibration)
    choices = {n: ("usq4",) if n in fitted else () for n in at.space.choices}
    protocol = Protocol.from_dict({**at.protocol.to_dict(), "steps": SKETCHED})
    with timed(device) as clock:
        found = at.evaluator.sketches(choices, (8,), protocol, 0, 1, at.space.full_precision())
    return {
        "layers": len(found["numbers"]),
        "untold": len(found["untold"]),
        "steps": SKETCHED,
        "sketching": clock.seconds,
        "bytes": clock.bytes,
    }


def everywhere(device: str, size: str) -> dict[str, Any]:
    """usq4 fitted to every layer, and four images of it."""
    at = opened(device, size)
    config = at.space.uniform("usq4", 16)
    with timed(device) as clock:
        at.evaluator.quantized.prepare(config)
    found = {"fitting": clock.seconds, "bytes": clock.bytes, "weights": at.facts["weights"]}
    with timed(device) as clock:
        images = at.evaluator.generate(config, at.protocol)
    finite = bool(images.isfinite().all())
    return found | {"images": clock.seconds, "images_bytes": clock.bytes, "finite": finite}


def steps(device: str, size: str) -> Steps:
    one: dict[str, Any] = {"one call": partial(call, device, size)}
    fitted = {f"fit {s}": partial(fit, s, device, size) for s in FITTED}
    return (
        one
        | {"fit usq4": fitted.pop("fit usq4")}
        | {"sketches": partial(sketches, device, size)}
        | fitted
        | {"usq4 everywhere": partial(everywhere, device, size)}
    )
