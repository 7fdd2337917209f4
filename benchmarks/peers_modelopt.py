"""NVIDIA ModelOpt's auto_quantize on a diffusers denoiser; run by benchmarks/peers.py with the Python of the
peer's own environment.

Reads calls and targets from a safetensors file (x [n, c, h, w], t [n], y [n], target [n, c, h, w]), scores
every format of every layer once with the loss mean((denoiser(x, t, y) - target)^2), and lets ModelOpt's
solver choose for each number of effective bits. Writes JSON: versions, each layer's scores and costs, and for
each number of bits what was chosen. It imports torch, diffusers and modelopt, nothing of aquabit.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import modelopt.torch.quantization as mtq
import torch
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

PACKAGES = ("nvidia-modelopt", "torch", "diffusers", "PuLP")
UNQUANTIZED = 16  # bits of its choice "do not quantize"
SCALE = 1e4  # the largest score where they are scaled: its solver's tolerances are absolute


def formats(bits: list[int], calibration: str) -> list[dict[str, Any]]:
    """Whole-number weights of so many bits per output channel, inputs of 8 bits per tensor: as its
    INT8_DEFAULT_CFG, with other widths."""
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": b, "axis": 0}},
                {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
            ],
            "algorithm": calibration,
        }
        for b in bits
    ]


def denoiser_in(folder: Path) -> torch.nn.Module:
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32).eval()


def call(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The denoiser's predicted noise: models that also predict a variance put it behind."""
    return model(batch["x"], timestep=batch["t"], class_labels=batch["y"]).sample[:, : batch["x"].shape[1]]


def searched(arguments: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Its state after scoring, and the seconds that took."""
    tensors, model = load_file(arguments.inputs), denoiser_in(arguments.denoiser)
    parts = zip(*(tensors[k].split(arguments.batch) for k in ("x", "t", "y", "target")), strict=True)
    batches = [dict(zip(("x", "t", "y", "target"), part, strict=True)) for part in parts]
    started = time.perf_counter()
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": arguments.bits[0]},
        quantization_formats=formats(arguments.formats, arguments.calibration),
        data_loader=batches,
        forward_step=call,
        loss_func=lambda output, batch: mse_loss(output, batch["target"]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        verbose=False,
    )
    return state, time.perf_counter() - started


def chosen(state: dict[str, Any], bits: float, factor: float = 1.0) -> dict[str, int]:
    """layer -> weight bits that its solver chooses for so many effective bits, on its scores times
    ``factor``."""
    scaled = copy.deepcopy(state)
    for row in scaled["candidate_stats"].values():
        row["scores"] = [s * factor for s in row["scores"]]
    found = dict.fromkeys(layers(state), UNQUANTIZED)
    for entry in mtq.get_auto_quantize_config(scaled, {"effective_bits": bits})["quant_cfg"]:
        layer, _, quantizer = entry["quantizer_name"].rpartition(".")
        if quantizer == "weight_quantizer" and entry["enable"]:
            found[layer] = int(entry["cfg"]["num_bits"])
    return found


def layers(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """layer -> its bits, scores and costs, in the order of ModelOpt's candidates."""
    found = {}
    for row in state["candidate_stats"].values():
        if len(row["module_names"]) != 1:
            raise ValueError(
                f"ModelOpt treats {row['module_names']} as one; layers of their own are expected"
            )
        # formats are named by what they cost: "CUSTOM_0(effective-bits: 4.0)"
        bits = [round(16 * f.compression) for f in row["formats"]]
        found[row["module_names"][0]] = {"bits": bits, "scores": row["scores"], "costs": row["costs"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--denoiser", type=Path, required=True, help="folder of the denoiser, as diffusers saves it"
    )
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", required=True, help="effective bits to choose for")
    parser.add_argument("--formats", type=int, nargs="+", required=True, help="weight bits to choose from")
    parser.add_argument("--calibration", default="mse", help="how ranges of weights are found: max or mse")
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    state, seconds = searched(arguments)
    table = layers(state)
    largest = max(max(row["scores"]) for row in table.values())
    factor = SCALE / largest if largest > 0 else 1.0
    result = {
        "versions": {p: version(p) for p in PACKAGES},
        "seconds": seconds,
        "calibration": arguments.calibration,
        "layers": table,
        "limit_bits": arguments.bits,
        "chosen": {str(b): chosen(state, b) for b in arguments.bits},
        "chosen_scaled": {str(b): chosen(state, b, factor) for b in arguments.bits},
        "scale": factor,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
