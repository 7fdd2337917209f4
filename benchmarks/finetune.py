"""Fine-tuning's figures: python benchmarks/finetune.py PART ... [--folder DIR] [--models ...] [--steps N]
[--ablation-steps N]

main        near 2 bits, a8, additive formats mixed by the integer program (as benchmarks/additive.py): full
            precision, layer-wise, tuned;
            to reach: max(0, FID - FID of full precision) of tuned at most half of layer-wise's, in at most 20
            minutes a model
ablation    from the same start: the readings of SeMI, with shuffled replay and along trajectories, and plain
            straight-through Adam
orderings   near 4, 3 and 2 bits, a8: uniform, additive, additive and tuned, with PTQD's correction and
            without; exact bytes

Every measurement is a row of benchmarks/results/finetune.json, appended when it is done and skipped when it
is there; finetune.md is written from them. One thread. Studies and fitted weights are kept in --folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.additive import session_of
from benchmarks.common import MODELS, RESULTS, difference, machine, mean, parsed, parser, read, spans, write

BLOCKS = (31, 32, 33, 34, 35)  # of fresh seeds; additive's are 21 to 28, the flow's 11 to 15
IMAGES = 512  # a block: FID of few images is noisy
METRICS = ("fid", "sfid", "is", "psnr")
FULL, LAYERWISE, TUNED = "full precision", "layer-wise", "tuned"
CORRECTION = "cnc+bc"  # PTQD's, where the sampler is deterministic


class Rows:
    """The rows of the JSON file: found by their key, written as soon as they are made."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = read(path, {"rows": []})
        self.found |= {
            "machine": machine(),
            "command": "python benchmarks/finetune.py main ablation orderings",
        }

    def of(self, **key: Any) -> list[dict[str, Any]]:
        return [r for r in self.found["rows"] if all(r.get(k) == v for k, v in key.items())]

    def get(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key, made where it is missing."""
        known = self.of(**key)
        if known:
            return known[0]
        row = {**key, **make()}
        print(json.dumps(row)[:400], flush=True)
        self.found["rows"].append(row)
        write(self.path, self.found)
        return row


class Bench:
    """One model: configurations to start from, tuning and measuring."""

    def __init__(self, rows: Rows, folder: Path, model: str, session: Any):
        from aquabit.measuring.evaluator import Evaluator
        from aquabit.quant.bank import Bank

        self.rows, self.model, self.session = rows, model, session
        here = session.model
        self.evaluator = Evaluator(model, here.graph, Bank(folder / "bank"), here.fingerprint)
        self.errors = {k: v["damage"] for k, v in session.study.features().items() if "damage" in v}

    def additive(self, bits: int) -> Any:
        """Additive formats mixed on probed errors within the bytes of uniform ``usq{bits}h``."""
        from aquabit.scheme import Budget
        from benchmarks.research.assign import assign

        budget = Budget(bytes=self.session.costs(self.uniform(bits)).bytes)
        return assign(
            self.session.model.graph, self.session.space, budget, self.errors, lambda layer, s: s.kind == "aq"
        )

    def uniform(self, bits: int) -> Any:
        return self.session.space.uniform(f"usq{bits}h")

    def tune(self, part: str, name: str, config: Any, settings: Any) -> Any:
        """A tuned configuration; the row says how the tuning went. Steps are reported every minute or so."""
        from aquabit.pipelines import replay_recorder
        from aquabit.quant.finetuning.finetune import code_bits, finetune

        settings = settings.resolved(code_bits(self.evaluator.quantized, config))

        def say(what: str, done: int, total: int) -> None:
            if done % 200 == 0:
                print(self.model, name, what, done, total, flush=True)

        def make() -> dict[str, Any]:
            tuned = finetune(
                self.evaluator.quantized, config, replay_recorder(self.evaluator.pipe), settings, say
            )
            facts = {
                "before": tuned.before,
                "after": tuned.after,
                "changed": tuned.changed,
                "seconds": tuned.seconds,
            }
            return facts | {
                "config": tuned.config.to_dict(),
                "notes": list(tuned.notes),
                "history": [dict(r) for r in tuned.history],
            }

        from aquabit.scheme import QuantConfig

        key = {
            "part": part,
            "kind": "tuning",
            "model": self.model,
            "name": name,
            "settings": asdict(settings),
            "start": config.digest,
        }
        key["settings"] |= {k: list(v) for k, v in key["settings"].items() if isinstance(v, tuple)}
        return QuantConfig.from_dict(self.rows.get(key, make)["config"])

    def measure(
        self, part: str, name: str, config: Any, blocks: Sequence[int] = BLOCKS, **facts: Any
    ) -> None:
        """Metrics of a configuration on blocks of fresh seeds."""
        from aquabit.scheme import Protocol

        cost = self.session.costs(config)
        for block in blocks:
            key = {
                "part": part,
                "kind": "measurement",
                "model": self.model,
                "name": name,
                "config": config.digest,
                "block": block,
            } | facts

            def make(block: int = block) -> dict[str, Any]:
                known = self.rows.of(kind="measurement", config=config.digest, block=block)  # another part's
                if known:
                    return {k: known[0][k] for k in ("bytes", "bits", *METRICS)}
                found, _ = self.evaluator.measure(
                    config, replace(Protocol(images=IMAGES), seed=0).block(block)
                )
                return {
                    "bytes": cost.bytes,
                    "bits": cost.bits_per_weight,
                    **{m: found.metrics.get(m) for m in METRICS},
                }

            self.rows.get(key, make)

    def full_precision(self) -> Any:
        return self.session.space.full_precision()


@contextmanager
def bench_of(rows: Rows, folder: Path, model: str) -> Iterator[Bench]:
    with session_of(folder, model) as session:
        yield Bench(rows, folder, model, session)


def main_part(rows: Rows, folder: Path, models: list[str], options: Any) -> None:
    from aquabit.quant.finetuning.finetune import FineTuning

    for model in models:
        with bench_of(rows, folder, model) as bench:
            start = bench.additive(2)
            tuned = bench.tune("main", TUNED, start, replace(FineTuning(), steps=options.steps))
            for name, config in ((FULL, bench.full_precision()), (LAYERWISE, start), (TUNED, tuned)):
                bench.measure("main", name, config)


def variants(steps: int) -> dict[str, Any]:
    """Settings by name; the first is what the others are compared with."""
    from aquabit.quant.finetuning.finetune import FineTuning

    base = replace(FineTuning(), steps=steps, images=512, semi_groups=False, semi_discontinuity=False)
    flags = {
        "no SeMI": {},
        "groups": {"semi_groups": True},
        "discontinuity": {"semi_discontinuity": True},
        "both": {"semi_groups": True, "semi_discontinuity": True},
    }
    named = {
        f"{order}, {name}": replace(base, order=order, **own)
        for order in ("shuffled", "walking")
        for name, own in flags.items()
    }
    plain = replace(base, method="straight_through", code_betas=base.betas)
    return {"default": replace(base, semi_groups=True), **named, "straight-through Adam": plain}


def ablation(rows: Rows, folder: Path, models: list[str], options: Any) -> None:
    for model in models:
        with bench_of(rows, folder, model) as bench:
            start = bench.additive(2)
            for name, config in ((FULL, bench.full_precision()), (LAYERWISE, start)):
                bench.measure("ablation", name, config, BLOCKS[:3])
            for name, settings in variants(options.ablation_steps).items():
                bench.measure("ablation", name, bench.tune("ablation", name, start, settings), BLOCKS[:3])


def orderings(rows: Rows, folder: Path, models: list[str], options: Any) -> None:
    from aquabit.quant.finetuning.finetune import FineTuning

    corrected = importlib.util.find_spec("aquabit.quant.correction.corrector") is not None
    for model in models:
        with bench_of(rows, folder, model) as bench:
            bench.measure("orderings", FULL, bench.full_precision(), target=16)
            for bits in (4, 3, 2):
                start = bench.additive(bits)
                part = "main" if bits == 2 else "orderings"  # tuned once
                steps = options.steps if bits == 2 else options.ordering_steps
                tuned = bench.tune(
                    part, TUNED if bits == 2 else f"{TUNED} {bits}", start, replace(FineTuning(), steps=steps)
                )
                for name, config in (("USQ", bench.uniform(bits)), ("AQ", start), ("AQ + SeMI-PV", tuned)):
                    bench.measure("orderings", name, config, target=bits)
                    if corrected and name != "AQ":
                        bench.measure(
                            "orderings", f"{name} + PTQD", replace(config, correction=CORRECTION), target=bits
                        )


def values(rows: list[dict[str, Any]], metric: str) -> list[float]:
    return [float(r[metric]) for r in sorted(rows, key=lambda r: int(r["block"]))]


def shown(rows: list[dict[str, Any]], metric: str) -> str:
    return spans(mean(values(rows, metric)))


def apart(rows: list[dict[str, Any]], others: list[dict[str, Any]], metric: str) -> str:
    blocks = {r["block"] for r in rows} & {r["block"] for r in others}
    if len(blocks) < 2:
        return ""
    a, b = ([r for r in some if r["block"] in blocks] for some in (rows, others))
    return spans(difference(values(a, metric), values(b, metric)), sign="+")


def named(rows: Rows, **key: Any) -> dict[str, list[dict[str, Any]]]:
    """Measurements by name, in the order in which they were made."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.of(kind="measurement", **key):
        found.setdefault(row["name"], []).append(row)
    return found


def main_table(rows: Rows) -> list[str]:
    lines = [
        "\n## Near 2 bits, a8: layer-wise and tuned\n",
        (
            "Excess: max(0, mean FID - that of full precision), and the tuned model's share of layer-wise"
            " quantization's.\n"
        ),
        (
            "| model | configuration | bytes | bits | FID | sFID | IS | PSNR | FID excess | FID to layer-wise"
            " | loss on held-out samples | tuning, s |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        made = named(rows, part="main", model=model)
        if not {FULL, LAYERWISE, TUNED} <= set(made):
            continue
        mean = {n: sum(values(r, "fid")) / len(r) for n, r in made.items()}
        excess = {n: max(0.0, mean[n] - mean[FULL]) for n in made}
        tuning = rows.of(part="main", kind="tuning", model=model, name=TUNED)[-1]
        for name, own in made.items():
            loss = {LAYERWISE: f"{tuning['before']:.5f}", TUNED: f"{tuning['after']:.5f}"}.get(name, "")
            share = (
                f" ({excess[TUNED] / excess[LAYERWISE]:.2f} of layer-wise)"
                if name == TUNED and excess[LAYERWISE]
                else ""
            )
            lines.append(
                f"| {model} | {name} | {own[0]['bytes']:,} | {own[0]['bits']:.3f} |"
                f" {' | '.join(shown(own, m) for m in METRICS)} | {excess[name]:.2f}{share} |"
                f" {apart(own, made[LAYERWISE], 'fid') if name == TUNED else ''} | {loss} |"
                f" {tuning['seconds']:.0f} |"
                if name == TUNED
                else (
                    f"| {model} | {name} | {own[0]['bytes']:,} | {own[0]['bits']:.3f} |"
                    f" {' | '.join(shown(own, m) for m in METRICS)} | {excess[name]:.2f} | | {loss} | |"
                )
            )
    return lines


def ablation_table(rows: Rows) -> list[str]:
    lines = [
        "\n## SeMI, the order of the replay, and straight-through Adam\n",
        "The same start and number of steps; differences are paired, to the default settings.\n",
        (
            "| model | variant | steps | loss on held-out samples | codes changed | FID | PSNR | FID to"
            " default | PSNR to default | s |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        made = named(rows, part="ablation", model=model)
        for name, own in made.items():
            tuning = rows.of(part="ablation", kind="tuning", model=model, name=name)
            facts = ["", "", "", ""]
            if tuning:
                t = tuning[-1]
                facts = [
                    str(t["settings"]["steps"]),
                    f"{t['after']:.5f}",
                    f"{t['changed']:.1%}",
                    f"{t['seconds']:.0f}",
                ]
            ends = [
                apart(own, made["default"], m) if name != "default" and "default" in made else ""
                for m in ("fid", "psnr")
            ]
            lines.append(
                f"| {model} | {name} | {' | '.join(facts[:3])} | {shown(own, 'fid')} | {shown(own, 'psnr')} |"
                f" {' | '.join(ends)} | {facts[3]} |"
            )
        lines += [
            f"\n{model}, {r['name']}: {note}.\n"
            for r in rows.of(part="ablation", kind="tuning", model=model)
            for note in r["notes"]
        ]
    return lines


def orderings_table(rows: Rows) -> list[str]:
    lines = [
        "\n## The papers' orderings, a8\n",
        (
            "Bytes are those of the saved denoiser. Differences are paired, to uniform quantization (USQ) of"
            " the same target.\n"
        ),
        "| model | near | method | bytes | bits | FID | sFID | IS | PSNR | FID to USQ | PSNR to USQ |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for target in (16, 4, 3, 2):
            made = named(rows, part="orderings", model=model, target=target)
            for name, own in made.items():
                ends = [
                    apart(own, made["USQ"], m) if "USQ" in made and name != "USQ" else ""
                    for m in ("fid", "psnr")
                ]
                lines.append(
                    f"| {model} | {target} | {name} | {own[0]['bytes']:,} | {own[0]['bits']:.3f} |"
                    f" {' | '.join(shown(own, m) for m in METRICS)} | {' | '.join(ends)} |"
                )
    return lines


def markdown(rows: Rows) -> str:
    m = rows.found["machine"]
    lines = [
        (
            f"# Fine-tuning\n\n{m['cpu']}, {m['cores']} cores, torch {m['torch']}; one thread. Made by"
            f" `{rows.found['command']}`, part by part."
        ),
        f"Means over blocks of {IMAGES} fresh seeds with 95 % intervals.",
    ]
    for part, table in (("main", main_table), ("ablation", ablation_table), ("orderings", orderings_table)):
        if rows.of(part=part, kind="measurement"):
            lines += table(rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    known = {"main": main_part, "ablation": ablation, "orderings": orderings}
    arguments = parser(__doc__, [*known, "all", "table"], "finetune-runs", MODELS)
    arguments.add_argument("--steps", type=int, default=2000)
    arguments.add_argument("--ordering-steps", type=int, default=1000, help="near 3 and 4 bits")
    arguments.add_argument("--ablation-steps", type=int, default=250)
    arguments.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of finetune.json; of several, `table --join` makes one",
    )
    arguments.add_argument(
        "--join", type=Path, nargs="+", default=[], help="folders whose rows are joined into --results"
    )
    given = parsed(arguments)
    rows = Rows(given.results / "finetune.json")
    for folder in given.join:
        for row in Rows(folder / "finetune.json").found["rows"]:
            rows.get(row, dict)
    for part in known if "all" in given.parts else given.parts:
        if part != "table":
            known[part](rows, given.folder, given.models, given)
        (given.results / "finetune.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
