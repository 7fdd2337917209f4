"""A dense denoiser quantized by another library as an export says; run by benchmarks/exports.py with the
Python of that library.

Reads the export, the folder of the dense denoiser and a safetensors file of calls (x, t, y). Writes JSON:
versions, layers that the library quantized, and the relative squared error of the outputs to the dense
denoiser's. It imports nothing of aquabit.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn


def torchao(model: nn.Module, config: Any) -> list[str]:
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    quantize_(model, config_from_dict(config), filter_fn=None)
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and type(m.weight).__name__ not in ("Parameter", "Tensor")
    ]


def quanto(model: nn.Module, config: Any) -> list[str]:
    from optimum.quanto import freeze, quantization_map, quantize

    for kind in sorted({entry["weights"] for entry in config.values()}):
        quantize(
            model, weights=kind, include=[name for name, entry in config.items() if entry["weights"] == kind]
        )
    freeze(model)
    assert quantization_map(model) == config
    return list(quantization_map(model))


def modelopt(model: nn.Module, config: Any) -> list[str]:
    import modelopt.torch.quantization as mtq

    mtq.quantize(model, config)
    return [
        n
        for n, m in model.named_modules()
        if getattr(getattr(m, "weight_quantizer", None), "is_enabled", False)
    ]


LIBRARIES: dict[str, tuple[str, Callable[[nn.Module, Any], list[str]]]] = {
    "torchao": ("torchao", torchao),
    "quanto": ("optimum-quanto", quanto),
    "modelopt": ("nvidia-modelopt", modelopt),
}


def whole_numbers(value: dict[str, Any]) -> dict[Any, Any]:
    """JSON has no whole numbers as keys; ModelOpt's block sizes do."""
    return {int(k) if k.lstrip("-").isdigit() else k: v for k, v in value.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--denoiser", type=Path, required=True)
    parser.add_argument("--calls", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    export = json.loads(given.export.read_text(), object_hook=whole_numbers)
    package, quantize = LIBRARIES[export["to"]]
    name = json.loads((given.denoiser / "config.json").read_text())["_class_name"]
    model = getattr(diffusers, name).from_pretrained(given.denoiser, torch_dtype=torch.float32).eval()
    calls = load_file(given.calls)

    def output() -> torch.Tensor:
        with torch.no_grad():
            return model(calls["x"], timestep=calls["t"], class_labels=calls["y"]).sample

    dense = output()
    quantized = quantize(model, export["config"])
    error = float((output() - dense).square().mean() / dense.square().mean())
    versions = {p: version(p) for p in (package, "torch", "diffusers")}
    given.out.write_text(
        json.dumps({"versions": versions, "layers": sorted(quantized), "error": error}) + "\n"
    )


if __name__ == "__main__":
    main()
