"""PTQD's noise correction, measured: python benchmarks/correction.py PART ... [--folder DIR] [--models ...]

synthetic   eps_q of known slope, bias per channel and residual: how often nominal 95 % intervals cover the
            truth, 100 seeds
corrections none, CNC, CNC + BC, + VSC at eta 1; none, CNC, CNC + BC, matched sampler, Q-Drift's rule at eta
            0; W4A6, W3A6 and W2A8, weights rounded
            plainly and output-aware, both bundled models, clipping off: FID, sFID, IS, PSNR to full precision
            on fresh seeds, paired
images      the same correction from statistics of 8 to 256 images
other       CNC + BC, and VSC where it is defined, under DDPM, Euler ancestral, DPM-Solver++ and guidance 2

Tables go to benchmarks/results/correction.json and correction.md. Everything continues where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import difference, mean, measured_blocks, open_study, parsed, parser, run_parts, spans

BLOCKS = (
    31,
    32,
    33,
    34,
    35,
    36,
)  # of fresh seeds; the flow's are 11 to 15, the additive quantizer's 21 to 28
IMAGES = 256  # a block
METRICS = ("fid", "sfid", "is", "psnr")
WIDTHS = {"W4A6": (4, 6), "W3A6": (3, 6), "W2A8": (2, 8)}
AT_ETA = {1.0: (None, "cnc", "cnc+bc", "cnc+bc+vsc"), 0.0: (None, "cnc", "cnc+bc", "cnc+bc+match", "qdrift")}
OTHER = {
    "ddpm": {"scheduler": "ddpm"},
    "euler-ancestral": {"scheduler": "euler-ancestral"},
    "dpm": {"scheduler": "dpm"},
    "ddim, guidance 2": {"guidance": 2.0},
}


def synthetic(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """Coverage over 100 seeds of 64 images with channel means, biases and residuals that differ, and
    effects of whole images in the residual."""
    from aquabit.quant.correction.noise import NoiseSums, bootstrap

    k, bias, spread = 0.07, np.array([0.02, -0.05, 0.1]), np.array([0.1, 0.2, 0.05])
    means, shared = torch.tensor([0.5, -1.0, 0.2])[:, None, None], 0.01
    truth = {"k": np.array([k]), "bias": bias, "variance": spread**2 + shared**2}
    hits = {name: np.zeros_like(value) for name, value in truth.items()}
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape, g=g: torch.randn(64, 3, *shape, generator=g)  # noqa: E731
        eps = draw(8, 8) + means + 0.3 * draw(1, 1)
        rest = (
            draw(8, 8) * torch.from_numpy(spread).float()[:, None, None]
            + torch.from_numpy(bias).float()[:, None, None]
            + shared * draw(1, 1)
        )
        sums = NoiseSums()
        sums.add(eps[None], (eps + k * eps + rest)[None])
        low, high = bootstrap(*sums.joined(), seed=seed)
        for name, value in truth.items():
            hits[name] += (np.ravel(getattr(low, name)) <= value) & (value <= np.ravel(getattr(high, name)))
    return [
        {"parameter": name, "channel": c, "truth": float(truth[name][c]), "covered": int(n)}
        for name, row in hits.items()
        for c, n in enumerate(row)
    ]


def session_of(folder: Path, model: str) -> Any:
    """A study that knows the uniform schemes; the blocks of fresh seeds are measured in it."""
    space = {
        "schemes": [f"usq{b}{h}" for b in (2, 3, 4) for h in ("", "h")],
        "levels": [],
        "activations": [8, 6],
    }
    return open_study(folder / f"correction-{model}.db", model, space=space)


def blocks_of(session: Any, **changes: Any) -> list[Any]:
    return [replace(session.protocol.block(b), images=IMAGES, **changes) for b in BLOCKS]


def measured(
    session: Any, configs: Mapping[str, Any], protocols: Sequence[Any]
) -> dict[str, dict[str, list[float]]]:
    """name -> metric -> values on each block."""
    return measured_blocks(session, configs, protocols, METRICS)


def compared(values: Mapping[str, Mapping[str, Sequence[float]]], first: str) -> list[dict[str, Any]]:
    """Means with 95 % intervals over blocks, and paired differences to ``first``."""
    return [
        {
            "name": name,
            **{m: mean(found[m]) for m in METRICS},
            "differences": (
                {}
                if name in (first, "full precision")
                else {m: difference(found[m], values[first][m]) for m in METRICS}
            ),
        }
        for name, found in values.items()
    ]


def corrections(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        with session_of(folder, model) as session:
            for eta, kinds in AT_ETA.items():
                protocols = blocks_of(session, eta=eta)
                for width, (bits, act) in WIDTHS.items():
                    for fit in ("", "h"):
                        base = session.space.uniform(f"usq{bits}{fit}", act)
                        configs = {"full precision": session.space.full_precision()}
                        configs |= {kind or "none": replace(base, correction=kind) for kind in kinds}
                        found = compared(measured(session, configs, protocols), "none")
                        about = {
                            "model": model,
                            "eta": eta,
                            "width": width,
                            "weights": f"usq{bits}{fit}",
                            "bytes": session.costs(base).bytes,
                        }
                        rows += [{**about, **row} for row in found]
                        print(
                            *(f"{r['name']} {r['fid'][0]:.2f} {r['psnr'][0]:.1f};" for r in found),
                            model,
                            eta,
                            width,
                            fit,
                            flush=True,
                        )
    return rows


def images(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """How many images the statistics take: the correction of one configuration measured on fewer and more,
    on the same fresh seeds."""
    from aquabit.quant.correction.corrector import Corrector
    from aquabit.quant.correction.sampling import following
    from aquabit.scheme import Calibration

    rows = []
    for model in models:
        with session_of(folder, model) as session:
            here, config = session.here, session.space.uniform("usq3", 6)
            protocols = blocks_of(session)[:5]
            values: dict[str, dict[str, list[float]]] = {}
            for count in (8, 16, 64, 256):
                statistics = here.noise(config, replace(Calibration.of(protocols[0]), images=count))
                values[str(count)] = {m: [] for m in METRICS}
                for protocol in protocols:
                    here.quantized.apply(config)
                    with following(
                        here.adapter.network, here.pipe.scheduler, [Corrector(statistics, "cnc+bc")]
                    ):
                        made = torch.cat(
                            [here.adapter.images(protocol, b) for b in here.adapter.batches(protocol)]
                        )
                    quality = here.meter.quality(None)
                    quality.update(made, here.full_precision(protocol), here.adapter.conditions(protocol))
                    found = quality.compute()
                    for m in METRICS:
                        values[str(count)][m].append(found[m])
                print(
                    model,
                    count,
                    np.mean(values[str(count)]["fid"]),
                    np.mean(values[str(count)]["psnr"]),
                    flush=True,
                )
            rows += [{"model": model, **row} for row in compared(values, "64")]
    return rows


def other(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        with session_of(folder, model) as session:
            base = session.space.uniform("usq3", 6)
            for name, changes in OTHER.items():
                kinds = (
                    (None, "cnc+bc", "cnc+bc+vsc")
                    if name in ("ddpm", "euler-ancestral")
                    else (None, "cnc+bc")
                )
                configs = {"full precision": session.space.full_precision()} | {
                    k or "none": replace(base, correction=k) for k in kinds
                }
                found = compared(measured(session, configs, blocks_of(session, **changes)[:5]), "none")
                rows += [{"model": model, "sampler": name, **row} for row in found]
                print(
                    *(f"{r['name']} {r['fid'][0]:.2f} {r['psnr'][0]:.1f};" for r in found),
                    model,
                    name,
                    flush=True,
                )
    return rows


def metrics_table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Markdown rows: the keys, then each metric with its interval, and its paired difference to the
    uncorrected model."""
    head = [*keys, "correction", "FID", "sFID", "IS", "PSNR, dB", "difference to none: FID", "sFID", "PSNR"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        psnr = "" if r["name"] == "full precision" else spans(r["psnr"], 1)
        apart = [spans(r["differences"][m]) if r["differences"] else "" for m in ("fid", "sfid", "psnr")]
        cells = [
            *(str(r[k]) for k in keys),
            r["name"],
            spans(r["fid"]),
            spans(r["sfid"]),
            spans(r["is"]),
            psnr,
            *apart,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(found: Mapping[str, Any]) -> str:
    m = found["machine"]
    lines = [
        f"# PTQD's noise correction\n\n{m['cpu']}, {m['cores']} cores, torch {m['torch']}. Made by"
        f" `{found['command']}`, part by part.\n"
    ]
    note = (
        f"Means over blocks of {IMAGES} fresh seeds with 95 % intervals (Student's t); differences are"
        " paired, negative FID and positive PSNR are better."
    )
    if "synthetic" in found:
        lines.append(
            "## Intervals\n\nSynthetic eps_q with known parameters, 64 images of 3 channels: of 100 nominal"
            " 95 % intervals so many cover the truth.\n"
        )
        lines += ["| parameter | channel | truth | covered |", "|---|---|---|---|"]
        lines += [
            f"| {r['parameter']} | {r['channel']} | {r['truth']:.4g} | {r['covered']} |"
            for r in found["synthetic"]
        ]
    if "corrections" in found:
        lines.append(f"\n## Corrections at 10 steps of DDIM, clipping off\n\n{note} {len(BLOCKS)} blocks.\n")
        lines += metrics_table(found["corrections"], ("model", "eta", "width", "weights", "bytes"))
    if "images" in found:
        lines.append(
            f"\n## How many images the statistics take\n\n`usq3`, a6, CNC + BC, eta 0. {note} 5 blocks;"
            " differences are to 64 images.\n"
        )
        lines += metrics_table(found["images"], ("model",))
    if "other" in found:
        lines.append(f"\n## Other samplers\n\n`usq3`, a6. {note} 5 blocks.\n")
        lines += metrics_table(found["other"], ("model", "sampler"))
    return "\n".join(lines) + "\n"


def main() -> None:
    known = {"synthetic": synthetic, "corrections": corrections, "images": images, "other": other}
    given = parsed(parser(__doc__, [*known, "all"], "correction-runs"))
    parts = {name: partial(part, given.folder, given.models) for name, part in known.items()}
    run_parts("correction", parts, given.parts, markdown)


if __name__ == "__main__":
    main()
