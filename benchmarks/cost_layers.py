"""The part ``layers`` of benchmarks/cost.py: the fits of all schemes of a model's layers, each on its own and
with what they share made once, in turns; and how often calibration replays its calls."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import about, say, spans

SCHEMES = ("usq1h", "usq2h", "usq6h")  # of `make demo`
ROUNDS = 3
WORKERS = 2
FORMERLY = 6  # layers whose H were measured in one replay, before portions were shared out by work


def layers(folder: Path, model: str, every: int = 1) -> list[dict[str, Any]]:
    """Processor seconds of fits and their output errors, one thread, of every so-manyeth layer."""
    from aquabit.measuring.evaluator import Evaluator
    from aquabit.measuring.fitting import PARTS
    from aquabit.measuring.model import open_model
    from aquabit.quant.bank import Bank
    from aquabit.quant.calibration.fitting import FIT_ACT
    from aquabit.quant.calibration.hessian import output_error
    from aquabit.quant.sharing import shared_work
    from aquabit.quant.weights import quantize_weights
    from aquabit.scheme import Calibration

    opened, calibration = open_model(model), Calibration()
    evaluator = Evaluator(model, opened.graph, Bank(folder / "bank"), opened.fingerprint)
    fitter, names = evaluator.quantized.fitter, list(evaluator.quantized.layers)
    calls, _ = fitter.calibrator.recorded(calibration)
    fitted = names[::every]
    found = fitter.calibrator.moments(fitted, [FIT_ACT], calibration)
    spent: dict[str, list[float]] = {"alone": [0.0] * ROUNDS, "together": [0.0] * ROUNDS}
    weights = 0
    for done, name in enumerate(fitted, 1):
        weight, h = fitter.weights[name], found[name, FIT_ACT].hessian
        weights += weight.numel()
        for round_ in range(ROUNDS):
            coded = dict[str, list[torch.Tensor]]()
            for way in sorted(spent, reverse=bool(round_ % 2)):
                begun = time.process_time()
                with shared_work() if way == "together" else nullcontext():
                    made = [quantize_weights([weight], s, [h])[0] for s in SCHEMES]
                    errors = [output_error(weight, m.dequantize(), h) for m in made]
                spent[way][round_] += time.process_time() - begun
                coded[way] = [*(m.dequantize() for m in made), torch.tensor(errors)]
            if not all(torch.equal(a, b) for a, b in zip(*coded.values(), strict=True)):
                raise SystemExit(f"{model}, {name}: fits that share work are others")
        say(f"{model}: {name}", done, len(fitted))
    parts = evaluator.chunks(names, calibration, PARTS * WORKERS)
    ratio = [a / b for a, b in zip(spent["alone"], spent["together"], strict=True)]
    return [
        {
            "model": model,
            "layers": len(fitted),
            "weights": weights,
            "alone": float(np.median(spent["alone"])),
            "together": float(np.median(spent["together"])),
            "ratio": [float(np.quantile(ratio, q)) for q in (0.5, 0.25, 0.75)],
            "calls": len(calls),
            "replays": [
                sum(ceil(len(p) / FORMERLY) for p in evaluator.chunks(names, calibration)),
                len(parts),
            ],
        }
    ]


def layers_table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## All schemes of a layer",
        "",
        f"{about(found['machine'])}. Made by `python benchmarks/cost.py layers`: processor seconds of fits",
        f"with measured H ({', '.join(SCHEMES)}) and of their output errors, one thread, medians of {ROUNDS}",
        "rounds in turns, with quartiles of the ratio; codes, scales and errors are equal to the bit.",
        f"Replays of the calibration's calls with {WORKERS} workers: one for {FORMERLY} layers, as it",
        "was, and now.",
        "",
        "| model | layers | weights | each scheme alone, s | together, s | ratio | calls | replays | now |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['model']} | {r['layers']} | {r['weights']:,} | {r['alone']:.1f} | {r['together']:.1f} |"
        f" {spans(r['ratio'])} | {r['calls']} | {r['replays'][0]} | {r['replays'][1]} |"
        for r in found["rows"]
    ]
