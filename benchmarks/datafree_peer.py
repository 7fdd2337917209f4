"""Data-free quantizers of other libraries on a model's weights; run by benchmarks/datafree.py with the Python
of the peers' own environment.

Reads weights from a safetensors file and quantizes each by a library at so many bits, per row or in groups of
inputs. Writes the decoded weights, float32, and JSON: the bytes of each, and versions. Codes are counted
packed, scales, zero points and tables at 16 bits each, in which these libraries keep them for a 16-bit model.
A row that a group does not divide is quantized whole, as the libraries need it. It imports torch and the
libraries, nothing of aquabit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from math import ceil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HALF = 2  # bytes
Coded = tuple[Tensor, Sequence[Tensor]]  # the decoded weight, and what is stored beside its codes


def hqq(weight: Tensor, bits: int, group: int | None, optimize: bool = True) -> Coded:
    from hqq.core.quantize import Quantizer

    rows = weight.flatten(1)
    codes, meta = Quantizer.quantize(
        rows, nbits=bits, group_size=group, axis=1, device="cpu", optimize=optimize, bitpack=False
    )
    meta["compute_dtype"] = torch.float32
    return Quantizer.dequantize(codes, meta), (meta["scale"], meta["zero"])


def minmax(weight: Tensor, bits: int, group: int | None) -> Coded:
    """The whole range of each group, as HQQ begins."""
    return hqq(weight, bits, group, optimize=False)


def quanto(weight: Tensor, bits: int, group: int | None) -> Coded:
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    kind, rows = {2: qint2, 4: qint4}[bits], weight.flatten(1)
    scale, shift = MaxOptimizer()(rows, kind, 0, group)
    coded = quantize_weight(rows, kind, 0, scale, shift, group, optimized=False)
    return coded.dequantize(), (scale, shift)


def sdnq(weight: Tensor, bits: int, group: int | None, table: bool = False) -> Coded:
    """Groups of the channels of one tap; with ``table`` k-means over a row."""
    from sdnq.quantizer import sdnq_quantize_layer_weight

    rows = weight.flatten(1) if table else weight
    dequantizer, tensors = sdnq_quantize_layer_weight(
        rows,
        "Linear" if rows.ndim == 2 else "Conv2d",
        f"uint{bits}",
        group_size=group or -1,
        use_codebook=table,
        torch_dtype=torch.float32,
    )
    decoded = dequantizer(**tensors, dtype=torch.float32, skip_compile=True)
    kept = [v for k, v in tensors.items() if k != "weight" and v is not None]
    return decoded, kept


def sdnq_table(weight: Tensor, bits: int, group: int | None) -> Coded:
    return sdnq(weight, bits, group, table=True)


PEERS = {"hqq": hqq, "min-max": minmax, "quanto": quanto, "sdnq": sdnq, "sdnq-table": sdnq_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--cases", nargs="+", required=True, help="PEER:BITS:GROUP; a group of 0 is the row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    weights = load_file(given.weights)
    for case in given.cases:
        peer, bits, group = case.split(":")
        decoded, size = {}, {}
        for name, weight in weights.items():
            whole = int(group) == 0 or weight[0].numel() % int(group) != 0
            with torch.no_grad():
                found, kept = PEERS[peer](weight, int(bits), None if whole else int(group))
            decoded[name] = found.float().reshape(weight.shape).contiguous().clone()
            size[name] = ceil(weight.numel() * int(bits) / 8) + HALF * sum(t.numel() for t in kept)
        stem = given.out / case.replace(":", "-")
        save_file(decoded, stem.with_suffix(".safetensors"))
        said = {"bytes": size, "versions": {n: version(n) for n in ("hqq", "sdnq", "optimum-quanto")}}
        stem.with_suffix(".json").write_text(json.dumps(said))
        print(case, sum(size.values()), flush=True)


if __name__ == "__main__":
    main()
