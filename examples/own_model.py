"""A denoiser of your own, that diffusers does not know, through the public functions of aquabit.

    python examples/own_model.py --out own

takes a minute or two on a CPU; ``--samples 4 --images 8 --width 8`` make it smaller.

Two things are yours: a torch network, and a function that makes images with it from seeds, here the sampler
of EDM (Karras et al. 2022, algorithm 1 without churn). ``aquabit.Model`` of the two is taken by every verb in
the place of a pipeline; on the command line it is ``own_model:own_model``, a function that returns it:

    cd examples; aquabit measure own_model:own_model --study own.db
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import aquabit


class Network(nn.Module):
    """Your network: noisy images [n, 1, 8, 8], noise levels and classes [n] to images without the noise."""

    def __init__(self, width: int):
        super().__init__()
        self.level, self.kind = nn.Linear(1, width), nn.Embedding(10, width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor, kinds: Tensor) -> Tensor:
        scale = (1 + sigma**2).rsqrt()[:, None, None, None]
        condition = (self.level(sigma.log()[:, None] / 4) + self.kind(kinds))[:, :, None, None]
        h = self.first(x * scale)
        for layer in self.middle:
            h = h + layer(nn.functional.silu(h + condition))
        return x * scale**2 + self.last(nn.functional.silu(h)) * (1 - scale**2).sqrt()


def sample(net: nn.Module, seeds: list[int], conditions: list[int], steps: int = 4) -> Tensor:
    """Images [n, 1, 8, 8] in [0, 1]: image i from ``seeds[i]`` and ``conditions[i]`` alone. ``net`` is the
    network above, or a copy of it with other weights."""
    device = next(net.parameters()).device
    noise = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    levels = torch.cat([torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7, torch.zeros(1)]).to(
        device
    )
    x, kinds = torch.stack(noise).to(device) * levels[0], torch.tensor(conditions, device=device)
    for now, then in pairwise(levels):
        slope = (x - net(x, now.expand(len(x)), kinds)) / now
        guess = x + (then - now) * slope
        if then > 0:  # Heun's second call
            slope = (slope + (guess - net(guess, then.expand(len(x)), kinds)) / then) / 2
        x = x + (then - now) * slope
    return (x / 2 + 0.5).clamp(0, 1)


def own_model(width: int = 32) -> aquabit.Model:
    """Your trained model; here its weights are random, so that nothing must be trained or downloaded."""
    torch.manual_seed(0)
    return aquabit.Model(Network(width), sample, conditions=range(10), layers={"middle.*": "res.conv"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("own"))
    parser.add_argument("--width", type=int, default=32, help="channels of the network")
    parser.add_argument("--samples", type=int, default=40, help="configurations to measure")
    parser.add_argument("--images", type=int, default=32, help="images of a measurement")
    parser.add_argument("--steps", type=int, default=4, help="steps of the sampler")
    parser.add_argument("--bits", type=float, default=4.0, help="bits per weight of the result")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    model = own_model(given.width)
    graph = aquabit.trace(model)
    print(f"{graph.graph['model_class']}: {graph.graph['weights']:,} weights in layers")

    # There are no real images here, so quality is the distance to the full-precision images, in decibels.
    protocol = aquabit.Protocol(
        images=given.images, steps=given.steps, micro_batch=given.images, objective="psnr"
    )
    study = aquabit.Study(given.out / "study.db")
    space = {"schemes": ["usq2h", "usq3h", "usq4h", "fp"], "activations": [8]}
    bank = str(given.out / "bank")
    count = aquabit.measure(model, study, given.samples, protocol=protocol, space=space, bank=bank)
    print(f"{count} new measurements")

    front = aquabit.find(study, bits=given.bits, pipe=model, bank=bank)
    for member in front.to_list():
        print(f"{member['bits_per_weight']:.2f} bits: {member['measured']['psnr']['value']:.1f} dB")

    packed = aquabit.quantize(model, front.best, bank=bank)
    print(f"{packed.save(given.out / 'packed'):,} bytes in {given.out / 'packed'}")

    again = aquabit.load(given.out / "packed", into=own_model(given.width))
    images = again([0, 1, 2, 3], steps=given.steps)
    print(f"images {list(images.shape)} from codes")


if __name__ == "__main__":
    main()
