"""Data-free schemes of ours and of other libraries, weights only: python benchmarks/datafree.py PART ...
[--folder DIR] [--models ...]

install    a virtual environment of its own in --folder, with the versions of PINS and of constraints.txt
choose     HQQ, SDNQ, quanto and the plain range quantize every layer's weight in that environment
           (benchmarks/datafree_peer.py), per row and in groups of 64 and 32
fresh      each put into the model, and ours: images on fresh seeds, PSNR to full precision (activations in
           full precision); what was measured stays
table      benchmarks/results/datafree.json and datafree.md

Layers below SMALL weights (the first and the last) stay at 16 bits; with --every-layer they are measured
quantized too: where a few weights with one scale make the image, luck decides more than the method. Sizes
count packed codes and all scales, zero points and tables at 16 bits; a peer is compared with ours of its bits
and groups, and the table says both sizes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.graph import layers
from aquabit.kernels.codebook import CodebookWeight
from aquabit.pipelines import Adapter, load, trace
from aquabit.quality import paired
from aquabit.quant.schemes.usq import least_squares, uniform
from aquabit.quant.schemes.vq import kmeans
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, Protocol, Scheme
from aquabit.scheme_kinds import UNIFORM
from aquabit.stats import Interval, mean_interval, paired_difference
from benchmarks.common import RESULTS, about, parsed, parser, read, replaced, spans, write, write_results

ROOT = Path(__file__).parents[1]
PINS = ("hqq==0.2.8.post1", "sdnq==0.2.8", "optimum-quanto==0.2.7", "torch", "diffusers", "accelerate")
BLOCKS = (
    301,
    302,
    303,
)  # of fresh seeds; other benchmarks' are below 110, and our fits were chosen on 201, 202
GROUPS = (0, 64, 32)  # inputs that share a scale; 0: a row
SMALL = 1000
KEPT = ("small layers at 16 bits", "every layer")  # what is quantized
BEFORE = "least squares of "  # before a scheme of ours: its fit until it had gain 1
# our scheme -> what it is compared with, as datafree_peer.py names cases
CASES = {
    **{
        f"usq{b}" + (f"g{g}" if g else ""): [
            f"{peer}:{b}:{g}" for peer in ("hqq", "sdnq", "min-max" if b == 3 else "quanto")
        ]
        for b in (4, 3, 2)
        for g in GROUPS
    },
    **{f"vq{b}c": [f"sdnq-table:{b}:0"] for b in (4, 3, 2)},
    **{f"vq{b}": [f"hqq:{b}:0", f"sdnq-table:{b}:0"] for b in (4, 3, 2)},
}
PEERS = list(dict.fromkeys(case for row in CASES.values() for case in row))
CASES = {ours: [*peers, BEFORE + ours] for ours, peers in CASES.items()}


def install(folder: Path) -> None:
    place = folder / "peers"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *PINS], check=True)


def choose(folder: Path, model: str) -> None:
    python = folder / "peers" / "bin" / "python"
    if not python.exists():
        raise AquabitError(
            f"{python} is missing; make it with: python benchmarks/datafree.py install --folder {folder}"
        )
    out = folder / model
    out.mkdir(exist_ok=True)
    save_file(World(model).full, out / "full.safetensors")
    command = [python, "-P", ROOT / "benchmarks" / "datafree_peer.py", "--weights", out / "full.safetensors"]
    subprocess.run([*map(str, command), "--out", str(out), "--cases", *PEERS], check=True)


class World:
    """A model whose weights are replaced, and its images."""

    def __init__(self, model: str):
        self.adapter = Adapter(load(model))
        modules = dict(self.adapter.network.eval().named_modules())
        self.layers: dict[str, Any] = {n: modules[n] for n in layers(trace(self.adapter.pipe))}
        self.full = {n: m.weight.detach().clone() for n, m in self.layers.items()}

    def images(self, weights: Mapping[str, Tensor], protocol: Protocol) -> Tensor:
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.copy_(weights[name])
        return torch.cat([self.adapter.images(protocol, b) for b in self.adapter.batches(protocol)])


def weights_of(
    case: str, full: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What a scheme of ours, or a peer's case, decodes to, and the bytes of each layer."""
    if case in PEERS:
        stem = folder / case.replace(":", "-")
        if not stem.with_suffix(".json").exists():
            raise AquabitError(f"{stem} is missing; run: python benchmarks/datafree.py choose")
        return load_file(stem.with_suffix(".safetensors")), read(stem.with_suffix(".json"))["bytes"]
    scheme = Scheme.parse(case.removeprefix(BEFORE))
    coded = {n: quantize_weight(w, scheme) if case in CASES else before(w, scheme) for n, w in full.items()}
    return {n: c.dequantize() for n, c in coded.items()}, {n: c.nbytes for n, c in coded.items()}


def before(weight: Tensor, scheme: Scheme) -> CodebookWeight:
    """What was fitted until fits had gain 1, and what fits with H begin with."""
    if scheme.record is UNIFORM:
        return uniform(weight, scheme, least_squares)
    return kmeans(weight, scheme, gain_one=False)


def fresh(folder: Path, model: str, every_layer: bool) -> None:
    world, path = World(model), folder / f"measured-{model}.json"
    small = {n: w for n, w in world.full.items() if w.numel() < SMALL}
    blocks = [Protocol().block(b) for b in BLOCKS]
    full = [world.images(world.full, p) for p in blocks]
    cases = dict.fromkeys((*CASES, *(case for row in CASES.values() for case in row)))
    for kept, case in product(KEPT if every_layer else KEPT[:1], cases):
        found: dict[str, Any] = read(path)
        if case in found.get(kept, {}):
            continue
        weights, size = weights_of(case, world.full, folder / model)
        if kept == KEPT[0]:
            weights, size = {**weights, **small}, {**size, **{n: 2 * w.numel() for n, w in small.items()}}
        errors = [paired.mse(world.images(weights, p), f) for p, f in zip(blocks, full, strict=True)]
        psnr = [float(paired.psnr_from_mse(e).mean()) for e in errors]
        total = sum(size.values())
        found.setdefault(kept, {})[case] = {"bytes": total, "psnr": psnr}
        write(path, found)
        print(f"{model}, {kept}, {case}: {total} bytes, {sum(psnr) / len(psnr):.2f} dB", flush=True)


def rows_of(folder: Path, model: str) -> Iterator[dict[str, Any]]:
    """One row a scheme of ours and a peer, of what was measured."""
    measured = read(folder / f"measured-{model}.json")
    count = sum(w.numel() for w in World(model).full.values())
    for kept, (ours, peers) in product(KEPT, CASES.items()):
        found = measured.get(kept, {})
        for peer in (p for p in peers if ours in found and p in found):
            a, b = found[ours], found[peer]
            yield {
                "model": model,
                "kept": kept,
                "ours": ours,
                "peer": peer,
                "bits": [8 * a["bytes"] / count, 8 * b["bytes"] / count],
                "psnr": [a["psnr"], b["psnr"]],
                "more": paired_difference(a["psnr"], b["psnr"]).to_dict(),
            }


def verdict(row: Mapping[str, Any]) -> str:
    more = Interval.from_dict(row["more"])
    return "won" if more.low > 0 else "lost" if more.high < 0 else "level"


def markdown(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    lines = [
        "# Data-free schemes beside those of other libraries",
        f"\n{about(found['machine'])}. Made by `{found['command']}`, with {', '.join(PINS[:3])}.",
        (
            f"\nPSNR to full precision, weights only (a16), means over {len(BLOCKS)} blocks of 128 fresh"
            f" seeds (blocks {', '.join(map(str, BLOCKS))}); differences are paired over blocks, with 95 %"
            " intervals: won or lost where they leave out 0. Bits per weight count packed codes, and all"
            " scales, zero points and tables at 16 bits. `peer:bits:group`, group 0 is the row; SDNQ keeps a"
            " scale for each tap of a kernel, and a row that a group does not divide is whole with the peers."
            f" Small layers are those below {SMALL:,} weights, the first and the last: of one row, or of rows"
            " of a few weights, whose errors enter every step. They were left out after a first run quantized"
            " them too and usq4 came out below usq3 on the U-Net (16.7 and 20.0 dB: the one row of conv_out);"
            " `fresh --every-layer` measures that too. Intervals are over seeds: the rounding of one set of"
            " weights is the same in all blocks, and moves single rows by a decibel or two (quanto and SDNQ"
            " are one algorithm with groups laid out otherwise in convolutions)."
        ),
        "\n| model | quantized | against | won | level | lost | mean difference, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    tables = list(dict.fromkeys((r["model"], r["kept"]) for r in rows))
    for model, kept in tables:
        own = [r for r in rows if (r["model"], r["kept"]) == (model, kept)]
        for who in dict.fromkeys(r["peer"].split(":")[0].split(BEFORE)[0] for r in own):
            part = [r for r in own if r["peer"].startswith(who or BEFORE)]
            part = [r for r in part if who or r["peer"].startswith(BEFORE)]
            verdicts = [verdict(r) for r in part]
            counts = " | ".join(str(verdicts.count(v)) for v in ("won", "level", "lost"))
            gap = sum(Interval.from_dict(r["more"]).value for r in part) / len(part)
            lines.append(f"| {model} | {kept} | {who or BEFORE.split(' of')[0]} | {counts} | {gap:+.2f} |")
    for model, kept in tables:
        lines += [
            f"\n## {model}, {kept}\n",
            "| ours | bits | PSNR | peer | bits | PSNR | ours more | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in (r for r in rows if (r["model"], r["kept"]) == (model, kept)):
            (a, b), means = r["bits"], [mean_interval(p).value for p in r["psnr"]]
            lines.append(
                f"| {r['ours']} | {a:.3f} | {means[0]:.2f} | {r['peer']} | {b:.3f} | {means[1]:.2f} |"
                f" {spans(Interval.from_dict(r['more']), sign='+')} | {verdict(r)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["install", "choose", "fresh", "table"], "datafree-runs")
    arguments.add_argument("--every-layer", action="store_true", help="measure with small ones quantized too")
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = parsed(arguments)
    try:
        run(given, given.parts)
    except AquabitError as error:
        sys.exit(str(error))


def run(given: argparse.Namespace, parts: Sequence[str]) -> None:
    if "install" in parts:
        install(given.folder)
    for model in given.models:
        if "choose" in parts:
            choose(given.folder, model)
        if "fresh" in parts:
            fresh(given.folder, model, given.every_layer)
    if "table" in parts:
        new = [row for model in given.models for row in rows_of(given.folder, model)]
        rows = replaced(read(given.results / "datafree.json").get("rows", []), new, given.models)
        command = "python benchmarks/datafree.py install choose fresh table"
        write_results("datafree", command, {"rows": rows}, markdown, given.results)


if __name__ == "__main__":
    main()
