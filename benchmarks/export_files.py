"""Files with weights, decoded by the programs that they are for: python benchmarks/export_files.py PART ...
[--folder DIR] [--models ...] [--to ...]

install    a virtual environment of its own in --folder, with the versions of PINS and of constraints.txt
run        every layer of each bundled model at one of the target's schemes in turn, exported, loaded and
           decoded by the program: numbers that differ from ours, and outputs of the denoiser; models and
           targets that are not run stay as they were found
Results: benchmarks/results/export_files.json and export_files.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit import workflows
from aquabit.exports.exported import Exported
from aquabit.exports.files import WRITERS
from aquabit.graph import layers
from aquabit.packing import coded
from aquabit.pipelines import load, trace
from aquabit.pipelines.loading import BUNDLED
from aquabit.quant.model import fingerprint, storage_dtype
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Scheme
from benchmarks.common import RESULTS, parsed, parser, read, write_results

ROOT = Path(__file__).parents[1]
PINS = ("gguf", "sdnq", "torchao", "bitsandbytes==0.50.2", "comfy-kitchen==0.2.40", "torch", "diffusers")
PINS = (*PINS, "accelerate", "transformers")
SCHEMES = {  # given to the layers in turn, those that a layer can have
    "gguf": ("q4_0", "q8_0", "q4_K", "q5_1", "q6_K", "iq4_nl", "q5_0", "q2_K", "q4_1", "q3_K", "q5_K"),
    "sdnq": (
        *("int4g32", "int8", "usq4", "int3", "usq3g32", "int6g16", "fp8c", "nvfp4", "mxfp4", "usq8", "int4"),
        *("int2g16", "int5", "int7", "usq2g64", "usq5", "usq6", "usq7", "fp8", "vq3", "vq4c"),
    ),
    "bitsandbytes": ("nf4g64", "nf4g64d"),
    "torchao": ("int4g32", "int8", "int3", "fp8", "nvfp4", "int8g64", "fp8c", "int2", "int5", "int6", "int7"),
    "comfy": ("int8", "fp8", "nvfp4"),
}
MODELS = ("digits-unet", "digits-dit", "fashion-unet", "fashion-dit")
SEED, IMAGES = 20_261_201, 8


def install(folder: Path) -> None:
    place = folder / "export-files"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *PINS], check=True)


def config_for(pipe: Any, to: str, model: str) -> QuantConfig:
    """Every layer at the next of the target's schemes that it can have."""
    own, graph, choices, turn = fingerprint(pipe.denoiser), trace(pipe), dict[str, LayerChoice](), 0
    for name, node in layers(graph).items():
        for step in range(len(SCHEMES[to])):
            scheme = Scheme.parse(SCHEMES[to][(turn + step) % len(SCHEMES[to])])
            one = QuantConfig(own, {name: LayerChoice(scheme)}, model)
            if scheme.refuses(tuple(node["shape"])) is None and _taken(
                Exported(pipe.denoiser, one, graph), to
            ):
                choices[name], turn = LayerChoice(scheme), turn + step + 1
                break
    return QuantConfig(own, choices, model)


def _taken(exported: Exported, to: str) -> bool:
    try:
        WRITERS[to].check(exported)
    except AquabitError:
        return False
    return True


def run(folder: Path, python: Path, models: list[str], targets: list[str]) -> list[dict[str, Any]]:
    if not python.exists():
        raise AquabitError(
            f"{python} is missing; make it with: python benchmarks/export_files.py install --folder {folder}"
        )
    rows = []
    for model in models:
        pipe = load(model)
        save_file(call(pipe), folder / "call.safetensors")
        for to in targets:
            config, out = config_for(pipe, to, model), folder / f"{model}-{to}"
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            said = workflows.export_files(pipe, config, to, out, bank=str(folder / "bank"))
            save_file(weights(pipe, config, folder), folder / "weights.safetensors")
            command = [str(python), str(ROOT / "benchmarks" / "export_files_peer.py"), "--to", to]
            command += ["--file", str(out), "--denoiser", str(BUNDLED / model / "denoiser")]
            paths = {"--weights": "weights.safetensors", "--call": "call.safetensors", "--out": "out.json"}
            command += [text for key, name in paths.items() for text in (key, str(folder / name))]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found = json.loads((folder / "out.json").read_text())
            every = len(layers(trace(pipe)))
            rows.append({"model": model, "to": to, "every": every, **found, "bytes": size(out), "said": said})
            print(f"{model} {to}: {found['wrong']} of {found['numbers']} numbers differ", flush=True)
    return rows


def call(pipe: Any) -> dict[str, torch.Tensor]:
    """Random inputs of the denoiser."""
    generator, config = torch.Generator().manual_seed(SEED), pipe.denoiser.config
    shape = (IMAGES, config.in_channels, config.sample_size, config.sample_size)
    steps = torch.randint(1000, (IMAGES,), generator=generator)
    return {"x": torch.randn(shape, generator=generator), "t": steps, "y": torch.arange(IMAGES) % 10}


def weights(pipe: Any, config: QuantConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The dense denoiser's tensors with decoded weights among them, and these by their layers."""
    found = coded(pipe, config, check=lambda network, graph: None, bank=str(folder / "bank"))
    decoded = {name: weight.dequantize() for name, weight in found.weights.items()}
    state = {k: t.to(storage_dtype(t)).to(t.dtype) for k, t in found.network.state_dict().items()}
    state |= {f"{name}.weight": weight.clone() for name, weight in decoded.items()}
    return {k: t.contiguous() for k, t in state.items()} | {f"coded.{k}": t for k, t in decoded.items()}


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def markdown(found: dict[str, Any]) -> str:
    here = found["machine"]
    lines = [
        "# Files with weights, decoded by the programs that they are for\n",
        (
            f"`{found['command']}`, on {here['cores']} cores of an {here['cpu']} ({here['capability']}),"
            f" torch {here['torch']}. Layers are given the target's schemes in turn; the others are no layers"
            " of it (convolutions,"
        ),
        (
            "and rows that its groups do not divide). Numbers of the decoded weights that differ from ours;"
            " and where the program runs the denoiser, the largest difference of its outputs at float32, of"
        ),
        "the largest output.\n",
        "| target | loaded by | model | layers | numbers | differ | outputs | of | bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(found["rows"], key=lambda r: (list(SCHEMES).index(r["to"]), MODELS.index(r["model"]))):
        by = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
        outputs = f"{r['change']:.1e} | {r['output']:.2f}" if "change" in r else "- | -"
        lines.append(
            f"| {r['to']} | {by} | {r['model']} | {r['layers']} of {r['every']} | {r['numbers']:,} |"
            f" {r['wrong']} | {outputs} | {r['bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["install", "run"], "export-files-runs", MODELS)
    arguments.set_defaults(models=list(MODELS))
    arguments.add_argument("--to", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    arguments.add_argument(
        "--python", type=Path, help="of an environment with the programs (default: --folder's)"
    )
    given = parsed(arguments)
    python = given.python or given.folder / "export-files" / "bin" / "python"
    try:
        if "install" in given.parts:
            install(given.folder)
        if "run" in given.parts:
            rows = run(given.folder, python, given.models, given.to)
            now, before = {(r["model"], r["to"]) for r in rows}, read(RESULTS / "export_files.json")
            rows += [r for r in before.get("rows", []) if (r["model"], r["to"]) not in now]
            command = "python benchmarks/export_files.py install run"
            write_results("export_files", command, {"rows": rows}, markdown)
    except AquabitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
