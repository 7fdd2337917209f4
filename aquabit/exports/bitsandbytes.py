"""bitsandbytes: a model's folder with nf4 weights, quantized already, that diffusers and transformers load
with it.

Beside a layer's weight, two codes a byte, lie the scales of its blocks (``absmax``), the levels
(``quant_map``) and what else is to be known, as JSON (``quant_state``); scales that are codes have scales
(``nested_absmax``), levels and a mean of their own. Blocks lie in the weight as it is flattened: ours divide
a row, and so are the same. It decodes in the type that ``quant_state`` names, the model's: float32 is ours to
the bit. Only Linear layers are quantized; what stays dense is named in ``llm_int8_skip_modules``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from aquabit.kernels.coded_scale import CodedScale, coded_values
from aquabit.kernels.fixed_levels import table
from aquabit.scheme import AquabitError, Scheme

METHOD = "bitsandbytes"
KIND = "nf4"
BY_HAND = "bitsandbytes.nn.Params4bit.from_prequantized makes each weight of its tensors"
AS_STORED = (  # transformers 5.24, core_model_loading.py
    "dense tensors are stored in the dtype that the model has here: beside nf4 transformers loads weights as"
    " they are stored, and biases as it is asked"
)
STATE = f"quant_state.bitsandbytes__{KIND}"


def refusal(scheme: Scheme, module: nn.Module) -> str | None:
    """Why bitsandbytes cannot hold a layer's scheme, or None."""
    if scheme.kind == "int" and scheme.bits == 8:
        return (
            "it decodes 8 bits (LLM.int8) by a factor of 1 / 127 that is rounded, and so not exactly, and"
            " rounds inputs, too"
        )
    if scheme.kind != KIND:
        return "bitsandbytes has nf4 of the schemes here"
    if not isinstance(module, nn.Linear):
        return f"bitsandbytes leaves a {type(module).__name__} dense"
    return None


def check(exported: Exported) -> None:
    """Raise AquabitError for a layer that bitsandbytes cannot hold as it is."""
    check_model(exported, METHOD)
    modules, found = dict(exported.network.named_modules(remove_duplicate=False)), choices(exported)
    for name, choice in found.items():
        why = refusal(choice.weight, modules[name])
        if why is not None:
            raise AquabitError(
                f"layer {name!r} cannot be {choice.weight}: {why}; leave it at fp, or search with --target"
                " bitsandbytes"
            )
    loader, dense = loader_of(exported.network), _dense(exported, found)
    kept: Any = getattr(exported.network, "_keep_in_fp32_modules", None) or ()
    for name in found if loader != "none" else ():
        cause = (skipped_by if loader == "diffusers" else ended_by)(name, [*dense, *kept])
        if cause is not None:
            raise AquabitError(
                f"layer {name!r} cannot be {found[name].weight}: {loader} leaves it dense because {cause!r}"
                " stays so, by its name; let both be fp, or both nf4"
            )


def _dense(exported: Exported, coded: Iterable[str]) -> list[str]:
    """The Linear layers that are not quantized, every name of each."""
    named = exported.network.named_modules(remove_duplicate=False)
    kept = set(coded)
    return sorted(name for name, module in named if isinstance(module, nn.Linear) and name not in kept)


def skipped_by(name: str, skipped: Iterable[str]) -> str | None:
    """The entry of ``llm_int8_skip_modules`` by which diffusers (0.42) leaves a layer dense: its own name, or
    the last part of it, or what stands before a dot anywhere in it."""
    last = name.rpartition(".")[2]
    return next((entry for entry in skipped if entry in (name, last) or f"{entry}." in name), None)


def ended_by(name: str, skipped: Iterable[str]) -> str | None:
    """The entry by which transformers (5.24) leaves a layer dense: its name, or how that ends."""
    return next((entry for entry in skipped if name.endswith(entry)), None)


def write(exported: Exported, out: Path) -> list[str]:
    """Write the folder; what is lost or worth saying. It loads by ``from_pretrained`` of the model's class,
    for which diffusers asks for a GPU; a model of one's own by ``BY_HAND``."""
    found, first = choices(exported), exported.graph.graph.get("tied", {})
    tensors, modules = dense_tensors(exported.network, found), dict(exported.network.named_modules())
    said = loading(exported.network, BY_HAND)
    if loader_of(exported.network) == "transformers":
        state = exported.network.state_dict()
        tensors = {name: tensor.to(state[name].dtype) for name, tensor in tensors.items()}
        said.append(AS_STORED)
    for name in found:
        place = first.get(name, name)
        dtype = modules[place].weight.dtype
        own = stored(exported.weights[place], dtype)
        tensors |= {f"{name}.{part}": tensor for part, tensor in own.items()}
    said = [counted(exported, tensors), *said, *lost_beside_weights(exported.config)]
    nested = bool(found) and all(choice.weight.nested for choice in found.values())
    described = _described(_dense(exported, found), nested)
    write_model(exported, out, described, tensors, to=METHOD, said=said)
    return said


def _described(dense: list[str], nested: bool) -> dict[str, Any]:
    """``quantization_config``; what differs from layer to layer, their ``quant_state`` says."""
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": KIND,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "float32",  # bitsandbytes takes that of the inputs where it is bfloat16
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
    }


def stored(weight: CodebookWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer's weight [out, in], by the names that they have beside its bias."""
    codes = weight.codes[:, 0].t().reshape(-1, 2)
    scale, levels = weight.scale, table(KIND)
    assert scale is not None and levels is not None
    blocks = scale.shape[0] * (scale.shape[1] if scale.ndim == 2 else 1)
    state: dict[str, Any] = {
        "quant_type": KIND,
        "blocksize": codes.numel() // blocks,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    found = {"weight": (codes[:, :1] << 4 | codes[:, 1:]), "weight.quant_map": levels}
    if isinstance(scale, CodedScale):
        assert scale.over is not None and scale.base is not None
        found["weight.absmax"] = scale.integers.reshape(-1)
        found["weight.nested_absmax"] = scale.over
        found["weight.nested_quant_map"] = coded_values(scale.factors, torch.arange(256))
        state["nested_blocksize"] = scale.factors.every
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(scale.base)
    else:
        found["weight.absmax"] = scale.reshape(-1).float()
    said = json.dumps(state).encode()
    return {**found, f"weight.{STATE}": torch.frombuffer(bytearray(said), dtype=torch.uint8)}
