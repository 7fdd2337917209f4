"""torchao (0.18): a model's folder with the tensors of its safetensors support, that diffusers and
transformers load with it.

A weight is one of torchao's tensor classes: its parts are tensors of the file (``LAYER._weight_qdata``, ...),
its class and the rest are JSON in the file's header. All decode in float32 by code * scale, which is ours to
the bit. Whole numbers of less than 8 bits take a byte each there: torchao's class that packs those of 4 bits
(``Int4Tensor``) has no decoder, and runs by another library on some GPUs alone. Offsets are whole numbers of
scales there, which those of ``usq`` are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aquabit.exports import torchao
from aquabit.exports.exported import Exported, lost_beside_weights
from aquabit.exports.model_folder import (
    check_model,
    choices,
    counted,
    dense_tensors,
    loader_of,
    loading,
    write_model,
)
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.coded_scale import CodedScale
from aquabit.scheme import Act, AquabitError, Scheme

METHOD = "torchao"
KINDS = ("int", "fp8", "nvfp4")
ROUNDED = "diffusers loads it at bfloat16, which rounds the scales, where torch_dtype does not say float32"
BY_HAND = (
    "unflatten_tensor_state_dict of torchao.prototype.safetensors makes a state_dict of the tensors, for"
    " load_state_dict(..., assign=True) of the dense model"
)
PLAIN = json.dumps({"_type": "Tensor"})  # of a tensor that is no weight of torchao's


def refusal(scheme: Scheme, module: nn.Module) -> str | None:
    """Why torchao cannot hold a layer's scheme, or None."""
    if not isinstance(module, nn.Linear):
        return f"torchao's weights are loaded into Linear layers alone, and it is a {type(module).__name__}"
    if scheme.kind == "mxfp4":
        return "torchao 0.18 runs mxfp4 with rounded inputs alone"
    if scheme.kind not in KINDS:
        return "torchao's files hold int2 to int8, fp8 and nvfp4 of the schemes here"
    return None


def check(exported: Exported) -> None:
    """Raise AquabitError for a layer that torchao cannot hold as it is."""
    check_model(exported, METHOD)
    modules = dict(exported.network.named_modules(remove_duplicate=False))
    for name, choice in choices(exported).items():
        why = refusal(choice.weight, modules[name])
        if why is not None:
            raise AquabitError(
                f"layer {name!r} cannot be {choice.weight}: {why}; leave it at fp, search with --target"
                " torchao, or give --out a name in .json for a recipe by which torchao quantizes"
            )


def write(exported: Exported, out: Path) -> list[str]:
    """Write the folder; what is lost or worth saying. It loads by ``from_pretrained`` of the model's class,
    with ``torch_dtype=torch.float32``: diffusers' default rounds scales to bfloat16; a model of one's own by
    ``BY_HAND``."""
    found, first = choices(exported), exported.graph.graph.get("tied", {})
    dense = dense_tensors(exported.network, found)
    tensors, about, forms = dict(dense), dict.fromkeys(dense, PLAIN), dict[str, Any]()
    for name, choice in found.items():
        own = stored(exported.weights[first.get(name, name)], choice.weight, choice.act)
        tensors |= {f"{name}._weight_{part}": tensor for part, tensor in own.parts.items()}
        about[f"{name}.weight"] = json.dumps(own.about())
        forms[name] = config(choice.weight, choice.act)
    network = exported.network
    rounded = [ROUNDED] if loader_of(network) == "diffusers" else []
    said = [counted(exported, tensors), *loading(network, BY_HAND), *rounded]
    said += lost_beside_weights(exported.config)
    if any(choice.act == "i8" for choice in found.values()):
        said.append(torchao.SCALES)
    described = {
        "quant_method": METHOD,
        "quant_type": {"default": torchao.whole(forms)},
        "modules_to_not_convert": None,
        "quant_type_kwargs": {},
    }
    # torchao 0.18 stops at the name of a tensor of the whole network, which only diffusers leaves out for it
    listed = [name for name in about if "." in name or loader_of(network) == "diffusers"]
    metadata = {**about, "tensor_names": json.dumps(listed)}
    write_model(exported, out, described, tensors, to=METHOD, said=said, metadata=metadata)
    return said


class Stored(NamedTuple):
    """A weight as one of torchao's classes: the tensors that it is made of, and its other attributes."""

    kind: str
    parts: Mapping[str, Tensor]
    attributes: Mapping[str, Any]

    def about(self) -> dict[str, Any]:
        """As the header of a file has it."""
        return {"_type": self.kind, "_data": dict(self.attributes), "_tensor_data_names": list(self.parts)}


def stored(weight: CodebookWeight, scheme: Scheme, act: Act = 16) -> Stored:
    """The class and tensors of a weight [out, in], whose inputs are rounded at "i8" and "f8"."""
    codes, (out, inputs) = weight.codes[:, 0].t().contiguous(), weight.shape
    wide = {"_type": "torch.dtype", "_data": "float32"}
    if scheme.kind == "nvfp4":
        scale = weight.scale
        assert isinstance(scale, CodedScale) and scale.over is not None
        pairs = codes.reshape(out, -1, 2)
        parts = {
            "qdata": pairs[..., 0] | pairs[..., 1] << 4,
            "scale": scale.integers.view(torch.float8_e4m3fn),
            "per_tensor_scale": scale.over.reshape(()),
        }
        rest: dict[str, Any] = {"is_swizzled_scales": False, "use_triton_kernel": False}
        rest["act_quant_kwargs"] = None
        return Stored("NVFP4Tensor", parts, {"block_size": scheme.group, "orig_dtype": wide, **rest})
    assert isinstance(weight.scale, Tensor)
    numbers = weight.scale.float().reshape(-1, 1 if weight.scale.ndim == 1 else weight.scale.shape[1])
    block = [out // numbers.shape[0], inputs // numbers.shape[1]]
    if scheme.kind == "fp8":
        about = {"_type": "KernelPreference", "_data": "AUTO"}
        parts = {"qdata": codes.view(torch.float8_e4m3fn), "scale": numbers}
        rounding = _rounding("QuantizeTensorToFloat8Kwargs", _FLOAT8) if act == "f8" else None
        rest = {"mm_config": None, "act_quant_kwargs": rounding, "kernel_preference": about}
        return Stored("Float8Tensor", parts, {"block_size": block, "dtype": wide, **rest})
    signed = (codes.to(torch.int16) - (1 << (scheme.bits - 1))).to(torch.int8)
    parts = {"qdata": signed, "scale": numbers, "zero_point": torch.zeros_like(numbers, dtype=torch.int8)}
    if scheme.bits == 8:
        rounding = _rounding("QuantizeTensorToInt8Kwargs", _INT8) if act == "i8" else None
        rest = {"act_quant_kwargs": rounding, "reduce_range": False}
        return Stored("Int8Tensor", parts, {"block_size": block, "dtype": wide, **rest})
    bits = {"_type": "torch.dtype", "_data": f"int{scheme.bits}"}
    rest = {"target_dtype": bits, "activation_quantization": None}
    return Stored("IntxUnpackedToInt8Tensor", parts, {"block_size": block, "dtype": wide, **rest})


def _rounding(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """How inputs are rounded, a scale for each token."""
    return {"_type": kind, "_data": {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}, **data}}


_INT8 = {"mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "reduce_range": False}
_FLOAT8 = {
    "float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    "mm_config": None,
    "hp_value_lb": None,
    "hp_value_ub": None,
    "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
}


def config(scheme: Scheme, act: Act = 16) -> dict[str, Any]:
    """The configuration by which torchao would make such a weight itself."""
    if act == "i8":
        return torchao.INT8
    if act == "f8":
        return torchao.float8(scheme)
    row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if scheme.kind == "nvfp4":
        return _config("NVFP4WeightOnlyConfig", {"use_dynamic_per_tensor_scale": True}, version=1)
    if scheme.kind == "fp8":
        whole = {"_type": "PerTensor", "_version": 1, "_data": {}}
        kind = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
        grain = row if scheme.per_channel else whole
        return _config("Float8WeightOnlyConfig", {"weight_dtype": kind, "granularity": grain})
    if scheme.bits == 8:
        grain = row if scheme.group is None else torchao.granularity(scheme.group)
        return _config("Int8WeightOnlyConfig", {"granularity": grain})
    return torchao.weight_only(scheme.bits, scheme.group, symmetric=True)


def _config(kind: str, data: dict[str, Any], version: int = 2) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}
