"""Small denoisers of diffusers' classes as writers of files get them: dense, with weights as codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from aquabit.exports.exported import Exported
from aquabit.graph import fixed_layers, layers, trace
from aquabit.quant.model import fingerprint, storage_dtype
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Rounding, Scheme


def small_dit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_elementwise_affine=False,
        norm_num_groups=4,
    ).eval()


def small_unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()


def calls(net: Any) -> dict[str, Any]:
    """An example call of one of these."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = {} if isinstance(net, UNet2DModel) else {"class_labels": torch.tensor([1, 2])}
    return {**labels, "sample" if labels == {} else "hidden_states": x, "timestep": torch.tensor([3, 500])}


def output(net: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(**calls(net)).sample
    return found


@dataclass(frozen=True)
class Case:
    """What a writer gets, and the dense model with the decoded weights in it."""

    exported: Exported
    decoded: Mapping[str, Tensor]
    reference: nn.Module


def case(
    net: Any,
    chosen: Callable[[int, str, tuple[int, ...]], str],
    act: Rounding = 16,
    again: Any = None,
    graph: Any = None,
) -> Case:
    """Each layer by ``chosen(number, name, shape)``; layers whose scheme cannot hold them stay ``fp``.
    ``again`` is a second copy of the model, to hold the decoded weights."""
    graph = trace(net) if graph is None else graph
    choices, weights, decoded = {}, {}, {}
    fixed = fixed_layers(graph)
    for i, (name, node) in enumerate(layers(graph).items()):
        scheme = Scheme.parse(chosen(i, name, tuple(node["shape"])))
        weight = net.get_submodule(name).weight.detach().half().float()
        if name in fixed or str(scheme) == "fp" or scheme.refuses(tuple(weight.shape)):
            continue
        choices[name] = LayerChoice(scheme, act)
        weights[name] = quantize_weight(weight, scheme)
        decoded[name] = weights[name].dequantize()
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.copy_(tensor.to(storage_dtype(tensor)))
        for name, weight in decoded.items():
            again.get_submodule(name).weight.copy_(weight)
    config = QuantConfig(fingerprint(net), choices)
    return Case(Exported(net, config, graph, weights), decoded, again)


def refused(check: Callable[[Exported], None], net: Any, layer: str, scheme: str, graph: Any = None) -> str:
    """What ``check`` says of one layer with a scheme, before anything is fitted; "" where nothing."""
    config = QuantConfig(fingerprint(net), {layer: LayerChoice(Scheme.parse(scheme))})
    try:
        check(Exported(net, config, trace(net) if graph is None else graph))
    except AquabitError as error:
        return str(error)
    return ""
