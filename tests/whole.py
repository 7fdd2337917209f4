"""Whether a pipeline works whole: images in full precision, quantized, packed, saved and loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aquabit
from aquabit.graph import layers
from aquabit.pipelines import Adapter, load, network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import Protocol
from aquabit.space import make_space


@dataclass(frozen=True)
class Whole:
    """What came of it: ``psnr`` [dB] of the packed pipeline against full precision, ``same`` the largest
    difference between its images before and after it was saved and loaded."""

    layers: int
    operators: set[str]
    images: Tensor
    psnr: float
    same: float


def images(pipe: Any, protocol: Protocol) -> Tensor:
    adapter = Adapter(pipe)
    return torch.cat([adapter.images(protocol, b) for b in adapter.batches(protocol)])


def works_whole(pipe: Any, protocol: Protocol, folder: Path, saved: bool = True) -> Whole:
    """Take a pipeline through the whole of it, from a folder unless not ``saved``; raises whatever fails."""
    source: Any = pipe
    if saved:
        pipe.save_pretrained(folder / "model")
        source = str(folder / "model")
    own = load(source)
    graph = trace(own)
    space = make_space(graph, fingerprint(network_of(own)), schemes=["usq4"])
    full = images(own, protocol)
    packed = aquabit.quantize(source, space.uniform("usq4", 8), bank=str(folder / "bank"))
    made = images(packed.pipe, protocol)
    packed.save(folder / "packed")
    again = images(load(folder / "packed") if saved else packed.pipe, protocol)
    if float(full.std()) < 1e-3 or torch.equal(made, full):
        raise AssertionError("its images say nothing: they are constant, or quantization changes none")
    error = float((made - full).square().mean())
    return Whole(
        len(layers(graph)),
        {node["operator"] for node in layers(graph).values()},
        made,
        float(-10 * torch.log10(torch.tensor(max(error, 1e-12)))),
        float((made - again).abs().max()),
    )
