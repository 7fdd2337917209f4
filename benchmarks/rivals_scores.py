"""What single layers cost as other tools measure it, over our coded weights: tables that benchmarks/rivals.py
gives to their searches.

Every score is of one (layer, scheme) in the model as the tool has it: in full precision (ModelOpt, MixDQ), or
with all other layers at their highest scheme (MCT). Sources, read in November 2026: nvidia-modelopt 0.47.0
(AutoQuantizeGradientSearcher), sony/model_optimization (DistanceMetricCalculator,
PytorchImplementation.get_mp_node_distance_fn), thu-nics/MixDQ (quant_content.py, quant_quality.py),
Disty0/sdnq (sdnq_quantize_layer_weight_dynamic).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from aquabit.pipelines import replay_recorder, set_scheduler
from aquabit.quality.paired import mse, ssim
from aquabit.quant.calibration.recording import output_tensor
from aquabit.quant.finetuning.replay import Replay
from aquabit.scheme import FP, Calibration, QuantConfig, Scheme
from benchmarks.common import read, write

IMAGES, SEED = 16, 800_000_001  # seeds that neither measurements, nor probes, nor H use
MCT_IMAGES = 32  # MixedPrecisionQuantizationConfig.num_of_images
MCT_EPS = (
    1e-6  # MixedPrecisionSearchManager: by how much a lower candidate is at least worse than the highest
)
NORM_EPS = 1e-8  # compute_mse
CLAMP = 1e10  # _get_auto_quantize_score
EXACT_DB = 200.0  # the SQNR of an output without error
ACT = 8  # bits of the activations that codes are fitted for

Scored = dict[str, float]  # scheme -> score of one layer


class Layers:
    """A session's model, single weights of which are exchanged. Leaves the model as the last ``at`` says."""

    def __init__(self, session: Any, images: int = IMAGES):
        self.evaluator, self.space = session.here, session.space
        self.modules: dict[str, Any] = self.evaluator.quantized.layers
        self.protocol = replace(session.protocol, images=images, micro_batch=images, seed=SEED)

    def at(self, config: QuantConfig) -> None:
        self.evaluator.quantized.apply(config)

    def weight(self, layer: str, scheme: Scheme) -> Tensor:
        """The decoded weight of a layer, fitted for a8 as measurements use it."""
        full: Tensor = self.evaluator.quantized.full(layer)
        if scheme == FP:
            return full
        config = QuantConfig(
            self.space.fingerprint,
            {layer: self.space.choice(layer, scheme, ACT)},
            calibration=self.space.calibration,
        )
        return self.evaluator.quantized.coded(layer, config).dequantize().to(full.dtype)

    @contextmanager
    def swapped(self, layer: str, weight: Tensor) -> Iterator[None]:
        """One layer with another weight, its activations as they are."""
        module = self.modules[layer]
        before, module.weight = module.weight, weight
        try:
            yield
        finally:
            module.weight = before

    @torch.no_grad()
    def images(self) -> Tensor:
        """Images [n, c, h, w] of the model as it is."""
        evaluator = self.evaluator
        evaluator.pipe.scheduler = evaluator.scheduler
        set_scheduler(evaluator.pipe, self.protocol.scheduler)
        return torch.cat(
            [
                evaluator.adapter.images(self.protocol, batch)
                for batch in evaluator.adapter.batches(self.protocol)
            ]
        )

    def replay(self) -> Replay:
        """The denoiser's calls while the full-precision model makes the images, in two batches."""
        self.at(QuantConfig(self.space.fingerprint, {}))
        p = self.protocol
        calibration = Calibration(
            p.images, p.seed, p.steps, p.scheduler, p.eta, p.guidance, p.resolution, p.conditions
        )
        self.evaluator.pipe.scheduler = self.evaluator.scheduler
        return Replay(
            replay_recorder(self.evaluator.pipe)(calibration, max(1, p.images // 2)),
            self.evaluator.adapter.network,
        )

    def run(self, replay: Replay, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The denoiser's outputs for samples (of one kind), and those of full precision, [n, ...]."""
        (args, kwargs), target = replay.batch(samples, torch.device("cpu"))
        return output_tensor(self.evaluator.adapter.network(*args, **kwargs)), target


def by_kind(replay: Replay, samples: Sequence[int]) -> list[list[int]]:
    """Samples that may share a batch together."""
    found: dict[int, list[int]] = {}
    for i in samples:
        found.setdefault(replay.kind(i), []).append(i)
    return list(found.values())


# ---- tables on disk
# ------------------------------------------------------------------------------------------------------------


def kept(
    path: Path, layers: Sequence[str], score: Callable[[str], Scored], say: Callable[[str, int, int], None]
) -> dict[str, Scored]:
    """layer -> scheme -> score; what the file has is not scored again, and each layer is written as soon
    as it is scored."""
    found: dict[str, Scored] = read(path)
    for done, layer in enumerate(layers, 1):
        if layer not in found:
            found[layer] = score(layer)
            write(path, found)
            say(path.stem, done, len(layers))
    return {k: found[k] for k in layers}


def table(space: Any, found: Mapping[str, Scored]) -> np.ndarray:
    """Scores [L, schemes] of the space; infinite where a layer may not take a scheme, or was not scored."""
    out = np.full((len(space.choices), len(space.schemes)), np.inf)
    for i, (layer, row) in enumerate(space.choices.items()):
        for scheme in row:
            if str(scheme) in found.get(layer, {}):
                out[i, space.schemes.index(scheme)] = found[layer][str(scheme)]
    return out


# ---- scores
# ------------------------------------------------------------------------------------------------------------


def weight_errors(layers: Layers, layer: str) -> Scored:
    """SDNQ: mean squared error of the weight over its variance (``quantization_loss``)."""
    full = layers.weight(layer, FP)
    variance = float(full.std().square().clamp(min=1e-8))
    return {
        str(s): float(mse_loss(full, layers.weight(layer, s))) / variance for s in layers.space.choices[layer]
    }


def ssim_losses(layers: Layers, full: Tensor, layer: str) -> Scored:
    """MixDQ, content layers: 1 - mean SSIM of the final images to full precision's, this layer's weight
    quantized alone."""
    found = {}
    for scheme in layers.space.choices[layer]:
        with layers.swapped(layer, layers.weight(layer, scheme)):
            found[str(scheme)] = 1 - float(ssim(layers.images().nan_to_num(nan=1.0), full).mean())
    return found


@torch.no_grad()
def sqnr_losses(layers: Layers, replay: Replay, layer: str) -> Scored:
    """MixDQ, quality layers: minus the SQNR in dB of the denoiser's output, of all samples of a step
    together, mean over steps."""
    steps = sorted({step for _, _, step in replay.places})
    found = {}
    for scheme in layers.space.choices[layer]:
        signal, noise = dict.fromkeys(steps, 0.0), dict.fromkeys(steps, 0.0)
        with layers.swapped(layer, layers.weight(layer, scheme)):
            for part in by_kind(replay, range(len(replay))):
                output, target = layers.run(replay, part)
                for i, row, wanted in zip(part, output.double(), target.double(), strict=True):
                    step = replay.places[i][2]
                    signal[step] += float(wanted.square().sum())
                    noise[step] += float((row - wanted).square().sum())
        found[str(scheme)] = -float(np.mean([decibels(signal[s], noise[s]) for s in steps]))
    return found


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), at most EXACT_DB; of an output that is not finite -EXACT_DB."""
    if not math.isfinite(noise):
        return -EXACT_DB
    return min(EXACT_DB, 10 * math.log10(signal / noise)) if noise > 0 else EXACT_DB


class FeatureDistance:
    """Sony MCT's distance of the model as it is to full precision: at the output of every Conv2d the mean
    squared error over the mean square, of every Linear (1 - cosine) / 2, each per sample; the mean over
    samples and all layers but the last, plus that of the last.
    """

    def __init__(self, layers: Layers):
        self.layers, self.replay = layers, layers.replay()
        picked = np.unique(np.linspace(0, len(self.replay) - 1, MCT_IMAGES).round().astype(int)).tolist()
        self.parts = by_kind(self.replay, picked)
        self.full = [self._outputs(part) for part in self.parts]

    @torch.no_grad()
    def _outputs(self, part: Sequence[int]) -> dict[str, Tensor]:
        """layer -> output [samples, ...] of its last call, in the order of these calls."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                seen.pop(name, None)
                seen[name] = output.detach()

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in self.layers.modules.items()]
        try:
            self.layers.run(self.replay, part)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def __call__(self) -> float:
        points: dict[str, list[Tensor]] = {}
        for part, full in zip(self.parts, self.full, strict=True):
            for name, output in self._outputs(part).items():
                points.setdefault(name, []).append(distance(full[name], output))
        means = [float(torch.cat(v).nan_to_num(nan=1e3, posinf=1e3).mean()) for v in points.values()]
        return float(np.mean(means[:-1])) + means[-1]


def distance(full: Tensor, other: Tensor) -> Tensor:
    """[samples] of two outputs: of a convolution [n, c, h, w], else of a Linear."""
    a, b = full.double().flatten(1), other.double().flatten(1)
    if full.ndim == 4:
        return (a - b).square().mean(1) / (a.square().mean(1) + NORM_EPS)
    return (1 - cosine_similarity(a, b)) / 2


def feature_losses(
    layers: Layers, measured: FeatureDistance, top: Mapping[str, Scheme], base: float, layer: str
) -> Scored:
    """Sony MCT: the distance where this layer is lower and all others are at their highest, at least
    MCT_EPS above ``base``, theirs."""
    found = {}
    for scheme in layers.space.choices[layer]:
        if scheme == top[layer]:
            found[str(scheme)] = base
            continue
        with layers.swapped(layer, layers.weight(layer, scheme)):
            found[str(scheme)] = max(measured(), base + MCT_EPS)
    return found


def gradient_scores(
    layers: Layers, calls: Mapping[str, Tensor], batch: int, say: Callable[[str, int, int], None]
) -> dict[str, Scored]:
    """NVIDIA ModelOpt: sum over all outputs of all samples of (gradient of the loss x change of the
    layer's output)^2, the change by the coded weight and a8 inputs, one backward pass a batch; the loss is
    the mean squared difference of ``calls``' output to their target. ``fp`` is its choice of no
    quantization: 0."""
    layers.at(QuantConfig(layers.space.fingerprint, {}))
    weights = {
        k: {str(s): layers.weight(k, s) for s in row if s != FP} for k, row in layers.space.choices.items()
    }
    found: dict[str, Scored] = {k: {str(s): 0.0 for s in row} for k, row in layers.space.choices.items()}
    handles = [layers.modules[k].register_forward_hook(_scoring(weights[k], found[k])) for k in weights]
    try:
        count = len(calls["x"])
        for start in range(0, count, batch):
            part = {k: v[start : start + batch] for k, v in calls.items()}
            with torch.enable_grad():
                result = layers.evaluator.adapter.network(
                    part["x"], timestep=part["t"], class_labels=part["y"]
                )
                mse_loss(output_tensor(result.sample)[:, : part["x"].shape[1]], part["target"]).backward()
            say("gradients", min(start + batch, count), count)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _scoring(weights: Mapping[str, Tensor], found: Scored) -> Callable[..., Tensor]:
    """A forward hook that adds to ``found`` as soon as the gradient of the output is known."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        output = (
            output if output.requires_grad else output.detach().requires_grad_()
        )  # weights have no gradient of their own
        with torch.no_grad():
            changes = {k: quantized_output(module, args[0], w) - output for k, w in weights.items()}

        def add(gradient: Tensor) -> None:
            for k, change in changes.items():
                found[k] += float((gradient.float() * change).clamp(-CLAMP, CLAMP).square().sum())

        output.register_hook(add)
        return output

    return hook


def quantized_output(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer answers with another weight and a8 inputs."""
    before = module.weight, module.act
    module.weight, module.act = weight, ACT
    try:
        return module.forward(x)
    finally:
        module.weight, module.act = before


def image_errors(layers: Layers, full: Tensor, configs: Sequence[QuantConfig]) -> list[float]:
    """Mean squared error of the images of each configuration."""
    found = []
    for config in configs:
        layers.at(config)
        found.append(float(mse(layers.images().nan_to_num(nan=1.0), full).mean()))
    return found
