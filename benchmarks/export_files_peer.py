"""Files with weights, decoded and run by the program that they are for; started by benchmarks/export_files.py
with the Python that has it.

Reads what was written, a safetensors file of the weights that it should hold (and the dense tensors beside
them), and one of a call (x, t, y). Writes JSON: versions, layers, numbers that differ from ours, and the
largest difference of the denoiser's outputs with the largest of them. It imports nothing of aquabit.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # before it is imported: it would compile

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

Decode = Callable[[str], Tensor]  # of a layer
Loaded = tuple[nn.Module | None, Decode]  # the denoiser as the program loads it, where it does


def model_of(folder: Path) -> Any:
    kind: Any = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    return kind.from_pretrained(folder, torch_dtype=torch.float32)


def sdnq(path: Path) -> Loaded:
    from sdnq.utils import get_sdnq_params

    net = model_of(path)

    def decode(layer: str) -> Tensor:
        module = net.get_submodule(layer)
        return module.sdnq_dequantizer(**get_sdnq_params(module))

    return net, decode


def bitsandbytes(path: Path) -> Loaded:
    """Without a GPU diffusers refuses before it reads anything: that check alone is left out."""
    import bitsandbytes as bnb
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer as Quantizer

    if not torch.cuda.is_available():
        Quantizer.validate_environment = lambda self, *a, **k: None
        Quantizer.update_device_map = lambda self, device_map: {"": "cpu"}
    net = model_of(path)
    for module in net.modules():  # its way on CPUs of bfloat16 rounds
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False

    def decode(layer: str) -> Tensor:
        weight = net.get_submodule(layer).weight
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)

    return net, decode


def torchao(path: Path) -> Loaded:
    net = model_of(path)
    return net, lambda layer: net.get_submodule(layer).weight.dequantize()


def comfy(path: Path) -> Loaded:
    """ComfyUI is no package: its decoder is."""
    import comfy_kitchen.tensor as ck

    file = load_file(path)
    with safe_open(path, "pt") as opened:
        said = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
    layouts = {"float8_e4m3fn": ck.TensorCoreFP8Layout, "int8_tensorwise": ck.TensorWiseINT8Layout}

    def decode(layer: str) -> Tensor:
        weight, scale = file[f"{layer}.weight"], file[f"{layer}.weight_scale"]
        form, about = said[layer]["format"], {"orig_dtype": torch.float32, "orig_shape": tuple(weight.shape)}
        if form != "nvfp4":
            return layouts[form].dequantize(weight, layouts[form].Params(scale=scale, **about))
        over = file[f"{layer}.weight_scale_2"]
        params = ck.TensorCoreNVFP4Layout.Params(scale=over, block_scale=scale, **about)
        return ck.TensorCoreNVFP4Layout.dequantize(weight, params)

    return None, decode


def gguf(path: Path) -> Loaded:
    """Of models whose names no other program knows: their own."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {t.name: t for t in GGUFReader(path).tensors}

    def decode(layer: str) -> Tensor:
        tensor = tensors[f"{layer}.weight"]
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))

    return None, decode


# target -> how it is loaded, the packages that count
PROGRAMS: dict[str, tuple[Callable[[Path], Loaded], tuple[str, ...]]] = {
    "gguf": (gguf, ("gguf",)),
    "sdnq": (sdnq, ("sdnq", "diffusers")),
    "bitsandbytes": (bitsandbytes, ("bitsandbytes", "diffusers")),
    "torchao": (torchao, ("torchao", "diffusers")),
    "comfy": (comfy, ("comfy-kitchen",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", required=True, choices=PROGRAMS)
    for name in ("file", "denoiser", "weights", "call", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    load, packages = PROGRAMS[given.to]
    net, decode = load(given.file)
    wanted, call = load_file(given.weights), load_file(given.call)
    weights = {k.removeprefix("coded."): t for k, t in wanted.items() if k.startswith("coded.")}
    wrong = sum(int((decode(layer).reshape(w.shape) != w).sum()) for layer, w in weights.items())
    found: dict[str, Any] = {
        "versions": {name: version(name) for name in packages},
        "layers": len(weights),
        "numbers": sum(w.numel() for w in weights.values()),
        "wrong": wrong,
    }
    if net is not None:
        reference = model_of(given.denoiser)
        reference.load_state_dict({k: t for k, t in wanted.items() if not k.startswith("coded.")})
        with torch.inference_mode():
            first, second = (
                one.eval()(call["x"], timestep=call["t"], class_labels=call["y"]).sample
                for one in (reference, net)
            )
        found |= {"output": float(first.abs().max()), "change": float((first - second).abs().max())}
    given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
