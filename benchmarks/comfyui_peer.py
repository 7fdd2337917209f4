"""A file loaded and run by ComfyUI's own code; started by benchmarks/comfyui.py with the Python that has what
that imports. Writes JSON: versions, what the model was taken for, numbers that differ from ours, and the
largest difference of outputs. It imports nothing of aquabit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers  # before the stand-ins: it looks for torchvision
from safetensors.torch import load_file
from torch import Tensor

ABSENT = ("torchvision", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.functional")
ABSENT = (*ABSENT, "torchaudio", "torchaudio.functional")  # of models that are not loaded here


def imported(folder: Path) -> Any:
    """ComfyUI's module of loaders, told to stay on the CPU."""
    transformers.T5TokenizerFast, transformers.CLIPTokenizer  # noqa: B018  both are made when asked for
    for name in ABSENT:
        sys.modules.setdefault(name, MagicMock(__spec__=ModuleSpec(name, None)))
    sys.path.insert(0, str(folder))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    return comfy.sd


def loaded(loaders: Any, kind: str, file: Path, sizes: dict[str, Any]) -> tuple[Any, str]:
    """The network that ComfyUI makes of a file, and what it takes it for."""
    if kind == "flux":
        patcher = loaders.load_diffusion_model(str(file), model_options={"dtype": torch.float32})
        return patcher.model.diffusion_model, type(patcher.model).__name__
    options = {"t5xxl_model_config": sizes}  # all but the sizes is as of XXL
    clip = loaders.load_clip([str(file)], clip_type=loaders.CLIPType.SD3, model_options=options)
    return clip.cond_stage_model.t5xxl.transformer, type(clip.cond_stage_model.t5xxl).__name__


def called(net: Any, wanted: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        if "ids" in wanted:
            return net(wanted["ids"], None, dtype=torch.float32)[0]
        given = [wanted[name] for name in ("x", "t", "context", "y", "guidance")]
        return net(*given)


def decoded(module: Any) -> Tensor:
    """A layer's weight in float32, as its layout decodes it."""
    weight = module.weight
    params = replace(weight._params, orig_dtype=torch.float32)
    found: Tensor = weight.layout_cls.dequantize(weight._qdata, params)
    rows, inputs = weight._params.orig_shape
    return found[:rows, :inputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("comfyui", "file", "wanted", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--kind", choices=("flux", "t5"), required=True)
    parser.add_argument("--sizes", type=json.loads, default={})
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaders, wanted = imported(given.comfyui.resolve()), load_file(given.wanted)
    net, known = loaded(loaders, given.kind, given.file, given.sizes)
    rows = {k.removeprefix("rows."): t for k, t in wanted.items() if k.startswith("rows.")}
    modules = {layer: net.get_submodule(layer) for layer in rows}
    wrong = sum(int((decoded(modules[layer]) != weight).sum()) for layer, weight in rows.items())
    output = called(net, wanted)
    kinds = {str(m.weight._params.orig_dtype).removeprefix("torch.") for m in modules.values()}
    import comfyui_version

    found = {
        "versions": {"ComfyUI": comfyui_version.__version__, "comfy-kitchen": version("comfy-kitchen")},
        "known": known,
        "numbers": sum(t.numel() for t in rows.values()),
        "wrong": wrong,
        "dtype": ", ".join(sorted(kinds)),
        "output": float(wanted["output"].abs().max()),
        "change": float((output - wanted["output"]).abs().max()),
    }
    given.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
