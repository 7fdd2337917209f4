"""Rivals of our search, really run over the same codes and the same bytes: python benchmarks/rivals.py PART
... [--folder DIR] [--models ...]

install    ModelOpt in a virtual environment of its own in --folder (as benchmarks/peers.py makes it)
choose     one configuration of each rival (RIVALS) for each budget into choices-MODEL.json; scores are kept
           in scores-*.json
fresh      all of them, our winners and full precision on five blocks of fresh seeds, 128 images each
table      benchmarks/results/rivals.json and rivals.md

The study of a model is rivals-MODEL.db in --folder: a copy of --study MODEL=FILE where it is not there, else
made (every scheme of the default space is fitted and probed). Ours are read from ours-MODEL.json in --folder:
{search seed: [{"target": bits, "config": {...}}]}; where it is absent differences are to the additive
program. All budgets are kept exactly. It continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.scheme import AquabitError, QuantConfig
from aquabit.scheme_kinds import ADDITIVE, UNIFORM
from aquabit.stats import Interval, paired_difference
from benchmarks import peers
from benchmarks import rivals_scores as scores
from benchmarks.common import (
    MODELS,
    RESULTS,
    about,
    open_study,
    parsed,
    parser,
    read,
    replaced,
    say,
    spans,
    values_of,
    write,
    write_results,
)
from benchmarks.rivals_searches import (
    Weights,
    cap,
    exact,
    falling,
    highest,
    lowered,
    raised,
    split_programs,
    thresholded,
)

TARGETS = (1.6, 2.0, 2.5, 3.0, 3.5)  # bits per weight
BLOCKS = range(101, 106)  # of fresh seeds; other benchmarks use blocks up to 100
METRICS = ("psnr", "fid")
LOSSES = {"modelopt": "denoising", "modelopt, fisher": "noised output"}  # of benchmarks/peers.py
BATCH = 16
RIVALS = {
    "program": "our additive integer program over the damages of probes (8 images), exact",
    "uniform usqh": "the largest output-aware uniform scheme for all layers that is within the bytes",
    "uniform aq": "the additive level, one for all layers, of least predicted damage within the bytes",
    "modelopt": (
        "NVIDIA ModelOpt 0.47 `auto_quantize`: sum of (gradient x change of the layer's output)^2 of the"
        " denoising loss on 512 real images; its own solver, to which codebooks that layers share are equal"
        " parts of them, within the true bytes"
    ),
    "modelopt, fisher": (
        "the same with the loss to the output plus noise, whose squared gradients estimate the Fisher"
        " information that its scores stand for"
    ),
    "modelopt, exact": (
        "the scores of `modelopt` in our exact program: what its solver loses, whose tolerances do not scale"
        " with the scores"
    ),
    "mct": (
        "Sony MCT: mean distance of all layers' outputs (mean squared error of convolutions, cosine of"
        " Linear) from full precision on 32 denoiser calls, others at their highest; exact program, then its"
        " greedy raising"
    ),
    "aimet": (
        "AIMET AMP: all at their highest, then lowered in the order of damage alone, as far as the bytes ask"
    ),
    "greedy": "the same in the order of damage per byte saved",
    "sdnq": (
        "SDNQ: each layer the smallest scheme whose squared weight error over the weight's variance is under"
        " one threshold, the least that meets the bytes"
    ),
    "mixdq": (
        "MixDQ: SSIM of 16 images for content layers, SQNR of the denoiser for the others; a program each"
        " over its 10 x 10 grid of budgets, best by squared error of 16 images"
    ),
}
CONTENT = (
    "cross_attn",
    "ff",
    "time_embed",
    "adaln",
    "res.time",
    "class_embed",
)  # MixDQ's `attn2` and `ff`; here conditions enter by the others


def session_of(folder: Path, model: str, workers: int, bank: str, studies: Mapping[str, Path]) -> Any:
    path = folder / f"rivals-{model}.db"
    return open_study(path, model, bank, workers=workers, base=studies.get(model))


# ---- the rivals
# ------------------------------------------------------------------------------------------------------------


class Rivals:
    """One model's scores, made when they are first needed and kept in the folder, and what each rival
    chooses."""

    def __init__(self, session: Any, folder: Path, model: str):
        from aquabit.sensitivity.damages import Damages

        self.session, self.folder, self.model = session, folder, model
        self.space, self.costs, self.graph = session.space, session.costs, session.model.graph
        self.damages = Damages.of(self.space, session.study.features())
        self.free = self.space.full_precision()
        check_space(folder / f"space-{model}.json", self.space)

    @cached_property
    def layers(self) -> Any:
        return scores.Layers(self.session)

    @cached_property
    def full(self) -> torch.Tensor:
        """The full-precision images that MixDQ compares with."""
        self.layers.at(self.free)
        return self.layers.images()

    def kept(self, kind: str, layers: Sequence[str], score: Callable[[str], scores.Scored]) -> np.ndarray:
        path = self.folder / f"scores-{self.model}-{kind}.json"
        with torch.no_grad():
            return scores.table(self.space, scores.kept(path, layers, score, say))

    @cached_property
    def damage(self) -> np.ndarray:
        return self.damages.scores((8,))[:, :, 0]

    @cached_property
    def weight_errors(self) -> np.ndarray:
        return self.kept("weights", self.space.layers, partial(scores.weight_errors, self.layers))

    @cached_property
    def content(self) -> np.ndarray:
        """MixDQ's content layers, boolean [L]."""
        operators = [str((self.space.operators or {})[k]) for k in self.space.layers]
        return np.array([o.split(".")[0] in CONTENT or o in CONTENT for o in operators])

    @cached_property
    def mixdq(self) -> np.ndarray:
        names, full = np.array(self.space.layers), self.full
        replay = self.layers.replay()  # leaves the model in full precision
        similar = self.kept(
            "ssim", names[self.content].tolist(), partial(scores.ssim_losses, self.layers, full)
        )
        noise = self.kept(
            "sqnr", names[~self.content].tolist(), partial(scores.sqnr_losses, self.layers, replay)
        )
        return np.where(self.content[:, None], similar, noise)

    @cached_property
    def features(self) -> np.ndarray:
        top = {
            k: self.space.schemes[c]
            for k, c in zip(self.space.layers, highest(self.space, self.costs), strict=True)
        }
        measured = scores.FeatureDistance(self.layers)
        self.layers.at(self.config(highest(self.space, self.costs)))
        return self.kept(
            "mct", self.space.layers, partial(scores.feature_losses, self.layers, measured, top, measured())
        )

    def gradients(self, loss: str) -> np.ndarray:
        path = self.folder / f"scores-{self.model}-{loss.replace(' ', '-')}.json"
        if not path.exists():
            scores.write(path, scores.gradient_scores(self.layers, peers.calls(self.model, loss), BATCH, say))
        return scores.table(self.space, read(path))

    def config(self, weights: Weights) -> QuantConfig:
        from aquabit.search.options import Columns

        found: QuantConfig = Columns.of(self.space, (8,)).split(np.asarray(weights)).config
        return found

    def fits(self, configs: Sequence[QuantConfig], bits: float) -> list[QuantConfig]:
        return [c for c in configs if self.costs(c).bits_per_weight <= bits * (1 + 1e-12)]

    def predicted(self, config: QuantConfig) -> float:
        """The sum of probe damages, which the program minimises."""
        from aquabit.choices import Choices

        return float(self.damages.total(Choices.of(self.space, [config]))[0])

    def uniform(self, family: str, bits: float) -> QuantConfig | None:
        if family == "usqh":
            same = [s for s in self.space.common_schemes() if s.record is UNIFORM and s.output_aware]
            found = [self.space.uniform(s, 8) for s in same]
            return max(self.fits(found, bits), key=lambda c: self.costs(c).bytes, default=None)
        levels = sorted(
            {
                round(4 * self.space.code_bits(k, s)) / 4
                for k, row in self.space.choices.items()
                for s in row
                if s.additive
            }
        )
        found = [self.space.level(ADDITIVE.name, b, 8) for b in levels]
        return min(self.fits(found, bits), key=self.predicted, default=None)

    @cached_property
    def solved(self) -> dict[str, dict[float, QuantConfig]]:
        return {name: self.solved_by_modelopt(name) for name in LOSSES}

    def solved_by_modelopt(self, name: str) -> dict[float, QuantConfig]:
        """ModelOpt's solver on the scores of one of LOSSES, in its own environment, for all budgets."""
        python, table = peers.peer_python(self.folder), self.gradients(LOSSES[name])
        given = {
            "layers": {
                k: {
                    "schemes": [str(s) for s in row],
                    "scores": [float(table[i, self.space.schemes.index(s)]) for s in row],
                    "bytes": [int(self.costs.bytes[i, self.space.schemes.index(s)]) for s in row],
                }
                for i, (k, row) in enumerate(self.space.choices.items())
            },
            "shared": [
                {
                    "scheme": str(self.space.schemes[t.column]),
                    "layers": [self.space.layers[i] for i in t.layers],
                    "bytes": int(t.bytes),
                }
                for t in self.costs.shared
            ],
            "limits": {str(b): cap(self.costs, b) for b in TARGETS},
        }
        stem = self.folder / f"solver-{self.model}-{name.replace(', ', '-')}"
        asked, out, log = (stem.with_suffix(end) for end in (".given.json", ".json", ".log"))
        scores.write(asked, given)
        command = [python, Path(__file__).with_name("rivals_modelopt.py"), "--given", asked, "--out", out]
        with log.open("w") as file:
            done = subprocess.run(
                list(map(str, command)),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            raise AquabitError(
                f"ModelOpt's solver failed on {self.model} (exit code {done.returncode}); what it said is in"
                f" {log}"
            )
        texts = [str(s) for s in self.space.schemes]
        chosen = {float(b): row for b, row in read(out).items() if row is not None}
        return {
            b: self.config(np.array([texts.index(row[k]) for k in self.space.layers]))
            for b, row in chosen.items()
        }

    def by_grid(self, bits: float) -> QuantConfig:
        found = [
            self.config(w) for w in split_programs(self.mixdq, self.content, self.graph, self.space, bits)
        ]
        found = self.fits(found, bits)
        if not found:
            raise AquabitError(f"no point of MixDQ's grid reaches {bits:g} bits")
        print(f"{self.model}: MixDQ's grid at {bits:g} bits has {len(found)} configurations", flush=True)
        return found[int(np.argmin(scores.image_errors(self.layers, self.full, found)))]

    def of(self, name: str, bits: float) -> QuantConfig | None:
        """The configuration of a rival for a budget; None where it has none."""
        if name in LOSSES:
            return self.solved[name].get(bits)
        one: dict[str, Callable[[], QuantConfig | Weights | None]] = {
            "program": lambda: exact(self.damage, self.costs, bits),
            "uniform usqh": lambda: self.uniform("usqh", bits),
            "uniform aq": lambda: self.uniform("aq", bits),
            "modelopt, exact": lambda: exact(
                falling(self.gradients(LOSSES["modelopt"]), self.costs), self.costs, bits
            ),
            "mct": lambda: raised(exact(self.features, self.costs, bits), self.features, self.costs, bits),
            "mixdq": lambda: self.by_grid(bits),
            "aimet": lambda: lowered(self.damage, self.costs, bits, per_byte=False),
            "greedy": lambda: lowered(self.damage, self.costs, bits, per_byte=True),
            "sdnq": lambda: thresholded(self.weight_errors, self.costs, bits),
        }
        found = one[name]()
        return self.config(found) if isinstance(found, np.ndarray) else found


def check_space(path: Path, space: Any) -> None:
    """Note the space that scores and choices in a folder are of; raises AquabitError where they are of
    another."""
    own = json.loads(json.dumps(space.to_dict()))
    if path.exists() and read(path) != own:
        raise AquabitError(
            f"scores and choices in {path.parent} are of another search space than the study's; give another"
            " --folder"
        )
    scores.write(path, own)


def choose(rivals: Rivals, names: Sequence[str]) -> None:
    """Every rival's configurations into choices-MODEL.json; those that are there stay as they are."""
    path = rivals.folder / f"choices-{rivals.model}.json"
    for name, bits in product(names, TARGETS):
        found: dict[str, list[dict[str, Any]]] = read(path)
        rows = found.setdefault(name, [])
        if any(r["target"] == bits for r in rows):
            continue
        config = rivals.of(name, bits)
        row: dict[str, Any] = {"target": bits, "config": None}
        if config is not None:
            cost = rivals.costs(config)
            if not rivals.fits([config], bits):
                raise AssertionError(f"{name} has {cost.bits_per_weight} bits where {bits} are the limit")
            row |= {
                "bits": cost.bits_per_weight,
                "bytes": cost.bytes,
                "damage": rivals.predicted(config),
                "config": config.to_dict(),
            }
        rows.append(row)
        write(path, found)
        print(
            f"{rivals.model}, {bits:g} bits, {name}: "
            + (f"damage {row['damage']:.3g}" if config is not None else "none"),
            flush=True,
        )


# ---- on fresh seeds
# ------------------------------------------------------------------------------------------------------------


def entries(folder: Path, model: str) -> list[dict[str, Any]]:
    """What is measured: side, search seed (None for rivals), target and configuration; ours first."""
    path, own = folder / f"choices-{model}.json", folder / f"ours-{model}.json"
    if not path.exists():
        raise AquabitError(
            f"{path} is not there: the rivals have not chosen yet; run: python benchmarks/rivals.py choose"
            f" --folder {folder}"
        )
    ours = read(own)
    rows = [
        {"side": "ours", "seed": seed, **row}
        for seed, winners in ours.items()
        for row in winners
        if row["target"] in TARGETS
    ]
    return rows + [
        {"side": name, "seed": None, **row}
        for name, found in read(path).items()
        for row in found
        if row["config"]
    ]


def fresh(session: Any, folder: Path, model: str, bits: Sequence[float] = TARGETS) -> None:
    asked = [r for r in entries(folder, model) if r["target"] in bits]
    configs = {c.digest: c for c in (QuantConfig.from_dict(r["config"]) for r in asked)}
    protocols = [session.protocol.block(b) for b in BLOCKS]
    session.measure([session.space.full_precision()], "reference", say, protocols, f"{model}, full precision")
    session.measure(configs.values(), "fresh", say, protocols, f"{model}, on fresh seeds")


def measured(session: Any, folder: Path, model: str, bits: Sequence[float] = TARGETS) -> list[dict[str, Any]]:
    """One row a side and target: size, and each metric by block (of ours the mean over seeds of the
    search); full precision first."""
    known = values_of(session.study, METRICS)
    protocols = [session.protocol.block(b).digest for b in BLOCKS]

    def blocks(config: QuantConfig, metric: str) -> np.ndarray:
        missing = [p for p in protocols if (config.digest, p) not in known]
        if missing:
            raise AquabitError(
                f"{len(missing)} blocks of {model} are not measured; run: python benchmarks/rivals.py fresh"
                f" --folder {folder}"
            )
        return np.array([known[config.digest, p][metric] for p in protocols])

    free = session.space.full_precision()
    rows = [
        {
            "model": model,
            "side": "full precision",
            "target": None,
            "bits": 16.0,
            "seeds": 1,
            "fid": blocks(free, "fid").tolist(),
        }
    ]
    together: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for entry in (e for e in entries(folder, model) if e["target"] in bits):
        together.setdefault((entry["side"], entry["target"]), []).append(entry)
    for (side, target), same in together.items():
        configs = [QuantConfig.from_dict(e["config"]) for e in same]
        rows.append(
            {
                "model": model,
                "side": side,
                "target": target,
                "seeds": len(same),
                "damage": same[0].get("damage"),
                "bits": float(np.mean([session.costs(c).bits_per_weight for c in configs])),
                **{m: np.mean([blocks(c, m) for c in configs], 0).tolist() for m in METRICS},
            }
        )
    return rows


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one model with the paired difference of each metric to ours at the same target (to the
    program's where ours are absent)."""
    reference = "ours" if any(r["side"] == "ours" for r in rows) else "program"
    base = {r["target"]: r for r in rows if r["side"] == reference}
    found = []
    for row in rows:
        own = base.get(row["target"])
        if own is not None and row["side"] != reference:
            row = {
                **row,
                "against": reference,
                "less": {m: paired_difference(row[m], own[m]).to_dict() for m in METRICS},
            }
        found.append(dict(row))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    shown = [r for r in rows if r["target"] is not None]
    lines = [
        "# Rivals of the search, over the same codes and the same bytes",
        (f"\n{about(found['machine'])}. Made by `{found['command']}`."),
        (
            "\nBudgets in true bits per weight (codes, codebooks once where layers share them, scales), kept"
            f" exactly; a8. Means over {len(BLOCKS)} blocks of fresh seeds, 128 images each; differences are"
            " paired over blocks with 95 % intervals: negative PSNR and positive FID mean that the rival is"
            " worse.\n"
        ),
    ]
    lines += [
        f"- `{name}`: {what}." for name, what in RIVALS.items() if any(r["side"] == name for r in shown)
    ]
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in shown if r["model"] == model]
        full = next(r for r in rows if r["model"] == model and r["target"] is None)
        sides = dict.fromkeys(r["side"] for r in own)
        lines += [
            f"\n## {model}\n\nFull precision has FID {np.mean(full['fid']):.2f}.\n\n| PSNR, dB | "
            + " | ".join(f"{t:g} bits" for t in TARGETS)
            + " |",
            "|---|" + "---|" * len(TARGETS),
        ]
        for side in sides:
            cells = [
                next((f"{np.mean(r['psnr']):.1f}" for r in own if r["side"] == side and r["target"] == t), "")
                for t in TARGETS
            ]
            lines.append(f"| {side} | " + " | ".join(cells) + " |")
        against = next((r["against"] for r in own if "against" in r), "ours")
        lines += [
            f"\n| bits | choice | true bits | PSNR | FID | less {against}: PSNR | FID |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in sorted(own, key=lambda r: (r["target"], list(sides).index(r["side"]))):
            gaps = [spans(Interval.from_dict(r["less"][m]), sign="+") if "less" in r else "" for m in METRICS]
            lines.append(
                f"| {r['target']:g} | {r['side']} | {r['bits']:.3f} | {np.mean(r['psnr']):.2f} |"
                f" {np.mean(r['fid']):.2f} | " + " | ".join(gaps) + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["install", "choose", "fresh", "table"], "rivals-runs", MODELS)
    arguments.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="NAME")
    arguments.add_argument(
        "--bits", nargs="+", type=float, default=list(TARGETS), help="budgets that are measured and shown"
    )
    arguments.add_argument("--bank", help="fitted weights to reuse (default: bank in --folder)")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument(
        "--study",
        nargs="+",
        default=[],
        metavar="MODEL=FILE",
        help="studies whose fits and probes are begun with",
    )
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = parsed(arguments)
    try:
        run(given)
    except AquabitError as error:
        sys.exit(str(error))


def run(given: argparse.Namespace) -> None:
    parts = list(given.parts)
    if "install" in parts:
        peers.install(given.folder)
        parts.remove("install")
    bank, studies = given.bank or str(given.folder / "bank"), peers.studies_of(given)
    rows = list[dict[str, Any]]()
    for model in given.models if parts else ():
        with session_of(given.folder, model, given.workers, bank, studies) as session:
            if "choose" in parts:
                choose(Rivals(session, given.folder, model), given.rivals)
            if "fresh" in parts:
                fresh(session, given.folder, model, given.bits)
            if "table" in parts:
                rows += compared(measured(session, given.folder, model, given.bits))
    if "table" in parts:
        rows = replaced(read(given.results / "rivals.json").get("rows", []), rows, given.models)
        command = "python benchmarks/rivals.py install choose fresh table"
        write_results("rivals", command, {"rivals": RIVALS, "rows": rows}, markdown, given.results)


if __name__ == "__main__":
    main()
