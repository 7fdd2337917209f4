"""Exports of a configuration, run by the libraries they are for: python benchmarks/exports.py PART ...
[--folder DIR] [--models ...]

install    a virtual environment of its own in --folder, with the versions of PINS and of constraints.txt
run        two configurations of each bundled model, exported to each library and quantized there: which
           layers it took, and the relative
           squared error of the denoiser's outputs beside that of our own packed model
Results: benchmarks/results/exports.json and exports.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.exports import RECIPES, export_config
from aquabit.graph import layers
from aquabit.packing import quantize
from aquabit.pipelines import load, trace
from aquabit.pipelines.loading import BUNDLED
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Scheme
from benchmarks.common import MODELS, parsed, parser, write_results

ROOT = Path(__file__).parents[1]
PINS = (
    "torchao==0.18.0",
    "optimum-quanto==0.2.7",
    "nvidia-modelopt==0.47.0",
    "PuLP==3.3.2",
    "torch",
    "diffusers",
    "accelerate",
    "requests",
)
CASES = {  # name -> schemes given to the layers in turn, activation bits
    "usq4": (("usq4",), 16),
    "mixed": (("usq4", "usq8", "usq3", "vq4", "usq4g64", "aq2x8g8"), 8),
}
SEED, CALLS = 20_261_128, 64


def install(folder: Path) -> None:
    place = folder / "exports"
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


def case_config(pipe: Any, case: str, model: str) -> QuantConfig:
    schemes, act = CASES[case]
    names = layers(trace(pipe))
    choices = {n: LayerChoice(Scheme.parse(schemes[i % len(schemes)]), act) for i, n in enumerate(names)}
    return QuantConfig(fingerprint(pipe.denoiser), choices, model)


def run(folder: Path, python: Path, models: list[str]) -> list[dict[str, Any]]:
    if not python.exists():
        raise AquabitError(
            f"{python} is missing; make it with: python benchmarks/exports.py install --folder {folder}"
        )
    rows = []
    for model in models:
        pipe, generator = load(model), torch.Generator().manual_seed(SEED)
        graph, size = trace(pipe), pipe.denoiser.config.sample_size
        calls = {
            "x": torch.randn(CALLS, 1, size, size, generator=generator),
            "t": torch.randint(1000, (CALLS,), generator=generator),
            "y": torch.arange(CALLS) % 10,
        }
        save_file(calls, folder / "calls.safetensors")
        for case in CASES:
            config = case_config(pipe, case, model)
            errors = {"ours": packed_error(pipe, config, calls, folder)}
            for to in RECIPES:
                found = export_config(config, graph, to)
                (folder / "export.json").write_text(found.to_json())
                command = [
                    str(python),
                    str(ROOT / "benchmarks" / "exports_peer.py"),
                    "--denoiser",
                    str(BUNDLED / model / "denoiser"),
                ]
                paths = {"--export": "export.json", "--calls": "calls.safetensors", "--out": "out.json"}
                command += [text for key, name in paths.items() for text in (key, str(folder / name))]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                got = json.loads((folder / "out.json").read_text())
                taken = [n for n, said in found.layers.items() if said.status != "full precision"]
                if sorted(taken) != got["layers"]:
                    raise AquabitError(
                        f"{to} quantized {len(got['layers'])} layers of {model}, the export says {len(taken)}"
                    )
                rows.append(
                    {
                        "model": model,
                        "case": case,
                        "to": to,
                        **found.counts,
                        "error": got["error"],
                        "ours": errors["ours"],
                        "versions": got["versions"],
                        "losses": found.losses(),
                    }
                )
    return rows


def packed_error(pipe: Any, config: QuantConfig, calls: dict[str, torch.Tensor], folder: Path) -> float:
    def output(denoiser: Any) -> torch.Tensor:
        with torch.inference_mode():
            return denoiser(calls["x"], timestep=calls["t"], class_labels=calls["y"]).sample

    dense, ours = (
        output(pipe.denoiser),
        output(quantize(pipe, config, bank=str(folder / "bank")).pipe.denoiser),
    )
    return float((ours - dense).square().mean() / dense.square().mean())


def markdown(found: dict[str, Any]) -> str:
    here = found["machine"]
    lines = [
        "# Exports, run by the libraries they are for\n",
        (
            f"`{found['command']}`, on {here['cores']} cores of an {here['cpu']} ({here['capability']}),"
            f" torch {here['torch']}. Relative squared error of the denoiser's outputs to full precision on"
            f" {CALLS} random calls; ours is the"
        ),
        "packed model of the same configuration. `usq4`: every layer, activations at 16 bits. `mixed`: "
        + ", ".join(CASES["mixed"][0])
        + " in turn, a8.\n",
        "| model | configuration | library | same | nearest | full precision | its error | ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['case']} | {' '.join(next(iter(r['versions'].items())))} | {r['same']} |"
        f" {r['nearest']} | {r['full precision']} | {r['error']:.2e} | {r['ours']:.2e} |"
        for r in found["rows"]
    ]
    lines.append("\nWhat is lost, in how many layers:\n")
    for r in found["rows"]:
        lost = "; ".join(f"{text} ({count})" for text, count in r["losses"].items()) or "nothing of a layer"
        lines.append(f"- {r['model']}, {r['case']}, {r['to']}: {lost}")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["install", "run"], "exports-runs", MODELS)
    arguments.add_argument(
        "--python", type=Path, help="of an environment with the libraries (default: the one in --folder)"
    )
    given = parsed(arguments)
    python = given.python or given.folder / "exports" / "bin" / "python"
    try:
        if "install" in given.parts:
            install(given.folder)
        if "run" in given.parts:
            rows = run(given.folder, python, given.models)
            write_results("exports", "python benchmarks/exports.py install run", {"rows": rows}, markdown)
    except AquabitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
