"""Additive quantization's figures: python benchmarks/additive.py PART ... [--folder DIR] [--models ...]

baseline   AQLM's published procedure (benchmarks/aqlm_plain.py) on every layer below; hours, each layer kept
           in --folder
layers     ours on the same layers, H and formats: weighted error and CPU seconds, one thread each, beside the
           baseline's
large      all layers of a 400 M-parameter U-Net with LDM-4's shapes, extrapolated from up to three layers of
           each class (an
           estimate; the widest class is not timed)
families   USQ, VQ and AQ, output-aware, at the same bytes near 1.5, 2, 3 and 4 bits: FID and PSNR on fresh
           seeds, both bundled models
ablation   kernel slices (KAQ) against groups across channels, and formats per layer (LAQ) against one for
           all, at the same bytes

Tables go to benchmarks/results/additive.json and additive.md. Everything continues where it stopped.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.aqlm_plain import aqlm, output_loss
from benchmarks.common import (
    about,
    difference,
    mean,
    measured_blocks,
    open_study,
    parsed,
    parser,
    read,
    run_parts,
    spans,
    write,
)

SYNTHETIC = {
    "linear 1152 x 1152": (1152, 1152),
    "conv 3x3 384 -> 384": (384, 384, 3, 3),
    "linear 4608 x 1152": (4608, 1152),
}
FORMATS = ("2x8", "2x6", "4x4")
TRAINED = {  # five layers a model, of different operators and shapes
    "digits-dit": (
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.3.attn1.to_out.0",
        "transformer_blocks.2.ff.net.0.proj",
        "transformer_blocks.5.ff.net.2",
        "transformer_blocks.4.attn1.to_v",
    ),
    "digits-unet": (
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv2",
        "mid_block.attentions.0.to_q",
        "mid_block.resnets.0.conv1",
        "up_blocks.1.resnets.0.conv1",
    ),
}
QUICK = 4  # beam
LARGEST = (
    13  # log2 of the inputs of the largest layers that are timed: those above take five minutes and more each
)
TRAINED_FORMATS = ("2x6", "4x4")


@dataclass(frozen=True)
class Case:
    """A layer, its H and a format."""

    name: str
    format: str  # as in 2x8
    weight: Tensor
    hessian: Tensor

    @property
    def scheme(self) -> str:
        """Kernel slices for k x k convolutions, else groups of 8."""
        return f"aq{self.format}" + ("k" if self.weight.ndim == 4 and self.weight.shape[2] > 1 else "g8")

    @property
    def file(self) -> str:
        return f"{self.name} {self.format}".replace(" ", "-").replace(">", "")


def synthetic(shape: tuple[int, ...], seed: int = 0, quick: bool = False) -> tuple[Tensor, Tensor]:
    """Gaussian weights with rows of different size, and H = X^T X / n + 1 % of its mean diagonal from 4 R
    inputs whose spectrum falls as a power law, mixed by a random rotation, with channels of different size.
    ``quick``: R inputs, mixed by permutation.
    """
    g, row = torch.Generator().manual_seed(seed), int(torch.tensor(shape[1:]).prod())
    weight = (
        torch.randn(shape[0], row, generator=g)
        * torch.exp(0.3 * torch.randn(shape[0], 1, generator=g))
        * 0.02
    )
    inputs = (
        torch.randn(row if quick else 4 * row, row, generator=g) * torch.arange(1, row + 1).float() ** -0.5
    )
    if quick:
        inputs = inputs[:, torch.randperm(row, generator=g)]
    else:
        inputs = (
            inputs
            @ torch.linalg.qr(torch.randn(row, row, generator=g))[0]
            * torch.exp(0.5 * torch.randn(row, generator=g))
        )
    hessian = inputs.T @ inputs / len(inputs)
    return weight.reshape(shape), hessian + 0.01 * hessian.diagonal().mean() * torch.eye(row)


def cases(trained: bool = True) -> Iterator[Case]:
    """Trained layers first: they are quick."""
    if trained:
        for model, names in TRAINED.items():
            for name, (weight, hessian) in trained_layers(model, names).items():
                for form in TRAINED_FORMATS:
                    yield Case(f"{model} {name}", form, weight, hessian)
    for name, shape in SYNTHETIC.items():
        weight, hessian = synthetic(shape)
        for form in FORMATS:
            yield Case(name, form, weight, hessian)


def trained_layers(
    model: str, names: tuple[str, ...], bank: str | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and H (activations at 8 bits) of some layers of a bundled model."""
    from aquabit.measuring.evaluator import Evaluator
    from aquabit.measuring.model import open_model
    from aquabit.quant.bank import Bank
    from aquabit.scheme import Calibration

    opened = open_model(model)
    quantized = Evaluator(model, opened.graph, Bank(bank), opened.fingerprint).quantized
    known = quantized.calibrator.moments(names, [8], Calibration())
    return {name: (quantized.full(name).float(), known[name, 8].hessian) for name in names}


def baseline(folder: Path, trained: bool = True) -> None:
    """AQLM on every case that has no result yet."""
    aqlm(
        torch.randn(16, 16), torch.eye(16), 1, 2, 8, max_rounds=1
    )  # what torch loads on first use is not timed
    for case in cases(trained):
        path = folder / f"aqlm-{case.file}.json"
        if path.exists():
            continue
        m, b = map(int, case.format.split("x"))
        size = case.weight[0, 0].numel() if case.scheme.endswith("k") else 8
        rows = case.weight.reshape(len(case.weight), -1)
        found = aqlm(
            rows,
            case.hessian,
            m,
            b,
            size,
            callback=lambda phase, s, loss, case=case: print(case.file, phase, s, loss, flush=True),
        )
        norm = output_loss(rows, case.hessian.double())
        history = [(phase, s, loss / norm) for phase, s, loss in found.history]
        row = {"error": found.loss / norm, "cpu_s": found.history[-1][1], "rounds": found.rounds}
        write(path, row | {"history": history})


def layers(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """Ours beside the baseline, with the default beam and with one of QUICK. AQLM's tables and scales stay
    in float32; ours are rounded as they are stored."""
    from aquabit.quant.calibration.hessian import output_error
    from aquabit.quant.schemes.aq import BEAM, additive
    from aquabit.scheme import Scheme

    baseline(folder)
    additive([torch.randn(64, 64)], Scheme.parse("aq2x4g8"), [torch.eye(64)])
    rows = []
    for case in cases():
        scheme = Scheme.parse(case.scheme)

        def timed(beam: int, most: int, case: Case = case, scheme: Any = scheme) -> tuple[float, float]:
            seconds: list[float] = []
            while len(seconds) < most and sum(seconds) < 10:
                started = time.process_time()
                coded = additive([case.weight], scheme, [case.hessian], beam=beam)[0]
                seconds.append(time.process_time() - started)
            return output_error(case.weight, coded.dequantize(), case.hessian), statistics.median(seconds)

        (error, cpu), (quick_error, quick_cpu) = timed(BEAM, 3), timed(QUICK, 3)
        theirs = read(folder / f"aqlm-{case.file}.json")
        rows.append(
            {
                "layer": case.name,
                "shape": list(case.weight.shape),
                "scheme": case.scheme,
                "error": error,
                "cpu_s": cpu,
                "quick_error": quick_error,
                "quick_cpu_s": quick_cpu,
                "aqlm_error": theirs["error"],
                "aqlm_cpu_s": theirs["cpu_s"],
                "aqlm_rounds": theirs["rounds"],
            }
        )
        print(rows[-1], flush=True)
    return rows


LDM4 = {
    "class": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (192, 384, 576, 960),
    "layers_per_block": 2,
    "down_block_types": (
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
    ),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 512,
    "attention_head_dim": 32,
}


def large(folder: Path, models: list[str], scheme: str = "aq2x8g8", samples: int = 3) -> list[dict[str, Any]]:
    """Layers of a U-Net with LDM-4's shapes by class (kind, kernel, and inputs by powers of two): the
    median CPU seconds a weight of three random layers of a class (fewer where it has no more shapes),
    times the class's weights; two cores take half where both are busy. A class above LARGEST has twice the
    rate of the class of half its inputs."""
    import math
    import random

    from aquabit.graph import layers as graph_layers
    from aquabit.graph import meta_denoiser, trace
    from aquabit.quant.weights import quantize_weight

    config = {k: v for k, v in LDM4.items() if k != "class"}
    nodes = graph_layers(trace(meta_denoiser(str(LDM4["class"]), config)))
    classes: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for node in nodes.values():
        shape = tuple(node["shape"])
        classes.setdefault(
            ("x".join(map(str, shape[2:])) or "linear", round(math.log2(math.prod(shape[1:])))), []
        ).append(shape)
    rows = []
    for (kind, size), shapes in sorted(classes.items(), key=lambda item: item[0][::-1]):
        path = folder / f"large-{kind}-{size}.json"
        if not path.exists() and size <= LARGEST:
            picked = random.Random(0).sample(shapes, min(samples, len(shapes)))
            rates = []
            for i, shape in enumerate(picked):
                weight, hessian = synthetic(shape, i, quick=True)
                started = time.process_time()
                quantize_weight(weight, scheme.replace("g8", "k") if kind == "3x3" else scheme, hessian)
                rates.append((time.process_time() - started) / weight.numel())
                print(kind, shape, rates[-1] * weight.numel(), flush=True)
            write(path, {"rates": rates, "picked": picked})
        below = folder / f"large-{kind}-{size - 1}.json"
        found = read(path) or {"picked": [], "rates": [2 * r for r in read(below)["rates"]]}
        weights = sum(math.prod(s) for s in shapes)
        rows.append(
            {
                "kernel": kind,
                "inputs": 2**size,
                "layers": len(shapes),
                "weights": weights,
                "timed": found["picked"],
                "s_per_million": 1e6 * statistics.median(found["rates"]),
                "cpu_s": weights * statistics.median(found["rates"]),
            }
        )
    return rows


def session_of(folder: Path, model: str) -> Any:
    """A study of everything that the comparisons choose from, each fitted with H at a8 and probed."""
    space = {
        "schemes": [
            *(f"{k}{b}h" for k in ("usq", "vq") for b in (1, 2, 3, 4)),
            "aq2x8g8",
            "aq2x8k",
            "aq2x6g8",
            "aq2x6k",
            "aq4x4g8",
            "aq4x4k",
        ],
        "levels": [1.5, 2, 3, 4],
        "activations": [8],
    }
    return open_study(folder / f"families-{model}.db", model, space=space)


BLOCKS = (21, 22, 23, 24, 25, 26, 27, 28)  # of fresh seeds; the flow's are 11 to 15


def measured(session: Any, configs: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """name -> metric -> values on each block of fresh seeds."""
    protocols = [session.protocol.block(b) for b in BLOCKS]
    return measured_blocks(session, configs, protocols, ("fid", "psnr"))


def described(
    session: Any, name: str, config: Any, values: dict[str, dict[str, list[float]]], against: Sequence[str]
) -> dict[str, Any]:
    cost = session.costs(config)
    row = {
        "name": name,
        "bytes": cost.bytes,
        "bits": cost.bits_per_weight,
        "operations": cost.operations / float(session.costs.macs.sum()),
        "fid": mean(values[name]["fid"]),
        "psnr": mean(values[name]["psnr"]),
        "formats": dict(Counter(str(c.weight) for c in config.layers.values())),
    }
    others = [other for other in against if other != name and other in values and config.layers]
    return {
        **row,
        "differences": {
            o: {m: difference(values[name][m], values[o][m]) for m in ("fid", "psnr")} for o in others
        },
    }


def families(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """At the bytes of uniform usq2h, usq3h and usq4h, and at 3/4 of the first: each family's formats mixed
    by one integer program on the same errors (the damage that probes saw), never more bytes; uniform usq
    and full precision are there too."""
    from aquabit.scheme import Budget
    from benchmarks.research.assign import assign

    rows = []
    for model in models:
        with session_of(folder, model) as session:
            errors = {k: v["damage"] for k, v in session.study.features().items() if "damage" in v}
            for bits in (1.5, 2, 3, 4):
                configs: dict[str, Any] = {"full precision": session.space.full_precision()}
                if bits == 1.5:  # where no uniform usq is: three quarters of usq2h's weights
                    budget = Budget(bits=0.75 * session.costs(session.space.uniform("usq2h")).bits_per_weight)
                else:
                    configs[f"USQ uniform {bits}"] = session.space.uniform(f"usq{bits}h")
                    budget = Budget(bytes=session.costs(configs[f"USQ uniform {bits}"]).bytes)
                for kind in ("usq", "vq", "aq"):
                    keep = lambda layer, s, kind=kind: s.kind == kind  # noqa: E731
                    configs[f"{kind.upper()} {bits}"] = assign(
                        session.model.graph, session.space, budget, errors, keep
                    )
                values = measured(session, configs)
                for name, config in configs.items():
                    against = (f"USQ {bits}", f"USQ uniform {bits}")
                    rows.append(
                        {"model": model, "target": bits, **described(session, name, config, values, against)}
                    )
                    print(rows[-1], flush=True)
    return rows


def ablation(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """At one format's exact bytes: formats per layer (LAQ; by expected error on Gaussian weights, and by
    probes) against that format in all layers; and kernel slices (KAQ) against groups across channels in the k
    x k convolutions, everything else free in both.
    """
    from aquabit.scheme import Budget
    from benchmarks.research.assign import assign

    rows = []
    for model in models:
        with session_of(folder, model) as session:
            graph, space = session.model.graph, session.space
            errors = {k: v["damage"] for k, v in session.study.features().items() if "damage" in v}
            for scheme in ("aq2x6g8", "aq4x4g8", "aq2x8g8"):
                one = space.uniform(scheme)
                budget = Budget(bytes=session.costs(one).bytes)
                configs = {
                    f"{scheme} everywhere": one,
                    f"LAQ, expected errors ({scheme})": assign(graph, space, budget),
                    f"LAQ, probed errors ({scheme})": assign(graph, space, budget, errors),
                }
                values = measured(session, configs)
                rows += [
                    {
                        "model": model,
                        "question": "LAQ",
                        **described(session, n, c, values, [f"{scheme} everywhere"]),
                    }
                    for n, c in configs.items()
                ]
            if not any(a > 1 for a in (space.kernel_area or {}).values()):
                continue
            for bits in (1.8, 2):
                budget = Budget(bits=session.costs(space.uniform("usq2h")).bits_per_weight * bits / 2)

                def kernels(layer: str, s: Any, slices: bool, space: Any = space) -> bool:
                    return s.kind == "aq" and (space.kernel_area[layer] == 1 or (s.group is None) == slices)

                configs = {
                    f"KAQ {bits}": assign(graph, space, budget, errors, lambda k, s: kernels(k, s, True)),
                    f"across channels {bits}": assign(
                        graph, space, budget, errors, lambda k, s: kernels(k, s, False)
                    ),
                }
                values = measured(session, configs)
                rows += [
                    {
                        "model": model,
                        "question": "KAQ",
                        **described(session, n, c, values, [f"across channels {bits}"]),
                    }
                    for n, c in configs.items()
                ]
    return rows


def markdown(found: dict[str, Any]) -> str:
    lines = [
        f"# Additive quantization\n\n{about(found['machine'])}. Made by `{found['command']}`, part by part.\n"
    ]
    if "layers" in found:
        lines.append(
            "## One layer, against AQLM's published procedure\n\nRelative output error tr(dW H dW^T) / tr(W"
            " H W^T), and CPU seconds of one thread, as ours (share of AQLM's). AQLM's tables are float32,"
            f" ours float16 as stored. Quick: a beam of {QUICK}.\n\n| layer | scheme | AQLM | error | quick |"
            " AQLM, s | time | quick |\n|---|---|---|---|---|---|---|---|"
        )
        lines += [
            f"| {r['layer']} | {r['scheme']} | {r['aqlm_error']:.5f} | {r['error']:.5f}"
            f" ({r['error'] / r['aqlm_error']:.2f}) | {r['quick_error']:.5f}"
            f" ({r['quick_error'] / r['aqlm_error']:.2f}) | {r['aqlm_cpu_s']:.1f} | {r['cpu_s']:.2f}"
            f" (1/{r['aqlm_cpu_s'] / r['cpu_s']:.0f}) | {r['quick_cpu_s']:.2f}"
            f" (1/{r['aqlm_cpu_s'] / r['quick_cpu_s']:.0f}) |"
            for r in found["layers"]
        ]
        here = {
            (r["layer"], r["scheme"].removeprefix("aq").rstrip("k").removesuffix("g8"))
            for r in found["layers"]
        }
        absent = [f"{name} at {form}" for name in SYNTHETIC for form in FORMATS if (name, form) not in here]
        lines += (
            [f"\nNot here, since the baseline did not come to its end: {', '.join(absent)}."]
            if absent
            else []
        )
    if "large" in found:
        rows = found["large"]
        lines.append(
            "\n## All layers of a U-Net with LDM-4's shapes at 2x8: an estimate\n\nCPU seconds of one thread"
            " from up to three random layers of each class (random weights, synthetic H); a class with none"
            " timed has twice the rate of the class of half its inputs.\n\n| kernel | inputs, about | layers"
            " | timed | weights, M | CPU s a million weights | CPU s |\n|---|---|---|---|---|---|---|"
        )
        lines += [
            f"| {r['kernel']} | {r['inputs']} | {r['layers']} | {len(r['timed'])} | {r['weights'] / 1e6:.1f}"
            f" | {r['s_per_million']:.2f} | {r['cpu_s']:.0f} |"
            for r in rows
        ]
        total = sum(r["cpu_s"] for r in rows)
        lines.append(
            f"| all | | {sum(r['layers'] for r in rows)} | {sum(len(r['timed']) for r in rows)} |"
            f" {sum(r['weights'] for r in rows) / 1e6:.1f} | | {total:.0f} |\n\nTwo busy cores: about"
            f" {total / 120:.0f} minutes (half of the CPU time)."
        )

    for part, title, first in (
        ("families", "Families at equal bytes, a8", "target"),
        ("ablation", "Ablations at equal bytes, a8", "question"),
    ):
        if part in found:
            lines.append(
                f"\n## {title}\n\nMeans over {len(BLOCKS)} blocks of 128 fresh seeds with 95 % intervals;"
                f" differences are paired.\n\n| model | {first} | configuration | bytes | bits | operations /"
                " dense | FID | PSNR | differences: FID; PSNR |\n|---|---|---|---|---|---|---|---|---|"
            )
            for r in found[part]:
                ends = "<br>".join(
                    f"to {o}: {spans(d['fid'])}; {spans(d['psnr'])}" for o, d in r["differences"].items()
                )
                lines.append(
                    f"| {r['model']} | {r[first]} | {r['name']} | {r['bytes']:,} | {r['bits']:.3f} |"
                    f" {r['operations']:.2f} | {spans(r['fid'])} | {spans(r['psnr'])} | {ends} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    known = {"layers": layers, "large": large, "families": families, "ablation": ablation}
    given = parsed(parser(__doc__, ["baseline", *known, "all"], "additive-runs"))
    if "baseline" in given.parts:
        baseline(given.folder)
    wanted = [p for p in given.parts if p != "baseline"]
    parts = {name: partial(part, given.folder, given.models) for name, part in known.items()}
    run_parts("additive", parts, wanted, markdown)


if __name__ == "__main__":
    main()
