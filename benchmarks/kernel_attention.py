"""Part ``attention`` of benchmarks/kernels.py: attention with rounded probabilities beside torch's own, which
rounds nothing, and beside its form in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.kernels import fake_quantize, rounded_attention, rounded_attention_reference
from aquabit.scheme import Progress
from benchmarks.kernel_timing import Run, errors, measured_row, paired, threads

Rows = list[dict[str, Any]]
# name -> samples, heads, columns of a head, queries, keys
CASES = {
    "8 heads of 64": [(1, 8, 64, n, n) for n in (256, 1024, 4096)],
    "16 heads of 72, 2 samples": [(2, 16, 72, 256, 256)],
    "8 heads of 40, 77 keys": [(2, 8, 40, 1024, 77)],
    "6 heads of 32, 16 samples": [(16, 6, 32, n, n) for n in (16, 64)],
}
SECONDS = 10.0  # of a case
THREADS = (1, 2)
ROUNDED, IN_TORCH = "rounded", "rounded in torch"
INTEGERS = "rounded, Q and K too"  # to 8 bits for each token, as packed layers give them in float32
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def attention(progress: Progress, quick: bool) -> Rows:
    """Every case in both types, on one thread and on two; ``quick``: up to 1,024 tokens."""
    sizes = [(name, size) for name, many in CASES.items() for size in many if not quick or size[3] <= 1024]
    rows: Rows = []
    with torch.inference_mode():
        for done, (name, size) in enumerate(sizes):
            progress("attention", done, len(sizes))
            rows += _case(name, size, 0.0 if quick else SECONDS)
        progress("attention", len(sizes), len(sizes))
    return rows


def _case(name: str, size: tuple[int, int, int, int, int], seconds: float) -> Rows:
    """A row for each kernel and type; errors are to the same in float64, rounded or (torch's own) not."""
    samples, heads, columns, queries, keys = size
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(samples, n, heads, columns, generator=rng) for n in (queries, keys, keys))
    runs: dict[str, Run] = {}
    for kind, dtype in KINDS.items():
        own = [
            x.to(dtype).transpose(1, 2) for x in (q, k, v)
        ]  # heads side by side in a token, as diffusers has them
        runs |= {f"{kernel} {kind}".strip(): _call(kernel, *own) for kernel in ("", ROUNDED, IN_TORCH)}
    on_grids = [_on_grid(x).transpose(1, 2) for x in (q, k)]
    runs[f"{INTEGERS} float32"] = _call(ROUNDED, *on_grids, v.transpose(1, 2))
    exact = {
        (kind, rounded): _in_float64(*(x.to(dtype).double().transpose(1, 2) for x in (q, k, v)), rounded)
        for kind, dtype in KINDS.items()
        for rounded in (False, True)
    }
    integers = _in_float64(*(x.double() for x in (*on_grids, v.transpose(1, 2))), True)
    rows: Rows = []
    for count in THREADS:
        with threads(count):
            times = paired(runs, seconds)
            for run, call in runs.items():
                kernel, _, kind = run.rpartition(" ")
                dense = {n: [n] for n in KINDS} | {"torch_form": [f"{IN_TORCH} {kind}"]}
                facts = {"shape": name, "tokens": queries, "keys": keys, "threads": count}
                own_row = measured_row(run, times, dense)
                error = errors(call(), integers if kernel == INTEGERS else exact[kind, bool(kernel)])
                products = 2 * samples * heads * queries * keys * columns
                rate = products / own_row["ms"] / 1e6
                rows.append(
                    {**facts, "format": kernel or None, "kernel": kind, **own_row, **error, "gmac_s": rate}
                )
    return rows


def _on_grid(x: Tensor) -> Tensor:
    """[samples, tokens, heads, columns] with each token rounded to 8 bits, heads and all."""
    return fake_quantize(x.flatten(2), 8).view(x.shape)


def _call(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Run:
    if kernel == ROUNDED:
        return lambda: rounded_attention(q, k, v)
    if kernel == IN_TORCH:
        return lambda: rounded_attention_reference(q, k, v, None, q.shape[-1] ** -0.5)
    return lambda: functional.scaled_dot_product_attention(q, k, v)


def _in_float64(q: Tensor, k: Tensor, v: Tensor, rounded: bool) -> Tensor:
    if rounded:
        return rounded_attention_reference(q, k, v, None, q.shape[-1] ** -0.5)
    return functional.scaled_dot_product_attention(q, k, v)
