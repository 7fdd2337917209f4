"""The Triton kernels against cuBLAS (cuDNN) bf16 and against dequantize-then-multiply: python
benchmarks/triton_kernels.py [--formats usq4 ...] [--layers N], on a CUDA machine.

Writes benchmarks/results/triton.json and triton.md. bfloat16 throughout, random codes. Every round runs all
three after one another, as CUDA graphs, with the L2 cache flushed before each, so that ratios are paired and
weights come from memory, as in a model whose layers do not fit the cache.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.kernels.backends.triton_kernels import (
    triton_available,
    triton_conv2d,
    triton_linear,
    triton_weight,
)
from aquabit.kernels.codebook import CodebookWeight
from benchmarks.common import RESULTS, parser, write_results

# bits, group, codebooks; tables per row (None: uniform codes), groups of inputs with a scale each
FORMATS = {
    "usq2": (2, 1, 1, None, 0),
    "usq4": (4, 1, 1, None, 0),
    "usq4g64": (4, 1, 1, None, 64),
    "usq8": (8, 1, 1, None, 0),
    "vq3": (3, 1, 1, False, 0),
    "vq3c": (3, 1, 1, True, 0),
    "aq1x8g8": (8, 8, 1, False, 0),
    "aq2x8g8": (8, 8, 2, False, 0),
    "aq2x6g8": (6, 8, 2, False, 0),
}
LINEAR = [(1152, 1152), (4608, 1152), (1152, 4608), (4096, 4096)]  # out, in: DiT-XL/2, and one larger
TOKENS = (1, 16, 256, 4096)
CONV = [(192, 32), (384, 32), (576, 16), (960, 16)]  # channels, size: LDM-4, 3 x 3
BATCH, ROUNDS, WARM, ASKED = 8, 30, 3, 20


def made(name: str, shape: tuple[int, ...], device: str = "cuda", seed: int = 0) -> CodebookWeight:
    bits, group, books, per_row, size = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    out, row = shape[0], torch.Size(shape[1:]).numel()
    codes = torch.randint(0, 1 << bits, (-(-row // group), books, out), generator=generator)
    tables = (
        None
        if per_row is None
        else torch.randn(out if per_row else 1, books, 1 << bits, group, generator=generator)
    )
    scale = 0.02 * (0.5 + torch.rand((out, row // size) if size else (out,), generator=generator))
    offset = None if tables is not None else -scale * (1 << bits) / 2
    return CodebookWeight.from_codes(codes, tables, scale, offset, shape, bits).to(device)


def replayed(run: Callable[[], Tensor]) -> Callable[[], None]:
    """``run`` as a CUDA graph: what it does on the device, without what Python takes to ask for it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM):  # tuning happens here
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def paired(runs: dict[str, Callable[[], Tensor]], device: str = "cuda") -> dict[str, list[float]]:
    """Milliseconds of each on the device, round by round; on a CPU, where nothing but this code is tried, of
    one call each."""
    if device == "cpu":
        return {name: [called(run)] for name, run in runs.items()}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    graphs = {name: replayed(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, replay in graphs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def called(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def asking(run: Callable[[], Tensor]) -> float:
    """Microseconds that one call takes of the processor, where the device keeps up."""
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(ASKED):
            run()
        found.append(1e6 * (time.perf_counter() - began) / ASKED)
    return statistics.median(found)


def row(
    layer: str,
    name: str,
    weight: CodebookWeight,
    x: Tensor,
    dense: Callable[[Tensor, Tensor], Tensor],
    ours: Callable[[], Tensor],
) -> dict[str, Any]:
    decoded = weight.dequantize()
    held = decoded.to(x.dtype)
    expected = dense(x.double(), decoded.double())
    error = float((ours().double() - expected).abs().max() / expected.abs().max())
    times = paired(
        {
            "triton": ours,
            "dense": lambda: dense(x, held),
            "dequantize": lambda: dense(x, weight.dequantize().to(x.dtype)),
        }
    )
    ratios = {
        f"over_{other}": statistics.median(b / a for a, b in zip(times["triton"], times[other], strict=True))
        for other in ("dense", "dequantize")
    }
    found = {"layer": layer, "format": name, "bits_per_weight": weight.bits_per_weight, "error": error}
    found |= {f"{k}_us": 1e3 * statistics.median(v) for k, v in times.items()} | ratios
    found |= {"asking_us": asking(ours), "asking_dense_us": asking(lambda: dense(x, held))}
    print(found, file=sys.stderr, flush=True)
    return found


def linear_rows(formats: list[str], layers: int) -> list[dict[str, Any]]:
    rows = []
    for shape in LINEAR[:layers]:
        for name in formats:
            weight = made(name, shape)
            laid = triton_weight(weight)
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
                layer = f"linear {shape[1]} -> {shape[0]}, {tokens} tokens"
                rows.append(
                    row(
                        layer,
                        name,
                        weight,
                        x,
                        functional.linear,
                        lambda x=x, laid=laid: triton_linear(x, laid),
                    )
                )
    return rows


def conv_rows(formats: list[str], layers: int) -> list[dict[str, Any]]:
    rows = []
    for channels, size in CONV[:layers]:
        x = torch.randn(BATCH, channels, size, size, device="cuda", dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        for name in formats:
            weight = made(name, (channels, channels, 3, 3))
            laid = triton_weight(weight)
            layer = f"conv 3x3, {channels} channels, {BATCH} x {size} x {size}"

            def dense(x: Tensor, w: Tensor) -> Tensor:
                return functional.conv2d(x, w.contiguous(memory_format=torch.channels_last), padding=1)

            rows.append(
                row(layer, name, weight, x, dense, lambda x=x, laid=laid: triton_conv2d(x, laid, padding=1))
            )
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    arguments.add_argument("--layers", type=int, default=len(LINEAR), help="of each kind, the first so many")
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    why = triton_available()
    if why or not torch.cuda.is_available():
        sys.exit(
            "this benchmark needs a CUDA device and triton without its interpreter:"
            f" {why or 'there is no CUDA device'}"
        )
    import triton

    device = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
    rows = linear_rows(given.formats, given.layers) + conv_rows(given.formats, given.layers)
    command = f"python {' '.join(sys.argv)}"
    write_results("triton", command, {"device": device, "rows": rows}, markdown, given.results)


def markdown(found: dict[str, Any]) -> str:
    m = found["machine"] | found["device"]
    lines = [
        (
            f"# Triton kernels\n\n{m['gpu']}, torch {m['torch']}, CUDA {m['cuda']}, triton {m['triton']};"
            f" bfloat16, medians of {ROUNDS} paired rounds of CUDA graphs, L2"
        ),
        (
            "flushed before each. A ratio above 1 means that ours is faster. Asking: what a call takes of\n"
            "the processor before the device works. Error: max|y - y64| / max|y64|."
            f" Made by `{found['command']}`.\n"
        ),
        (
            "| layer | format | bits | triton, us | dense bf16, us | dequantize + dense, us | over dense |"
            " over dequantize | asking, us | asking dense, us | error |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['layer']} | {r['format']} | {r['bits_per_weight']:.2f} | {r['triton_us']:.1f} |"
        f" {r['dense_us']:.1f} | {r['dequantize_us']:.1f} | {r['over_dense']:.2f} |"
        f" {r['over_dequantize']:.2f} | {r['asking_us']:.0f} |"
        f" {r['asking_dense_us']:.0f} | {r['error']:.1e} |"
        for r in found["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
