"""The figures of the whole flow: python benchmarks/flow.py PART|all [--folder DIR] [--models ...]

overhead   measuring a configuration against generating the same images in full precision, in pairs, one
           thread
analysis   fit + explain + one search of 300 configurations of 73 layers (synthetic labels), one process
large      the same of 1,000 configurations of 309 layers and 10 schemes
quality    300 measurements a model, of schemes fitted to weights alone (benchmarks/additive.py has the
           others): within-budget SRCC, real swaps,
           and the winner at uniform usq3's exact bytes on fresh seeds
packed     the winner's packed artifact against its dense measurement: FID on the fresh seeds (after quality)
demo       the main job at its defaults in fresh processes with an empty bank
make_demo  the same as `make demo` runs it, after installation

Tables go to benchmarks/results/flow.json and flow.md. Studies are kept in --folder and continue where they
stopped.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import MODELS, RESULTS, about, machine, parser, read, write_results

WEIGHT_ONLY = (
    "usq2",
    "usq3",
    "usq4",
    "usq8",
    "vq2",
    "vq3",
    "vq4",
    "vq2c",
    "vq3c",
    "vq4c",
)  # what the quality part chooses from


def overhead(folder: Path, models: list[str], pairs: int = 15) -> list[dict[str, Any]]:
    """Median seconds and the median of paired ratios. Full precision is the untouched pipeline."""
    from aquabit.measuring.evaluator import Evaluator
    from aquabit.measuring.model import open_model
    from aquabit.pipelines import Adapter, load
    from aquabit.quant.bank import Bank
    from aquabit.runtime import single_thread
    from aquabit.scheme import Protocol
    from aquabit.space import make_space

    rows, protocol = [], Protocol()
    for name in models:
        opened = open_model(name)
        space = make_space(opened.graph, opened.fingerprint, name)
        evaluator = Evaluator(name, opened.graph, Bank(folder / "bank"), opened.fingerprint)
        plain = Adapter(load(name))
        configs = space.sample(pairs, seed=5)
        for config in configs:  # schemes are fitted once per model: amortised
            evaluator.quantized.prepare(config)
        evaluator.full_precision(protocol)
        dense, ours = [], []
        for config in configs:
            started = time.perf_counter()
            with single_thread("cpu"):
                for batch in plain.batches(protocol):
                    plain.images(protocol, batch)
            dense.append(time.perf_counter() - started)
            ours.append(evaluator.measure(config, protocol)[0].seconds)
        ratios = [b / a for a, b in zip(dense, ours, strict=True)]
        rows.append(
            {
                "model": name,
                "full_precision_s": statistics.median(dense),
                "measurement_s": statistics.median(ours),
                "ratio": statistics.median(ratios),
                "ratio_low": float(np.quantile(ratios, 0.25)),
                "ratio_high": float(np.quantile(ratios, 0.75)),
                "pairs": pairs,
                "target": 1.15,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    return rows


def synthetic_study(path: Path, large: bool = False) -> tuple[Any, Any, Any, Any]:
    """A study of a U-Net of 73 (or 309) layers with made-up errors, probes and labels: (study, space,
    costs, put), ``put`` records configurations."""
    from diffusers import UNet2DModel

    from aquabit.cost import CostModel
    from aquabit.graph import to_json
    from aquabit.measuring.evaluator import SKETCH
    from aquabit.pipelines import trace
    from aquabit.scheme import Measurement, Protocol
    from aquabit.space import make_space
    from aquabit.study import Study

    down, depth = (
        (["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"], 6)
        if large
        else (["DownBlock2D", "AttnDownBlock2D"], 2)
    )
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 64, 128, 128) if large else (64, 128),
        layers_per_block=depth,
        norm_num_groups=16,
        attention_head_dim=32,
        down_block_types=down,
        up_block_types=[d.replace("Down", "Up") for d in reversed(down)],
        num_class_embeds=11,
    )
    graph = trace(net)
    options: dict[str, Any] = {"schemes": list(WEIGHT_ONLY)}
    if not large:
        options = {"schemes": [*WEIGHT_ONLY, "usq2h", "usq3h", "usq4h"], "levels": [1.5, 2.0, 3.0, 4.0]}
    space, rng = make_space(graph, "s" * 16, "synthetic", **options), np.random.default_rng(0)
    path.unlink(missing_ok=True)
    study, protocol, costs = Study(path), Protocol(), CostModel(graph, space)
    study.begin("synthetic", space.fingerprint, to_json(graph), space.to_dict(), protocol)
    errors = {
        (k, str(s)): float(0.6 * 4.0**-s.bits * rng.uniform(0.7, 1.3))
        for k, row in space.choices.items()
        for s in row
    }
    facts: dict[tuple[str, str], dict[str, Any]] = {k: {"error": v} for k, v in errors.items()}
    facts |= {(k, a): {} for k in space.choices for a in ("a6", "a8")}
    for (
        (layer, level),
        value,
    ) in facts.items():  # as probes make them: a direction per layer and level, its length from the error
        size = errors.get((layer, level), 1e-4 if level == "a6" else 1e-5)
        value |= {"damage": size, "sketch": (rng.normal(size=SKETCH) * (size / SKETCH) ** 0.5).tolist()}
    study.add_features(facts)
    gain = np.exp(rng.normal(0, 1.2, len(space.layers)))

    def put(configs: list[Any], kind: str) -> None:
        for config in configs:
            damage = sum(
                g * errors[k, str(config[k].weight)] for k, g in zip(space.layers, gain, strict=True)
            )
            metrics = {"fid": float(5 + 60 * damage**0.8 / (1 + damage**0.8))}
            study.record(
                config,
                Measurement(config.digest, protocol.digest, metrics, 1.0),
                kind,
                costs.totals_of(config),
            )

    return study, space, costs, put


def analysis(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """300 configurations of the synthetic study: one fit, one explanation, one search with two rounds."""
    return analysed(folder / "synthetic.db", 300, False, 2, 30.0)


def large(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """1,000 configurations of 309 layers and 10 schemes: one fit, one explanation, one search."""
    return analysed(folder / "large.db", 1000, True, 1, 60.0)


def analysed(path: Path, count: int, big: bool, rounds: int, target: float) -> list[dict[str, Any]]:
    """Seconds, and processor seconds of all threads, which other jobs on a shared machine do not lengthen
    much."""
    from aquabit.scheme import Budget
    from aquabit.search.search_options import SearchOptions
    from aquabit.search.surrogate_search import Experiment, find_candidates
    from aquabit.sensitivity.explaining import explain
    from aquabit.sensitivity.surrogate.fit import fit_from_study

    study, space, costs, put = synthetic_study(path, big)

    def measured() -> list[tuple[Any, float]]:
        table, known = study.measurements(study.protocol), study.configs()
        return [(known[c], float(np.log(v))) for c, v in zip(table.config, table.fid, strict=True)]

    with study.writing():
        put(space.sample(count), "sample")
        seconds, cpu = {}, time.process_time()
        started = time.perf_counter()
        fitted = fit_from_study(study)
        seconds["fit_and_cross_validate"] = time.perf_counter() - started
        started = time.perf_counter()
        explain(study, fitted=fitted)
        seconds["explain"] = time.perf_counter() - started
        started, first = time.perf_counter(), [fitted]
        experiment = Experiment(
            lambda: (first.pop() if first else fit_from_study(study)).badness,
            lambda c: put(c, "candidate"),
            measured,
        )
        find_candidates(costs, SearchOptions(Budget(bits=3.0), rounds=rounds), experiment)
        seconds["search"] = time.perf_counter() - started
        cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        {
            "layers": len(space.layers),
            "schemes": len(space.schemes),
            "configurations": count,
            **seconds,
            "total_s": sum(seconds.values()),
            "cpu_s": cpu,
            "target_s": target,
            "peak_gib": peak,
        }
    ]


def quality(folder: Path, models: list[str], samples: int = 300, flips: int = 60) -> list[dict[str, Any]]:
    """What the surrogate and the search reach on the real models, on seeds that neither saw."""
    from aquabit import workflows as flow
    from aquabit.study import Study
    from aquabit.workflows import measure

    rows = []
    for name in models:
        study, options = Study(folder / f"{name}.db"), {"workers": 2, "bank": str(folder / "bank")}
        measure(name, study, samples, space={"schemes": list(WEIGHT_ONLY)}, **options)
        sensitivity = flow.validate(study, flips, **options)
        space_costs = _uniform_bytes(study)
        front = flow.find(study, bytes=space_costs["usq3"], **options)
        c, v = front.comparison, sensitivity.validation or {}
        rows.append(
            {
                "model": name,
                "measurements": sensitivity.measurements,
                "within_budget_srcc": sensitivity.surrogate["within_budget_srcc"],
                "baselines": {
                    k: b["within_budget_srcc"] for k, b in sensitivity.surrogate["baselines"].items()
                },
                "srcc": sensitivity.surrogate["srcc"],
                "swap_srcc": v.get("srcc"),
                "swap_sign_agreement": v.get("sign_agreement"),
                "swaps": v.get("flips"),
                "bytes_budget": space_costs["usq3"],
                "winner": c["winner"],
                "uniform": c["uniform"],
                "difference": c["difference"],
                "fresh_blocks": c["blocks"],
                "full_precision_fid": _fresh_reference(study),
            }
        )
    return rows


def packed(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """FID of images from the packed artifact and of the dense measurement, on the same fresh seeds."""
    from aquabit import packing
    from aquabit.pipelines import Adapter, load
    from aquabit.quality import Quality
    from aquabit.runtime import single_thread
    from aquabit.scheme import QuantConfig
    from aquabit.search.fresh_front import FRESH_BLOCKS
    from aquabit.stats import mean_interval, paired_difference
    from aquabit.study import Study

    rows = []
    for name in models:
        study = Study(folder / f"{name}.db", create=False)
        front = study.need("front", "run the quality part first")
        config = next(
            c
            for c in (QuantConfig.from_dict(m["config"]) for m in front["members"])
            if c.digest == front["winner"]
        )
        size = packing.quantize(name, config, bank=str(folder / "bank"), accuracy="exact").save(
            folder / f"packed-{name}"
        )
        adapter = Adapter(load(str(folder / f"packed-{name}")))
        source = adapter.reference()
        values = []
        for block in FRESH_BLOCKS:
            protocol, quality = study.protocol.block(block), Quality([source], ["fid"])
            with single_thread("cpu"):
                for batch in adapter.batches(protocol):
                    quality.update(adapter.images(protocol, batch))
            values.append(quality.compute()["fid"])
        dense = front["comparison"]["winner"]["blocks"]
        rows.append(
            {
                "model": name,
                "bytes": size,
                "study_bytes": front["comparison"]["winner"]["bytes"],
                "dense": mean_interval(dense).to_dict(),
                "packed": mean_interval(values).to_dict(),
                "difference": paired_difference(values, dense).to_dict(),
            }
        )
    return rows


def demo(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """Wall-clock time of the main job at its defaults, from nothing to the report."""
    return [job(folder, name, [], 600.0) for name in models]


def make_demo(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """The same of what `make demo` runs after installation; the words are the Makefile's own."""
    rules = (Path(__file__).parents[1] / "Makefile").read_text()
    of = dict(re.findall(r"^(MODEL|DEMO_OPTIONS) \?= (.*)$", rules, re.MULTILINE))
    return [job(folder, of["MODEL"], of["DEMO_OPTIONS"].split(), 240.0)]


def job(folder: Path, name: str, words: list[str], target: float) -> dict[str, Any]:
    """A run in fresh processes with an empty bank: seconds, the peak memory of the largest process, and what
    was found beside the uniform configuration of its size."""
    from aquabit.study import Study

    out, bank = folder / f"demo-{name}", folder / f"demo-bank-{name}"
    for old in (out, bank):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "aquabit.cli.app", "run", name, *words]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--out", str(out), "--bank", str(bank)], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    study = Study(out / "study.db")
    kinds = study.measurements(failed=True).kind.value_counts()
    return {
        "model": name,
        "seconds": seconds,
        "processor_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "target_s": target,
        "measurements": int(kinds.sum()),
        "samples": int(kinds.get("sample", 0)),
        "swaps": int(kinds.get("flip", 0)) // 2,
        "peak_gib": after.ru_maxrss / 2**20,
        "words": " ".join(words),
        "comparison": (study.get("front") or {}).get("comparison"),
    }


def _uniform_bytes(study: Any) -> dict[str, int]:
    from aquabit.cost import CostModel
    from aquabit.graph import from_json
    from aquabit.space import SearchSpace

    space = SearchSpace.from_dict(study.get("space"))
    costs = CostModel(from_json(study.get("graph")), space)
    return {s: costs(space.uniform(s)).bytes for s in ("usq2", "usq3", "usq4")}


def _fresh_reference(study: Any) -> float:
    from aquabit.search.fresh_front import FRESH_BLOCKS

    digests = {study.protocol.block(b).digest for b in FRESH_BLOCKS}
    table = study.measurements(kind="reference")
    return float(table[table.protocol.isin(digests)].fid.mean())


def markdown(found: dict[str, Any]) -> str:
    machines: dict[str, list[str]] = {}  # what was run on each
    for part, of in sorted(found["machines"].items()):
        machines.setdefault(about(of), []).append(part)
    told = "; ".join(f"{', '.join(parts)} on {name}" for name, parts in machines.items())
    lines = [
        f"# The whole flow\n\nMade by `{found['command']}` (each part also runs alone, by its name):"
        f" {told}.\n"
    ]
    if "overhead" in found:
        lines.append(
            "## Measuring against generating in full precision (one thread, pairs in one run)\n\n| model |"
            " full precision, s | measurement, s | ratio (quartiles) | target | peak memory, GiB"
            " |\n|---|---|---|---|---|---|"
        )
        lines += [
            f"| {r['model']} | {r['full_precision_s']:.2f} | {r['measurement_s']:.2f} | {r['ratio']:.3f}"
            f" ({r['ratio_low']:.3f} to {r['ratio_high']:.3f}) | {r['target']} | {r['peak_gib']:.2f} |"
            for r in found["overhead"]
        ]
    sized = [r for part in ("analysis", "large") for r in found.get(part, [])]
    if sized:
        lines.append(
            "\n## Fit, explain, search (two rounds for 73 layers, one for 309)\n\n| layers | configurations |"
            " fit, s | explain, s | search, s | total, s (processor) | target, s | peak, GiB"
            " |\n|---|---|---|---|---|---|---|---|"
        )
        lines += [
            f"| {r['layers']} | {r['configurations']} | {r['fit_and_cross_validate']:.1f} |"
            f" {r['explain']:.1f} | {r['search']:.1f} | {r['total_s']:.1f} ({r['cpu_s']:.1f}) |"
            f" {r['target_s']:.0f} | {r['peak_gib']:.2f} |"
            for r in sized
        ]
    if "quality" in found:
        lines.append(
            "\n## Surrogate and search among weight-only schemes, objective FID (128 images, 10 DDIM"
            " steps)\n\n| model | measurements | within-budget SRCC (ridge one-hot) | SRCC | real swaps:"
            " SRCC, sign agreement (n) | winner: bytes, FID | uniform usq3: bytes, FID | difference (95 %) |"
            " full precision |\n|---|---|---|---|---|---|---|---|---|"
        )
        for r in found["quality"]:
            w, u, d = r["winner"], r["uniform"], r["difference"]
            lines.append(
                f"| {r['model']} | {r['measurements']} | {r['within_budget_srcc']:.3f}"
                f" ({r['baselines'].get('ridge_one_hot', float('nan')):.3f}) | {r['srcc']:.3f} |"
                f" {r['swap_srcc']:.2f}, {r['swap_sign_agreement']:.2f} ({r['swaps']}) | {w['bytes']:,},"
                f" {w['value']:.2f} | {u['bytes']:,}, {u['value']:.2f} | {d['value']:+.2f} ({d['low']:+.2f}"
                f" to {d['high']:+.2f}) | {r['full_precision_fid']:.2f} |"
            )
    if "packed" in found:
        lines.append(
            "\n## The winner, packed and dense, on the same fresh seeds (a8)\n\n| model | bytes on disk"
            " (study) | FID dense | FID packed | difference (95 %) |\n|---|---|---|---|---|"
        )
        lines += [
            f"| {r['model']} | {r['bytes']:,} ({r['study_bytes']:,}) | {r['dense']['value']:.3f} |"
            f" {r['packed']['value']:.3f} | {r['difference']['value']:+.4f} ({r['difference']['low']:+.4f} to"
            f" {r['difference']['high']:+.4f}) |"
            for r in found["packed"]
        ]
    for part, title in (
        ("demo", "The main job at its defaults, from nothing to the report"),
        ("make_demo", "`make demo`, after installation"),
    ):
        if part in found:
            lines += [
                f"\n## {title}\n",
                "| model | wall clock, s | processor, s | target, s | configurations | swaps | measurements |"
                " peak of a process, GiB |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for r in found[part]:
                spent = f"{r['processor_s']:.0f}" if "processor_s" in r else ""
                lines.append(
                    f"| {r['model']} {r.get('words', '')} | {r['seconds']:.0f} | {spent} |"
                    f" {r['target_s']:.0f} | {r['samples']} | {r['swaps']} | {r['measurements']} |"
                    f" {r['peak_gib']:.2f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parts = {
        "overhead": overhead,
        "analysis": analysis,
        "large": large,
        "quality": quality,
        "packed": packed,
        "demo": demo,
        "make_demo": make_demo,
    }
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=[*parts, "all"])
    arguments.add_argument("--folder", type=Path, default=Path("benchmarks/work"))
    arguments.add_argument("--models", nargs="*", default=list(MODELS))
    options = arguments.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {"machines": {}, **read(RESULTS / "flow.json")}
    for name in parts if options.part == "all" else [options.part]:
        found[name] = parts[name](options.folder, options.models)
        found["machines"] = {**found["machines"], name: machine()}
        write_results("flow", "python benchmarks/flow.py all", found, markdown)
        print(json.dumps(found[name], indent=1), file=sys.stderr)
    print((RESULTS / "flow.md").read_text())


if __name__ == "__main__":
    main()
