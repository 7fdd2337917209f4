"""Effects of layers at 100 measurements' worth, beside truth in fresh good contexts: python
benchmarks/effects.py PART ... [--folder DIR] [--models ...]

measure    a study an arm: 60 configurations of a design, then 20 real swaps that `validate` plans (40
           measurements at most); "in-context" is the first arm with output errors of all swaps in 4 contexts
truth      every layer that has both ends of the swap, in 4 good contexts of a seed of its own, each on a
           block of fresh seeds of its own
ceiling    the 60 configurations of each study on other images too: how well any prediction could rank the
           good ones
explain    what `aquabit explain` says of each study, of PSNR and of FID
table      benchmarks/results/effects.json and effects.md of what was measured and explained

A study starts as a copy of ``base-MODEL.db`` in --folder (benchmarks/searches.py makes it) where that is
there. The truth was measured after everything was chosen, and nothing is chosen on it. It takes an hour a
model on one core, and continues where it stopped.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common
from benchmarks.common import (
    RESULTS,
    about,
    parsed,
    parser,
    plain,
    read,
    replaced,
    say,
    values_of,
    write,
    write_results,
)
from benchmarks.searches import SPACE, study_path

IN_CONTEXT = "in-context"  # the first arm's measurements, and output errors of all swaps in 4 contexts
ARMS = ("near:0.75", "random", IN_CONTEXT)
SAMPLES, FLIPS, BITS, SWAP = 60, 20, 3.0, "usq4h:usq2h"
CONTEXTS, SEED = 4, 20_261_129
IMAGES = 128
SURROGATE = "line, trees"  # rows without one are of the surrogate before: trees alone
METRICS = ("psnr", "fid")
REPLICATES = 1000
FIRST_BLOCK, CEILING_BLOCK = 201, 211  # the other benchmarks use blocks up to 105


def open_study(folder: Path, bank: Path, model: str, what: str, images: int) -> Any:
    """A session on ``effects-WHAT-MODEL.db``."""
    path, base = file_of(folder, model, what), study_path(folder, model)
    return common.open_study(path, model, bank, SPACE, workers=1, base=base, images=images)


def file_of(folder: Path, model: str, what: str) -> Path:
    return folder / f"effects-{what.partition(':')[0]}-{model}.db"


def measure(folder: Path, bank: Path, model: str, arms: Sequence[str], images: int) -> None:
    from aquabit.sensitivity.designs import draw
    from aquabit.sensitivity.effects import context_effects
    from aquabit.sensitivity.effects.validation import validate_in

    for arm in arms:
        if arm == IN_CONTEXT:
            first, own = (file_of(folder, model, a) for a in (ARMS[0], arm))
            if not own.exists():
                shutil.copy(first, own)
            with open_study(folder, bank, model, arm, images) as session:
                number = context_effects.IN_CONTEXT
                context_effects.measure_in_context(session, number, BITS, SWAP, progress=say)
            continue
        with open_study(folder, bank, model, arm, images) as session:
            session.references(say)
            session.measure(draw(session, arm, SAMPLES, 0), "sample", say, what=f"{model}, {arm}")
            validate_in(session, FLIPS, SWAP, BITS, 0, say)


def ceiling(folder: Path, bank: Path, model: str, arms: Sequence[str], images: int) -> None:
    for arm in (a for a in arms if a != IN_CONTEXT):
        with open_study(folder, bank, model, arm, images) as session:
            other = [session.protocol.block(CEILING_BLOCK)]
            session.measure([session.space.full_precision()], "reference", say, other, "full precision")
            from aquabit.sensitivity.designs import draw

            session.measure(
                draw(session, arm, SAMPLES, 0), "fresh", say, other, f"{model}, {arm}, other images"
            )


def explained_file(folder: Path, model: str, arm: str, metric: str) -> Path:
    return file_of(folder, model, arm).with_suffix(f".{metric}.json")


def explain_arms(folder: Path, model: str, arms: Sequence[str]) -> None:
    from aquabit.sensitivity.explaining import explain
    from aquabit.study import Study

    for arm in arms:
        study = Study(file_of(folder, model, arm), create=False)
        for metric in METRICS:
            found = explain(study, BITS, SWAP, objective=metric, fidelity=False, progress=say)
            write(explained_file(folder, model, arm, metric), found.to_dict())


def swapped_players(space: Any) -> list[Any]:
    """The layers that have both ends of the swap."""
    from aquabit.scheme import parse_swap
    from aquabit.sensitivity.effects.predicted import find_players

    named = parse_swap(SWAP)
    return [p for p in find_players(space, named) if (p.before, p.after) == named]


def ends_in(space: Any, costs: Any, damages: Any, number: int) -> list[tuple[Any, Any]]:
    """Both ends of every layer's swap in the ``number``-th context of the truth."""
    from aquabit.sensitivity.damages import good_contexts
    from aquabit.sensitivity.effects.context_effects import swapped

    context = good_contexts(damages, costs, BITS, 1, np.random.default_rng([SEED, number]))
    configs = swapped(context, swapped_players(space)).configs()
    return list(zip(configs[::2], configs[1::2], strict=True))


def truth(folder: Path, bank: Path, model: str, contexts: int, images: int) -> None:
    with open_study(folder, bank, model, "truth", images) as session:
        for k in range(contexts):
            protocol = [session.protocol.block(FIRST_BLOCK + k)]
            session.measure([session.space.full_precision()], "reference", say, protocol, "full precision")
            from aquabit.sensitivity.damages import damages_of

            ends = ends_in(session.space, session.costs, damages_of(session), k)
            configs = [config for pair in ends for config in pair]
            session.measure(configs, "flip", say, protocol, f"{model}, truth, context {k + 1}")


@dataclass(frozen=True)
class Truth:
    """``worse``: metric -> what each swap worsened [layers, contexts], in dB of PSNR or in FID."""

    layers: list[str]
    worse: dict[str, np.ndarray]
    images: int  # of a measurement
    damage: (
        np.ndarray
    )  # [layers]: what the swap adds to the mean squared change of images where the layer alone is quantized

    def mean(self, metric: str) -> np.ndarray:
        return np.asarray(self.worse[metric].mean(1))

    def half(self, metric: str) -> np.ndarray:
        """Half-widths [layers] of the 95 % t intervals over contexts."""
        values = self.worse[metric]
        count = values.shape[1]
        return np.asarray(stats.t.ppf(0.975, count - 1) * values.std(1, ddof=1) / np.sqrt(count))

    def reliability(self, metric: str) -> tuple[float, float]:
        """SRCC between two halves of the contexts, the mean of all ways to halve them, and stepped up to
        all (Spearman and Brown)."""
        from aquabit.sensitivity.surrogate.scores import srcc

        values, count = self.worse[metric], self.worse[metric].shape[1]
        halves = [list(h) for h in combinations(range(count), count // 2)]
        half = float(np.mean([srcc(values[:, h].mean(1), np.delete(values, h, 1).mean(1)) for h in halves]))
        return half, 2 * half / (1 + half)


def stored_truth(model: str) -> Truth:
    """What benchmarks/results/effects.json has of a truth that was measured elsewhere."""
    rows = read(RESULTS / "effects.json").get("rows", [])
    own = [r for r in rows if r["kind"] == "truth" and r["model"] == model]
    if not own:
        raise SystemExit(f"{model}: no truth was measured; run the part truth")
    images = {r.get("truth_images", IMAGES) for r in rows if r["kind"] == "arm" and r["model"] == model}
    return Truth(
        [r["layer"] for r in own],
        {m: np.array([r[m] for r in own]) for m in METRICS},
        images.pop(),
        np.array([r["damage"] for r in own]),
    )


def read_truth(folder: Path, model: str) -> Truth:
    """Of the contexts in which every swap was measured."""
    from aquabit.cost import CostModel
    from aquabit.graph import from_json
    from aquabit.sensitivity.damages import Damages
    from aquabit.space import SearchSpace
    from aquabit.study import Study

    study = Study(file_of(folder, model, "truth"), create=False)
    space = SearchSpace.from_dict(study.get("space"))
    costs, damages, players = (
        CostModel(from_json(study.get("graph")), space),
        Damages.of(space, study.probes()),
        swapped_players(space),
    )
    known = values_of(study, METRICS, failed=False)
    values = {key: np.array(list(row.values())) for key, row in known.items()}
    change = []
    for k in range(CONTEXTS):
        protocol = study.protocol.block(FIRST_BLOCK + k).digest
        ends = [[(c.digest, protocol) for c in pair] for pair in ends_in(space, costs, damages, k)]
        if all(end in values for pair in ends for end in pair):
            change.append([values[after] - values[before] for before, after in ends])
    if len(change) < 2:
        raise SystemExit(
            f"{model}: the truth has {len(change)} complete contexts, a table needs 2; run the part truth"
        )
    worse = np.array(change).transpose(2, 1, 0) * [[[-1.0]], [[1.0]]]
    column, rows = {s: j for j, s in enumerate(space.schemes)}, [p.column for p in players]
    before, after = (
        damages.weights[rows, [column[getattr(p, end)] for p in players]] for end in ("before", "after")
    )
    return Truth(
        [p.layer for p in players],
        dict(zip(METRICS, worse, strict=True)),
        study.protocol.images,
        after - before,
    )


def gain(effect: np.ndarray, rival: np.ndarray, real: np.ndarray) -> list[float]:
    """95 % interval of how much higher the SRCC of ``effect`` with the truth is than that of ``rival``,
    layers drawn with replacement."""
    from aquabit.sensitivity.surrogate.scores import srcc

    drawn = np.random.default_rng(0).integers(len(real), size=(REPLICATES, len(real)))
    return np.percentile(
        [srcc(effect[d], real[d]) - srcc(rival[d], real[d]) for d in drawn], [2.5, 97.5]
    ).tolist()


def judged(layers: Any, truth: Truth, metric: str) -> dict[str, Any]:
    """What the table of layers of a study says of a metric, beside the truth."""
    from aquabit.sensitivity.surrogate.scores import srcc

    own = layers.set_index("name").loc[truth.layers]
    effect, low, high, predicted = (own[k].to_numpy(float) for k in ("effect", "low", "high", "predicted"))
    real, half, swapped = truth.mean(metric), truth.half(metric), own.n.to_numpy(int) > 0
    sure = np.abs(real) > half
    apart, reach = real - effect, np.where(real > effect, high - effect, effect - low)
    direct = own.real.to_numpy(float)[swapped]
    return {
        "combined": srcc(effect, real),
        "predicted": srcc(predicted, real),
        "damages": srcc(truth.damage, real),
        "gain": gain(effect, truth.damage, real),
        "swapped": int(swapped.sum()),
        "direct": srcc(direct, real[swapped]) if len(direct) > 2 else None,
        "combined_of_swapped": srcc(effect[swapped], real[swapped]) if len(direct) > 2 else None,
        "sure": int(sure.sum()),
        "sure_worse": int((sure & (real > 0)).sum()),
        "signs": float((np.sign(effect) == np.sign(real))[sure].mean()) if sure.any() else None,
        "covered": float((np.abs(apart) <= reach).mean()),
        "covered_allowing": float((np.abs(apart) <= np.hypot(reach, half)).mean()),
        "covered_swapped": (
            float((np.abs(apart) <= np.hypot(reach, half))[swapped].mean()) if swapped.any() else None
        ),
        "width": float(np.median(high - low)),
        "typical": float(np.median(np.abs(real))),
        "truth_width": float(np.median(2 * half)),
    }


def ranking_scores(found: dict[str, Any]) -> dict[str, Any]:
    """estimator -> its held-out within-budget SRCC, over all training measurements and among good ones,
    with counts and ceilings."""
    among, others = found["among_good"], found["baselines"]
    all_of = {"gbdt": found["within_budget_srcc"], **{k: others[k]["within_budget_srcc"] for k in others}}
    good_of = {"gbdt": among["srcc"], **among["baselines"]}
    names = [k for k in all_of if k != "average_bits"]
    return {
        "within_budget": {k: all_of[k] for k in names},
        "ceiling": found["noise_ceiling"],
        "among_good": {k: good_of.get(k) for k in names},
        "good": among["count"],
        "good_ceiling": among["noise_ceiling"],
    }


def rows_of(folder: Path, model: str, arms: Sequence[str]) -> list[dict[str, Any]]:
    """One row an arm and metric; then the truth itself, one a layer."""
    from aquabit.sensitivity.result import Sensitivity
    from aquabit.study import Study

    measured = file_of(folder, model, "truth").exists()
    truth = read_truth(folder, model) if measured else stored_truth(model)
    rows = list[dict[str, Any]]()
    for arm in arms:
        if not explained_file(folder, model, arm, METRICS[-1]).exists():
            continue
        study = Study(file_of(folder, model, arm), create=False)
        kinds = study.measurements().kind.value_counts()
        spent = {
            "samples": int(kinds["sample"]),
            "swaps": int(kinds["flip"]),
            "references": int(kinds["uniform"]),
        }
        for metric in METRICS:
            found = Sensitivity.from_dict(read(explained_file(folder, model, arm, metric)))
            half, all_of = truth.reliability(metric)
            row = {
                "kind": "arm",
                "model": model,
                "arm": arm,
                "metric": metric,
                "surrogate": SURROGATE,
                **spent,
                "images": study.protocol.images,
                "truth_images": truth.images,
                "contexts": truth.worse[metric].shape[1],
            }
            row |= {
                "layers": len(truth.layers),
                "half": half,
                "reliability": all_of,
                **judged(found.layers, truth, metric),
            }
            rows.append(plain({**row, **ranking_scores(dict(found.surrogate))}, 6))
            print(rows[-1], flush=True)
    for i, layer in enumerate(truth.layers if measured else []):
        worse = {m: plain(truth.worse[m][i].tolist(), 6) for m in METRICS}
        rows.append(
            {
                "kind": "truth",
                "model": model,
                "layer": layer,
                "swap": SWAP,
                **worse,
                "damage": plain(truth.damage[i], 6),
            }
        )
    return rows


def first_cells(row: dict[str, Any]) -> str:
    return f"| {row['model']} | {row['metric']} | {row['arm']} | {row.get('surrogate', 'trees alone')} |"


def same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a row takes another's place: that of an arm, a metric and a surrogate; of all layers' truth."""
    keys = ("kind", "model", "arm", "metric", "surrogate")
    return all(old.get(k) == new.get(k) for k in keys)


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(found: dict[str, Any]) -> str:
    rows = found["rows"]
    arms = [r for r in rows if r["kind"] == "arm"]
    first = arms[0]
    lines = [
        "# Effects of layers beside fresh truth in good contexts",
        "",
        f"{about(found['machine'])}. Made by `{found['command']}`.",
        "",
        (
            f"What a layer worsens when it goes from {SWAP.replace(':', ' to ')} in good configurations"
            f" within 0.25 bit of {BITS:g} bits, a8: dB of PSNR to full precision, or FID. An arm is"
            f" {first['samples']} configurations of a design and {FLIPS} real swaps; measurements are what"
            " these took, beside the uniform references and the probes that every study has. Truth: the mean"
            " of all layers' real swaps over contexts of their own draw, each on fresh seeds, as many as"
            " a measurement has images; nothing was chosen on it."
        ),
        "",
        (
            "SRCC with the truth over all layers: the ranking (combined), the surrogate alone (predicted),"
            " the difference of damages, and the 95 % interval of what combined has more than damages (layers"
            " drawn with replacement); over the layers that the arm swapped: its direct swaps alone, and the"
            " combined effects of the same layers. Reliability: SRCC between halves of the contexts (mean of"
            " all ways to halve them), and stepped up to all of them (Spearman and Brown); what knew the"
            " effects exactly would score its root. Surrogate: a line in the logarithm of the summed damages"
            " with trees on top, and, before, trees alone: of studies of the same seeds that were measured"
            " apart."
        ),
        "",
        (
            "| model | metric | arm | surrogate | measurements | images, of the truth | contexts"
            " | reliability, half, all | combined | predicted | damages | combined - damages"
            " | direct swaps (layers), combined of these |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in arms:
        lines.append(
            f"{first_cells(r)} {r['samples'] + r['swaps']} |"
            f" {r.get('images', IMAGES)}, {r.get('truth_images', IMAGES)} | {r['contexts']} |"
            f" {shown(r['half'])}, {shown(r['reliability'])} | {shown(r['combined'])} |"
            f" {shown(r['predicted'])} | {shown(r['damages'])} | {r['gain'][0]:+.2f} to {r['gain'][1]:+.2f} |"
            f" {shown(r['direct'])} ({r['swapped']}), {shown(r['combined_of_swapped'])} |"
        )
    lines += [
        "",
        "## Signs and intervals",
        "",
        (
            "Signs: agreement where the truth's 95 % t interval over contexts excludes 0 (of how many layers,"
            " and how many of these are worse). Covered: truth means inside the 95 % intervals; allowing:"
            " inside once the truth's own half-width is added in squares, since a mean over few contexts is"
            " off too; of swapped: the same for layers that the arm swapped. Widths are medians over layers."
        ),
        "",
        (
            "| model | metric | arm | surrogate | signs | sure layers, worse | covered | allowing"
            " | of swapped | interval | the truth's interval | size of an effect |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in arms:
        covered = " | ".join(
            "" if r[k] is None else f"{100 * r[k]:.0f} %"
            for k in ("covered", "covered_allowing", "covered_swapped")
        )
        signs = "" if r["signs"] is None else f"{100 * r['signs']:.0f} %"
        widths = " | ".join(f"{r[k]:.3g}" for k in ("width", "truth_width", "typical"))
        lines.append(f"{first_cells(r)} {signs} | {r['sure']}, {r['sure_worse']} | {covered} | {widths} |")
    names = list(first["within_budget"])
    lines += [
        "",
        "## Within-budget SRCC, out of fold",
        "",
        (
            "Of all training measurements (the configurations and the uniform references), then among good"
            " ones: those within 25 % of the least error at their size. Empty: fewer than 20 good ones, or"
            " not measured on other images."
        ),
        "",
        (
            f"| model | metric | arm | surrogate | {' | '.join(names)} | ceiling | good ones |"
            f" {' | '.join(f'{n}, good' for n in names)} | ceiling, good |"
        ),
        "|" + "---|" * (7 + 2 * len(names)),
    ]
    for r in arms:
        both = [" | ".join(shown(r[part][n]) for n in names) for part in ("within_budget", "among_good")]
        lines.append(
            f"{first_cells(r)} {both[0]} | {shown(r['ceiling'])} | {r['good']} |"
            f" {both[1]} | {shown(r['good_ceiling'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["measure", "truth", "ceiling", "explain", "table"], "effects")
    arguments.add_argument("--bank", type=Path, help="default: bank in the folder")
    arguments.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    arguments.add_argument("--contexts", type=int, default=CONTEXTS, help="of the truth")
    arguments.add_argument("--images", type=int, default=IMAGES, help="a measurement; a study keeps its own")
    given = parsed(arguments)
    bank = given.bank or given.folder / "bank"
    for model in given.models:
        for part in given.parts:
            if part == "measure":
                measure(given.folder, bank, model, given.arms, given.images)
            elif part == "truth":
                truth(given.folder, bank, model, given.contexts, given.images)
            elif part == "ceiling":
                ceiling(given.folder, bank, model, given.arms, given.images)
            elif part == "explain":
                explain_arms(given.folder, model, given.arms)
    if "table" in given.parts:
        found = [r for m in given.models for r in rows_of(given.folder, m, given.arms)]
        old = read(RESULTS / "effects.json").get("rows", [])
        rows = replaced([r for r in old if not any(same(r, n) for n in found)] + found, [], [])
        seen = " ceiling" if any(r.get("ceiling") is not None for r in rows) else ""
        command = f"python benchmarks/effects.py measure truth{seen} explain table"
        write_results("effects", command, {"seed": SEED, "rows": rows}, table)


if __name__ == "__main__":
    main()
