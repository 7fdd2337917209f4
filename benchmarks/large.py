"""What large models cost, on random weights: python benchmarks/large.py PART ... [--folder DIR] [--blocks N]

grow       sketches of 4, 8 and 16 schemes on DiTs of 48, 255 and 795 layers: CPU seconds, and what doubling
           the schemes adds
dit        layers of a DiT-XL/2 (9 a block): CPU seconds of `usq4` and `usq4h` of --blocks of its 28 blocks,
           and of sketches of 8 schemes through --blocks of them; scaled to 28 blocks and 10 steps where fewer
           were run, which the table says
ldm4       the layers of a U-Net with LDM-4's shapes at 2x8 codebooks, CPU seconds, two processes: one of each
           shape first, from the smallest on, then the others; continues where it stopped, and the table says
           how many were run
table      benchmarks/results/large.json and large.md, also written at the end of the others

H of the fits is that of random inputs with a falling spectrum. One thread a process.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.additive import LDM4, synthetic
from benchmarks.common import RESULTS, about, machine, parsed, parser, read, say, write
from benchmarks.scale import DIT_XL_2, denoiser

LAYERS = (5, 28, 88)  # blocks of the small DiTs
SCHEMES = tuple(f"usq{b}{g}" for g in ("", "g16", "g32", "g64") for b in (2, 3, 4, 6))  # cheap to fit
COUNTS = (4, 8, 16)
SMALL = {**DIT_XL_2, "sample_size": 16, "num_attention_heads": 4, "attention_head_dim": 32}
WHOLE, STEPS = 28, 10  # blocks of a DiT-XL/2, steps that sketches are stated for
TRIED_STEPS, GROWN = 2, (5, 2)  # steps that are run of a DiT-XL/2; steps and passes of the small ones


def pipeline(config: Mapping[str, Any], blocks: int) -> Any:
    """A DiT pipeline of random weights with a small VAE."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    if config is DIT_XL_2:
        net = denoiser(torch.float32, blocks)
    else:
        net = DiTTransformer2DModel(**config, num_layers=blocks).eval()
    return DiTPipeline(net, vae, DDIMScheduler())


def sketched(pipe: Any, counts: Sequence[int], steps: int, passes: int, folder: Path) -> dict[str, Any]:
    """CPU seconds of ``passes`` backward passes through ``steps`` with 8 images, by number of schemes, which
    are decoded in it; a study takes 4 passes twice."""
    from aquabit.measuring.evaluator import Evaluator
    from aquabit.measuring.model import open_model
    from aquabit.quant.bank import Bank
    from aquabit.scheme import Protocol, QuantConfig, Scheme

    model = open_model(pipe)
    evaluator = Evaluator(pipe, model.graph, Bank(folder / "bank"), model.fingerprint)
    layers = list(evaluator.quantized.layers)
    names = SCHEMES[: max(counts)]
    evaluator.quantized.fitter.facts(layers, {k: [Scheme.parse(s) for s in names] for k in layers}, None)
    protocol = Protocol(images=8, steps=steps, micro_batch=8, objective="mse", conditions=(1,))
    like, seconds = QuantConfig(model.fingerprint, {}), dict[int, float]()
    evaluator.sketches(dict.fromkeys(layers, names[:1]), (8,), replace(protocol, steps=1), 0, 1, like)  # warm
    for n in counts:
        choices = dict.fromkeys(layers, names[:n])
        began = time.process_time()
        found = evaluator.sketches(choices, (8,), protocol, 0, passes, like)
        seconds[n] = time.process_time() - began
        assert not found["untold"]
        say(f"{len(layers)} layers, {n} schemes", 1, 1)
    weights = sum(layer.weight.numel() for layer in evaluator.quantized.layers.values())
    return {"layers": len(layers), "weights": weights, "seconds": {str(n): s for n, s in seconds.items()}}


def grow(folder: Path) -> list[dict[str, Any]]:
    return [sketched(pipeline(SMALL, blocks), COUNTS, *GROWN, folder) for blocks in LAYERS]


@cache
def hessian(width: int) -> Tensor:
    return synthetic((64, width), quick=True)[1]


def dit(folder: Path, blocks: int) -> dict[str, Any]:
    from aquabit.measuring import gradient_damages as g
    from aquabit.quant.weights import quantize_weight, relative_error

    net = denoiser(torch.float32, blocks)
    shapes = {n: m.weight for n, m in net.named_modules() if hasattr(m, "weight") and m.weight is not None}
    weights = {n: w for n, w in shapes.items() if w.ndim in (2, 4) and "emb" not in n.split(".")[-1]}
    found: dict[str, Any] = {"blocks": blocks, "fits": {}}
    for scheme in ("usq4", "usq4h"):
        inside = outside = 0.0
        for name, weight in weights.items():
            h = hessian(math.prod(weight.shape[1:])) if scheme.endswith("h") else None
            began = time.process_time()
            relative_error(weight, quantize_weight(weight, scheme, h))
            spent = time.process_time() - began
            inside, outside = (inside + spent, outside) if "blocks." in name else (inside, outside + spent)
        found["fits"][scheme] = inside / blocks * WHOLE + outside
        say(f"{scheme} of {len(weights)} layers", 1, 1)
    del net
    one = sketched(pipeline(DIT_XL_2, blocks), (8,), TRIED_STEPS, 1, folder)
    passes = g.PASSES * g.IMAGES // 8
    # what embeddings and the last layer cost is scaled with the blocks, which overstates it
    found["sketches"] = one["seconds"]["8"] * passes * STEPS / TRIED_STEPS * WHOLE / blocks
    found["passes"] = passes * STEPS
    return found


def ldm4_shapes() -> list[tuple[str, tuple[int, ...]]]:
    from aquabit.graph import layers, meta_denoiser, trace

    config = {k: v for k, v in LDM4.items() if k != "class"}
    nodes = layers(trace(meta_denoiser(str(LDM4["class"]), config)))
    every = [(n, tuple(a["shape"])) for n, a in nodes.items()]
    first = {shape: (name, shape) for name, shape in reversed(every)}
    by_size = sorted(first.values(), key=lambda p: math.prod(p[1]))
    return [*by_size, *(each for each in every if each not in by_size)]


def fitted(name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    from aquabit.quant.weights import quantize_weight

    torch.set_num_threads(1)
    weight, h = synthetic(shape, quick=True)
    began = time.process_time()
    quantize_weight(weight, "aq2x8k" if shape[2:] == (3, 3) else "aq2x8g8", h)
    return name, time.process_time() - began


def ldm4(folder: Path) -> dict[str, Any]:
    path, shapes = folder / "ldm4.json", ldm4_shapes()
    kept: dict[str, Any] = read(path, {"layers": {}})
    left = [s for s in shapes if s[0] not in kept["layers"]]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for future in [pool.submit(fitted, *each) for each in left]:
            name, seconds = future.result()
            kept["layers"][name] = seconds
            write(path, kept)
            say("LDM-4 at 2x8", len(kept["layers"]), len(shapes))
    return ldm4_so_far(folder)


def ldm4_so_far(folder: Path) -> dict[str, Any]:
    """CPU seconds of all layers: those that were run, for another the mean of its shape, and of a shape of
    which none was run what the largest shapes that were took a weight."""
    shapes, ran = ldm4_shapes(), read(folder / "ldm4.json", {"layers": {}})["layers"]
    times: dict[tuple[int, ...], list[float]] = {}
    for name, shape in shapes:
        times.setdefault(shape, []).extend([ran[name]] if name in ran else [])
    known = sorted((s for s, own in times.items() if own), key=math.prod)
    rate = max(sum(times[s]) / len(times[s]) / math.prod(s) for s in known[-3:])
    means = {s: sum(own) / len(own) if own else rate * math.prod(s) for s, own in times.items()}
    return {
        "machine": machine(),
        "layers": len(shapes),
        "weights": sum(math.prod(shape) for _, shape in shapes),
        "ran": len(ran),
        "ran_weights": sum(math.prod(shape) for name, shape in shapes if name in ran),
        "shapes": len(times),
        "ran_shapes": len(known),
        "cpu": sum(means[shape] for _, shape in shapes),
        "wide": {"x".join(map(str, s)): sum(times[s]) / len(times[s]) for s in known[-3:]},
    }


def table(results: Mapping[str, Any]) -> str:
    lines = ["# What large models cost", "", f"{about(results['machine'])}. Made by `{results['command']}`."]
    if "grow" in results:
        lines += [
            "",
            "## Sketches: the cost grows with weights, not with layers x schemes",
            "",
            f"CPU seconds of {GROWN[1]} backward passes of 8 images through {GROWN[0]} steps; 128 channels.",
            "",
            "| layers | weights, M | 4 schemes | 8 schemes | 16 schemes | 8 over 4 | 16 over 8 |"
            " ms a layer, 8 schemes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in results["grow"]:
            four, eight, sixteen = (r["seconds"][str(n)] for n in COUNTS)
            lines.append(
                f"| {r['layers']} | {r['weights'] / 1e6:.1f} | {four:.2f} | {eight:.2f} | {sixteen:.2f} |"
                f" {eight / four:.3f} | {sixteen / eight:.3f} | {1e3 * eight / r['layers']:.1f} |"
            )
    if "dit" in results:
        r = results["dit"]
        lines += [
            "",
            "## DiT-XL/2: 255 layers, 675 million weights",
            "",
            f"CPU minutes of one thread, from {r['blocks']} of the 28 blocks (sketches: {TRIED_STEPS} of"
            f" {STEPS} steps); two cores take half where both are busy.",
            "",
            "| what | CPU minutes | on two cores | asked |",
            "|---|---|---|---|",
            *(
                f"| `{s}` of all layers | {v / 60:.1f} | {v / 120:.1f} | {asked} |"
                for (s, v), asked in zip(r["fits"].items(), ("1", "15"), strict=True)
            ),
            f"| sketches of 8 schemes, {r['passes']} backward passes of 8 images | {r['sketches'] / 60:.1f} |"
            f" {r['sketches'] / 120:.1f} | 20 |",
        ]
    if "ldm4" in results:
        r = results["ldm4"]
        lines += [
            "",
            "## LDM-4's shapes at 2x8",
            "",
            f"{about(r['machine'])}. {r['layers']} layers, {r['weights'] / 1e6:.0f} million weights:"
            f" {r['cpu'] / 60:.1f} CPU minutes, half of that on two cores where both are busy (asked: 40"
            f" minutes). {r['ran']} layers of {r['ran_weights'] / 1e6:.0f} million weights were run,"
            f" {r['ran_shapes']} of {r['shapes']} shapes; others are taken to cost what their shape, or a"
            " weight of the widest that ran, did. Seconds of the widest that ran: "
            + ", ".join(f"{shape} {seconds:.0f}" for shape, seconds in r["wide"].items())
            + ".",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    made = parser(__doc__, ("grow", "dit", "ldm4", "table"), "large-work")
    made.add_argument("--blocks", type=int, default=2, help="of a DiT-XL/2")
    given = parsed(made)
    ways = {"grow": lambda f: grow(f), "dit": lambda f: dit(f, given.blocks), "ldm4": ldm4}
    found = read(RESULTS / "large.json")
    for part in given.parts:
        if part in ways:
            found |= {part: ways[part](given.folder)}
            found |= {} if part == "ldm4" else {"machine": machine()}  # that one names its own
    if (given.folder / "ldm4.json").exists():
        found["ldm4"] = ldm4_so_far(given.folder)
    write(RESULTS / "large.json", found)
    (RESULTS / "large.md").write_text(table(found))


if __name__ == "__main__":
    main()
