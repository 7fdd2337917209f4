"""NVIDIA ModelOpt's own choice of bits, measured with our protocol: python benchmarks/peers.py PART ...
[--folder DIR] [--models ...]

install    a virtual environment of its own in --folder, with the versions of PINS and of constraints.txt
choose     auto_quantize in that environment (benchmarks/peers_modelopt.py), on the bundled models and with
           each loss of LOSSES; beside each
           choice the exact optimum of ModelOpt's own scores
measure    its bits as a configuration of ours (usq and output-aware usqh of the same bits, a8) on fresh
           seeds, beside the smallest uniform
           configuration of no fewer bytes and our own choice of the same schemes within its bytes; with
           --study MODEL=FILE also what a surrogate of that study finds
table      benchmarks/results/peers.json and peers.md from --folder and what was measured; written after each
           part too
run        choose measure

ModelOpt needs a loss. Its scores are squared gradients, which vanish where the target is the denoiser's own
output: the losses that are measured are the denoising loss on real images, and the distance to the output
plus Gaussian noise, whose squared gradients estimate the Fisher information that its scores stand for.
Studies are kept in --folder and continue where they stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.scheme import FP, AquabitError, Budget, LayerChoice, QuantConfig, Scheme
from aquabit.stats import Interval, mean_interval, paired_difference
from benchmarks.common import (
    MODELS,
    RESULTS,
    about,
    block_values,
    open_study,
    parsed,
    parser,
    read,
    say,
    spans,
    write_results,
)

ROOT = Path(__file__).parents[1]
PINS = (
    "nvidia-modelopt==0.47.0",
    "PuLP==3.3.2",
    "torch",
    "diffusers",
    "accelerate",
    "requests",
)  # no number: constraints.txt's
BITS = (2, 3, 4, 8)  # what a layer may take, beside no quantization
EFFECTIVE_BITS = (2.5, 3.0, 3.5, 4.0)
# of ModelOpt's ranges: nearer to ours than "max", which leaves 2 bits three levels of the largest weight
CALIBRATION = "mse"
LOSSES = ("denoising", "noised output", "own output")
MAIN = LOSSES[0]
# family -> effective bits that tell choices apart: plain 2-bit codes break the U-Net, output-aware 4-bit
# codes lose nothing
CASES = {"usq": (3.0, 3.5, 4.0), "usqh": (2.5, 3.0, 3.5)}
OTHER_LOSS = (("usq", 3.5), ("usqh", 2.5), ("usqh", 3.0))  # cases that the second loss is measured in too
BLOCKS = (81, 82, 83, 84, 85)  # of fresh seeds; the other benchmarks' are below 80
SEED = 20_261_129
BATCH, REAL_IMAGES = 16, 512
METRICS = ("fid", "psnr")
UNQUANTIZED = 16


# ---- its environment
# ------------------------------------------------------------------------------------------------------------


def install(folder: Path) -> None:
    place = folder / "modelopt"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    pip = [
        str(place / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([*pip, *PINS], check=True)
    (place / "installed").write_text("\n".join(PINS) + "\n")


def peer_python(folder: Path) -> Path:
    """The Python of the peer's environment; raises AquabitError where that was not made, or made with
    other versions."""
    stamp = folder / "modelopt" / "installed"
    if not stamp.exists() or stamp.read_text().split() != list(PINS):
        raise AquabitError(
            f"{folder / 'modelopt'} holds no environment with {PINS[0]}; make it with: python"
            f" benchmarks/peers.py install --folder {folder}"
        )
    return folder / "modelopt" / "bin" / "python"


# ---- what it chooses
# ------------------------------------------------------------------------------------------------------------


def calls(model: str, loss: str) -> dict[str, torch.Tensor]:
    """Inputs x, t, y of the denoiser and the target of a loss, in batches of BATCH: noised real images, or
    calls of the full-precision trajectory (what our H is made of)."""
    from aquabit.pipelines import denoiser_of, load, recorder
    from aquabit.scheme import Calibration

    pipe, generator = load(model), torch.Generator().manual_seed(SEED)
    if loss == "denoising":
        from zoo.data import DATA

        data = DATA[pipe.config.real_images].read(None)
        images, labels = data.pixels(data.images), data.labels
        picked = torch.randperm(len(images), generator=generator)[:REAL_IMAGES]
        steps = pipe.scheduler.config.num_train_timesteps
        t = (
            (torch.randperm(REAL_IMAGES, generator=generator) + torch.rand(REAL_IMAGES, generator=generator))
            / REAL_IMAGES
            * steps
        ).long()
        noise = torch.randn(images[picked].shape, generator=generator)
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        return {
            "x": pipe.scheduler.add_noise(images[picked], noise, t),
            "t": t,
            "y": labels[picked],
            "target": pipe.scheduler.get_velocity(images[picked], noise, t) if velocity else noise,
        }
    found: dict[str, list[torch.Tensor]] = {"x": [], "t": [], "y": [], "target": []}
    for (x,), given in recorder(pipe)(Calibration()):
        with torch.no_grad():
            output = denoiser_of(pipe)(x, **given).sample[:, : x.shape[1]]
        noise = torch.randn(output.shape, generator=generator)
        row = {
            "x": x,
            "t": given["timestep"],
            "y": given["class_labels"],
            "target": output + noise if loss == "noised output" else output,
        }
        for key, value in row.items():
            found[key].append(value)
    return {k: torch.cat(v).contiguous() for k, v in found.items()}


def choose(folder: Path, models: Sequence[str]) -> None:
    from safetensors.torch import save_file

    from aquabit.pipelines.loading import BUNDLED

    python = peer_python(folder)
    for model in models:
        for loss in LOSSES:
            name = f"{model}-{loss.replace(' ', '-')}"
            inputs, out, log = (folder / f"{name}.{end}" for end in ("safetensors", "json", "log"))
            save_file(calls(model, loss), inputs)
            command = [
                python,
                Path(__file__).with_name("peers_modelopt.py"),
                "--denoiser",
                BUNDLED / model / "denoiser",
                "--inputs",
                inputs,
                "--out",
                out,
                "--bits",
                *EFFECTIVE_BITS,
                "--formats",
                *BITS,
                "--calibration",
                CALIBRATION,
                "--batch",
                BATCH,
            ]
            print(f"{model}: auto_quantize with the loss {loss!r}", flush=True)
            with log.open("w") as file:
                done = subprocess.run(
                    list(map(str, command)),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            if done.returncode:
                raise AquabitError(
                    f"ModelOpt failed on {model} (exit code {done.returncode}); what it said is in {log}"
                )


def chosen(folder: Path, model: str, loss: str) -> dict[str, Any]:
    """What ModelOpt wrote about a model; raises AquabitError where it was not asked."""
    path = folder / f"{model}-{loss.replace(' ', '-')}.json"
    if not path.exists():
        raise AquabitError(
            f"{path} is not there: ModelOpt was not asked yet; run: python benchmarks/peers.py choose"
            f" --folder {folder}"
        )
    found: dict[str, Any] = read(path)
    return found


def exact(scores: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float) -> list[int]:
    """One choice a layer of least summed score with summed cost at most ``limit``: HiGHS on scores scaled
    to at most 10^4, gap 0."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(row) for row in scores]
    flat, cost = np.concatenate(scores), np.concatenate(costs)
    picks = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    limits = [LinearConstraint(picks, 1, 1), LinearConstraint(cost[None] / max(limit, 1e-300), -np.inf, 1)]
    unit = 1e4 / max(float(flat.max()), 1e-300)
    found = milp(
        flat * unit,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise AquabitError(f"no choice of one format a layer costs at most {limit:g}")
    return [int(part.argmax()) for part in np.split(found.x, np.cumsum(sizes)[:-1])]


def solver_row(found: Mapping[str, Any], bits: float) -> dict[str, Any]:
    """ModelOpt's solution for so many effective bits beside the exact optimum of its scores, as they are
    and scaled to at most 10^4."""
    table = found["layers"]
    scores, costs = [r["scores"] for r in table.values()], [r["costs"] for r in table.values()]
    limit = (
        sum(row[r["bits"].index(UNQUANTIZED)] for row, r in zip(costs, table.values(), strict=True))
        * bits
        / UNQUANTIZED
    )

    def of(picked: Sequence[int]) -> tuple[float, float]:
        return (
            sum(s[i] for s, i in zip(scores, picked, strict=True)),
            sum(c[i] for c, i in zip(costs, picked, strict=True)) / limit,
        )

    def ratio(choice: Mapping[str, int]) -> float | None:
        own, least = (
            of([r["bits"].index(choice[k]) for k, r in table.items()])[0],
            of(exact(scores, costs, limit))[0],
        )
        return own / least if least > 0 else None

    own = found["chosen"][str(bits)]
    score, spent = of([r["bits"].index(own[k]) for k, r in table.items()])
    return {
        "effective_bits": bits,
        "counts": {str(k): v for k, v in sorted(Counter(own.values()).items())},
        "spent": spent,
        "score": score,
        "largest_score": max(map(max, scores)),
        "over_exact": ratio(own),
        "over_exact_scaled": ratio(found["chosen_scaled"][str(bits)]),
        "seconds": found["seconds"],
    }


# ---- what that gives
# ------------------------------------------------------------------------------------------------------------


def scheme_of(bits: int, family: str) -> Scheme:
    """Full precision for 16 bits, usq8 for 8 in both families (nothing is lost there), else the family's."""
    return (
        FP
        if bits == UNQUANTIZED
        else Scheme.parse(f"usq{bits}" + ("h" if family == "usqh" and bits < 8 else ""))
    )


def brought_over(bits: Mapping[str, int], space: Any, family: str) -> QuantConfig:
    """Bits by layer as a configuration of ours with a8; a layer that is not quantized keeps its
    activations too. Raises AquabitError where the layers are not the model's."""
    if set(bits) != set(space.layers):
        odd = sorted(set(bits) ^ set(space.layers))[0]
        raise AquabitError(
            f"layer {odd!r} is known to only one of ModelOpt and aquabit; both must quantize the same layers"
        )
    schemes = {k: scheme_of(b, family) for k, b in bits.items()}
    return space.config({k: LayerChoice(s, 16 if s == FP else 8) for k, s in schemes.items()})


def own_choice(
    graph: Any, space: Any, errors: Mapping[tuple[str, str], float], family: str, limit: int
) -> QuantConfig:
    """Our integer program on the probed damages of the same schemes, within so many bytes."""
    from benchmarks.research.assign import assign

    schemes = {scheme_of(b, family) for b in (*BITS, UNQUANTIZED)}
    found = assign(graph, space, Budget(bytes=limit), errors, lambda layer, scheme: scheme in schemes)
    return space.config(
        {k: LayerChoice(c.weight, 16 if c.weight == FP else 8) for k, c in found.layers.items()}
    )


def surrogate_choice(
    path: Path, family: str, limit: int, contexts: int = 16, rows: int = 60_000
) -> QuantConfig:
    """What the surrogate of a study finds within so many bytes, of the same schemes (without full
    precision, which studies do not sample)."""
    from aquabit.choices import Choices
    from aquabit.cost import CostModel
    from aquabit.search.integer_program import choice_effects, solve
    from aquabit.search.local_search import improve
    from aquabit.sensitivity.surrogate.fit import fit_from_study
    from aquabit.study import Study

    fitted = fit_from_study(Study(path, create=False))
    wanted = {scheme_of(b, family) for b in BITS}
    space = replace(
        fitted.space,
        choices={k: tuple(s for s in row if s in wanted) for k, row in fitted.space.choices.items()},
    )
    costs, budget = CostModel(fitted.graph, space), Budget(bytes=limit)
    column = np.array([fitted.space.schemes.index(s) for s in space.schemes])

    def predict(rows: Choices) -> np.ndarray:
        return fitted.badness(Choices(fitted.space, column[rows.weights], rows.acts))

    bits = 8 * (limit - costs.other_bytes) / costs.weights
    near = Choices.of(space, replace(space, activations=(8,)).sample(contexts, SEED, (bits * 0.9, bits)))
    start = solve(choice_effects(predict, space, near).mean(0), costs, budget)
    return improve(start.choices, predict, costs, budget, SEED, rows=rows).choices.config


def sides(session: Any, folder: Path, model: str, study: Path | None) -> list[dict[str, Any]]:
    """Every configuration that is measured: family, effective bits, side, config; full precision first."""
    space, costs, graph = session.space, session.costs, session.model.graph
    errors = {k: v["damage"] for k, v in session.study.features().items() if "damage" in v}
    rows = [
        {"family": "", "effective_bits": None, "side": "full precision", "config": space.full_precision()}
    ]
    for family, levels in CASES.items():
        for bits in levels:
            theirs = brought_over(chosen(folder, model, MAIN)["chosen"][str(bits)], space, family)
            limit = costs(theirs).bytes
            uniform = [
                space.config(dict.fromkeys(space.layers, LayerChoice(scheme_of(b, family), 8))) for b in BITS
            ]
            found = {
                "ModelOpt": theirs,
                "uniform": min((c for c in uniform if costs(c).bytes >= limit), key=lambda c: costs(c).bytes),
                "aquabit, additive": own_choice(graph, space, errors, family, limit),
            }
            if (family, bits) in OTHER_LOSS:
                found["ModelOpt, other loss"] = brought_over(
                    chosen(folder, model, LOSSES[1])["chosen"][str(bits)], space, family
                )
            if study is not None:
                found["aquabit, surrogate"] = surrogate_choice(study, family, limit)
            rows += [
                {"family": family, "effective_bits": bits, "side": side, "config": config}
                for side, config in found.items()
            ]
    return rows


def measure(
    folder: Path, models: Sequence[str], bank: str, workers: int, studies: Mapping[str, Path]
) -> dict[str, list[dict[str, Any]]]:
    schemes = list(dict.fromkeys(str(scheme_of(b, f)) for f in CASES for b in (UNQUANTIZED, *BITS)))
    result = {}
    for model in models:
        path, space = folder / f"peers-{model}.db", {"schemes": schemes, "activations": [8]}
        with open_study(path, model, bank, space, workers) as session:
            rows = sides(session, folder, model, studies.get(model))
            protocols = [session.protocol.block(b) for b in BLOCKS]
            session.measure([rows[0]["config"]], "reference", say, protocols, f"{model}, full precision")
            session.measure([r["config"] for r in rows], "fresh", say, protocols, f"{model}, on fresh seeds")
            result[model] = [{"model": model, **row} for row in with_values(session, rows, protocols)]
    return result


def with_values(
    session: Any, rows: Sequence[Mapping[str, Any]], protocols: Sequence[Any]
) -> list[dict[str, Any]]:
    """Rows with their size, their metrics on each block, and paired differences to ModelOpt's of the same
    case."""
    configs, found = {r["config"].digest: r["config"] for r in rows}, []
    known = block_values(session, configs, protocols, METRICS)
    for row in rows:
        config, cost = row["config"], session.costs(row["config"])
        values = known[config.digest]
        found.append(
            {
                **row,
                "config": config.digest,
                "schemes": {k: str(c.weight) for k, c in config.layers.items()},
                "bytes": cost.bytes,
                "bits": cost.bits_per_weight,
                **values,
                "fid_interval": mean_interval(values["fid"]).to_dict(),
            }
        )
    for row in found[1:]:
        theirs = peer_of(row, found)
        if row is not theirs:
            row["theirs_less_this"] = {m: paired_difference(theirs[m], row[m]).to_dict() for m in METRICS}
    return found


def peer_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """ModelOpt's row of the same family and effective bits; a row that belongs to none stands for itself."""
    return next(
        (
            r
            for r in rows
            if r["side"] == "ModelOpt" and all(r[k] == row[k] for k in ("family", "effective_bits"))
        ),
        row,
    )


# ---- tables
# ------------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    lines = [f"# ModelOpt's choice of bits\n\n{about(found['machine'])}. Made by `{found['command']}`."]
    if found.get("choices"):
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        lines.append(
            f"\n## What auto_quantize chooses, and its solver\n\n{versions}, in an environment of its own."
            f" Formats: {', '.join(map(str, BITS))} bits per output channel (inputs 8 bits per tensor, "
            f'ranges by "{CALIBRATION}") or no quantization. Its score of a layer is the sum of (gradient x'
            " change of the layer's output)^2; the solver minimises their sum within effective bits x"
            " weights. "
            "Over exact: the sum that it reaches over the least one (HiGHS, gap 0), with its scores as they"
            " are and with the same scores scaled to at most 10^4.\n\n"
            "| model | loss | effective bits | layers by bits | limit spent | largest score | over exact |"
            " scaled, over exact |\n|---|---|---|---|---|---|---|---|"
        )
        lines += [
            f"| {r['model']} | {r['loss']} | {r['effective_bits']} |"
            f" {', '.join(f'{k}: {v}' for k, v in r['counts'].items())} | {r['spent']:.4f} |"
            f" {r['largest_score']:.1e} | {_times(r['over_exact'])} | {_times(r['over_exact_scaled'])} |"
            for r in found["choices"]
        ]
    if found.get("measured"):
        lines.append(
            f"\n## The same bits in our schemes, measured\n\na8, {len(BLOCKS)} blocks of fresh seeds; means,"
            " and paired differences with 95 % intervals: negative FID and positive PSNR mean that"
            " ModelOpt's choice is better. "
            '"Uniform" is the smallest of no fewer bytes. "aquabit, additive" is our integer program on'
            ' probed damages, "surrogate" what a study\'s surrogate finds; both of the same schemes within'
            " ModelOpt's bytes; a surrogate has learnt from a study that has no full precision. ModelOpt"
            " scored its own symmetric codes, whose ranges are chosen for least error; usq spans the smallest"
            " to the largest weight of a row, usqh is fitted to the inputs. "
            f'ModelOpt\'s loss is {MAIN!r}; "other loss" is {LOSSES[1]!r}.\n\n'
            "| model | schemes | effective bits | choice | bytes (to ModelOpt's) | bits | FID | PSNR |"
            " ModelOpt less this: FID | PSNR |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        for rows in found["measured"].values():
            lines += [_measured_line(r, rows) for r in rows]
    return "\n".join(lines) + "\n"


def _times(value: float | None) -> str:
    return "no score" if value is None else f"{value:.4f}"


def _measured_line(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    theirs = peer_of(row, rows)
    apart = row.get("theirs_less_this")
    shown = [spans(Interval.from_dict(apart[m]), sign="+") if apart else "" for m in METRICS]
    psnr = "" if row["side"] == "full precision" else f"{np.mean(row['psnr']):.1f}"
    return (
        f"| {row['model']} | {row['family']} | {row['effective_bits'] or ''} | {row['side']} |"
        f" {row['bytes']:,} ({row['bytes'] - theirs['bytes']:+,}) | {row['bits']:.2f} |"
        f" {row['fid_interval']['value']:.2f} | {psnr} | {shown[0]} | {shown[1]} |"
    )


def summary(folder: Path, models: Sequence[str]) -> dict[str, Any]:
    """Versions, and a row for each model, loss and number of effective bits."""
    found = {(m, loss): chosen(folder, m, loss) for m in models for loss in LOSSES}
    rows = [
        {"model": m, "loss": loss, **solver_row(f, b)}
        for (m, loss), f in found.items()
        for b in EFFECTIVE_BITS
    ]
    return {"versions": next(iter(found.values()))["versions"], "choices": rows}


def main() -> None:
    arguments = parser(__doc__, ["install", "choose", "measure", "run", "table"], "peers-runs", MODELS)
    arguments.add_argument("--bank", help="fitted weights to reuse (default: bank in --folder)")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument(
        "--study", nargs="+", default=[], metavar="MODEL=FILE", help="studies whose surrogates choose too"
    )
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = parsed(arguments)
    try:
        parts = {
            p: None for part in given.parts for p in (("choose", "measure") if part == "run" else (part,))
        }
        for part in parts:
            run_part(part, given)
    except AquabitError as error:
        sys.exit(str(error))


def studies_of(given: argparse.Namespace) -> dict[str, Path]:
    """model -> study, of MODEL=FILE."""
    return {model: Path(file) for model, _, file in (text.partition("=") for text in given.study)}


def run_part(part: str, given: argparse.Namespace) -> None:
    if part == "install":
        install(given.folder)
        return
    measured = dict[str, Any]()
    if part == "choose":
        choose(given.folder, given.models)
    if part == "measure":
        bank = given.bank or str(given.folder / "bank")
        measured = measure(given.folder, given.models, bank, given.workers, studies_of(given))
    found: dict[str, Any] = read(given.results / "peers.json")  # now: another part may have written meanwhile
    others = [r for r in found.get("choices", []) if r["model"] not in given.models]
    found |= summary(given.folder, given.models)
    found["choices"] = others + found["choices"]
    found["measured"] = {**found.get("measured", {}), **measured}
    command = "python benchmarks/peers.py install run --study MODEL=FILE"
    write_results("peers", command, found, markdown, given.results)


if __name__ == "__main__":
    main()
