"""gpu.md: what the steps of benchmarks/gpu.py found, in words and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.common import about

Row = Mapping[str, Any]
Rows = Mapping[str, Row]


def markdown(found: Mapping[str, Any]) -> str:
    lines = [
        f"# On a GPU\n\n{found['device']}; {about(found['machine'])}. Made by `{found['command']}`.\n",
        "Only what stands here was run there. Weights are random but for the bundled models, so nothing but"
        " time, memory and rounding can be read from it.\n",
    ]
    if found["size"] == "tiny":
        lines.append("**A trial of the code at a tiny size; none of these times mean anything.**\n")
    for part in (p for p in TITLES if p in found["parts"]):
        rows = found["parts"][part]
        good = {name: row for name, row in rows.items() if "fault" not in row}
        lines += [f"## {TITLES[part]}\n", *(TABLES[part](good) if good else ()), ""]
        lines += [f"Failed: {n} ({r['fault']}).\n" for n, r in rows.items() if "fault" in r]
    return "\n".join(lines)


def table(head: str, rows: list[str]) -> list[str]:
    return [head, "|".join(["", *["---"] * (head.count("|") - 1), ""]), *rows]


def tests(rows: Rows) -> list[str]:
    out = [
        f"| {name} | {r['passed']} | {r['failed'] + r['error']} | {r['skipped']} | {r['seconds']:.0f}"
        f"{', stopped' if 'stopped_after' in r else ''} |"
        for name, r in rows.items()
    ]
    failed = [f"Failed: {name}\n" for r in rows.values() for name in r["failures"]]
    return [*table("| file | passed | failed | skipped | seconds |", out), "", *failed]


def kernels(rows: Rows) -> list[str]:
    out = []
    for name, r in rows.items():
        first, *rest = r["us"]
        others = "; ".join(f"{n} {r['us'][n]:.1f} ({r['faster_than'][n]:.2f})" for n in rest)
        out.append(f"| {name} | {first} | {r['us'][first]:.1f} | {others} | {r['error']:.1e} |")
    head = "| layer | kernel | us | others, us (the kernel is so many times as fast) | error |"
    said = "bfloat16, medians of CUDA graphs, L2 flushed. Error: max\\|y - y64\\| / max\\|y64\\|.\n"
    return [said, *table(head, out)]


def bundled(rows: Rows) -> list[str]:
    out = []
    for name, r in rows.items():
        for where, value in r.items():
            if isinstance(value, Mapping):
                quality = ", ".join(f"{v:.2f}" for v in value.get("psnr", ()))
                out.append(f"| {name} | {where} | {value['seconds']:.2f} | {quality} |")
        out.append(f"| {name} | packed images, CPU to device | | {r['packed_psnr']:.1f} |")
    labels = next(iter(rows.values()))["configurations"][1:]
    said = "Median seconds of a configuration; PSNR to full precision of the same dtype and device, dB.\n"
    return [said, *table(f"| model | where | seconds | PSNR of {', '.join(labels)} |", out)]


def denoisers(rows: Rows) -> list[str]:
    dense = {c["samples"]: c["ms"] for c in rows.get("dense bfloat16", {"calls": []})["calls"]}
    out = []
    for name, r in rows.items():
        for c in r["calls"]:
            ratio = f"{dense[c['samples']] / c['ms']:.2f}" if c["samples"] in dense else ""
            expected = f"{c['expected'] / 1e9:.2f}" if "expected" in c else ""
            off = "" if c["difference"] is None else f"{c['difference']:.1e}"
            kernels = ", ".join(f"{k} {n}" for k, n in c["kernels"].items())
            out.append(
                f"| {name} | {c['samples']} | {c['ms']:.1f} | {ratio} | {c['peak'] / 1e9:.2f} | {expected} |"
                f" {r['resident'] / 1e9:.2f} | {off} | {c['first_seconds']:.1f} | {kernels} |"
            )
    head = (
        "| weights | samples | ms | over dense | peak GB | expected GB | weights GB | difference |"
        " first call, s | kernels: layers |"
    )
    said = (
        "One denoiser call, kernels in their fixed order. Expected: `aquabit inspect --memory`, without the"
        " process's own libraries. Difference: of outputs to those of the same weights decoded, relative.\n"
    )
    return [said, *table(head, out)]


def fits(rows: Rows) -> list[str]:
    out = []
    for name, r in rows.items():
        gb = f"{r['bytes'] / 1e9:.1f}"
        if "ms" in r:
            expected = ", ".join(f"{task} {b / 1e9:.1f}" for task, b in r["expected"].items())
            out += [f"| a call of four guided images, {r['ms']:.0f} ms (expected GB: {expected}) | | {gb} |"]
            out += [f"| open: make, load, trace | {r['opening']:.1f} | |"]
        elif "sketching" in r:
            told = f"{r['layers']} layers, {r['steps']} steps, {r['untold']} layers without numbers"
            out.append(f"| sketches, one pass: {told} | {r['sketching']:.1f} | {gb} |")
        else:
            count = f"{r['weights'] / 1e6:.1f} million weights"
            out.append(f"| {name}: {count} | {r['fitting']:.1f} | {gb} |")
        if "probe" in r:
            out.append(f"| a probe, {name[4:]} | {r['probe']:.2f} | |")
        if "images" in r:
            out.append(f"| four images of it | {r['images']:.2f} | {r['images_bytes'] / 1e9:.1f} |")
    return table("| what | seconds | peak GB on the device |", out)


TITLES = {
    "tests": "The tests of the Triton kernels, compiled",
    "kernels": "Kernels",
    "bundled": "Bundled models",
    "dit": "DiT-XL/2, random codes",
    "unet": "A U-Net of SDXL's shapes, random codes",
    "fits": "Measuring and quantizing, a pipeline of SDXL's shapes",
}
TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "tests": tests,
    "kernels": kernels,
    "bundled": bundled,
    "dit": denoisers,
    "unet": denoisers,
    "fits": fits,
}
