"""Against what a user could take today: torchao's W8A8 under torch.compile, and the aqlm package's own CPU
kernel (extra ``peers``)."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.quant.schemes.aqlm import to_aqlm
from aquabit.scheme import AquabitError, Progress
from benchmarks.kernel_timing import (
    KERNELS,
    Layer,
    contenders,
    dense_runs,
    errors,
    expected,
    measured_row,
    paired,
    ratio,
    threads,
)

SHAPES = {"1152 -> 4608": (4608, 1152), "1152 -> 1152": (1152, 1152), "4608 -> 1152": (1152, 4608)}
FORMATS = ("aq1x8g8", "aq2x6g8", "aq2x8g8", "aq4x4g8", "usq2", "usq4", "usq8", "vq3c")
TORCHAO = "torchao W8A8"
MAIN = ("1152 -> 4608", 256, 2)  # the issue's: shape, tokens, threads
CASES = (MAIN, (MAIN[0], 256, 1), *((s, t, 2) for t in (1, 256, 1024) for s in SHAPES if (s, t) != MAIN[:2]))
SECONDS = {1: 1.0, 256: 4.0, 1024: 5.0}
AQLM_SHAPE, AQLM_FORMAT = "1152 -> 4608", "aq2x8g8"
AQLM_CASES = ((1, 1), (1, 2), (256, 1), (256, 2))  # tokens, threads
AQLM_ROUNDS = {1: 20, 256: 2}  # by tokens: 256 take seconds each
CHECKED = 8  # tokens whose error is taken
PAUSE = 0.02
NEEDS = "it needs the extra `peers` (pip install aquabit[peers])"

Run = Callable[[], Tensor]


def peers(progress: Progress, quick: bool) -> list[dict[str, Any]]:
    """torchao's layer in every case beside ours and the dense ones; AQLM's at one and at 256 tokens."""
    cases = CASES[:2] if quick else CASES
    total, rows = len(cases) + len(AQLM_CASES), []
    layers: dict[str, list[Layer]] = {}
    for done, (name, tokens, count) in enumerate(cases):
        progress("peers", done, total)
        if name not in layers:
            layers[name] = [Layer(scheme, SHAPES[name], seed) for seed, scheme in enumerate(FORMATS)]
        with threads(count):
            rows += _against_torchao(
                layers[name],
                tokens,
                0.0 if quick else SECONDS[tokens],
                {"shape": name, "tokens": tokens, "threads": count},
            )
    for done, (tokens, count) in enumerate(AQLM_CASES, len(cases)):
        progress("peers", done, total)
        with threads(count):
            rows += _against_aqlm(tokens, count, 1 if quick else AQLM_ROUNDS[tokens])
    progress("peers", total, total)
    return rows


# ---- torchao
# ------------------------------------------------------------------------------------------------------------


def torchao_layer(weight: Tensor, bias: Tensor) -> nn.Module:
    """A Linear of that weight with int8 weights and int8 activations, a scale a token, compiled for the
    shapes and threads it is called with."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise AquabitError(f"torchao could not be imported ({error}); {NEEDS}") from error
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    model = nn.Sequential(layer).eval().requires_grad_(False)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()  # shapes as they are, not symbols, and this number of threads
    return torch.compile(model, dynamic=False)


def _against_torchao(
    layers: list[Layer], tokens: int, seconds: float, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Ratios to the dense layers and to torchao's in float32 (and in bfloat16, where the case is the main
    one)."""
    torch.manual_seed(0)
    x, bias, decoded = (
        torch.randn(tokens, layers[0].shape[1]),
        torch.zeros(layers[0].shape[0]),
        layers[0].decoded,
    )
    kinds = (torch.float32, torch.bfloat16) if tuple(facts.values()) == MAIN else (torch.float32,)
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching.*")
    with torch.no_grad():
        compiled = {
            f"{TORCHAO} {str(k).removeprefix('torch.')}": (torchao_layer(decoded.to(k), bias.to(k)), x.to(k))
            for k in kinds
        }
        theirs: dict[str, Run] = {name: lambda m=m, v=v: m(v) for name, (m, v) in compiled.items()}
        for run in theirs.values():
            run()
    with torch.inference_mode():
        dense, which = dense_runs(x, decoded, bias)
        which = {**which, "torchao": [f"{TORCHAO} float32"]}
        ours = {
            f"{layer.scheme} {name}": run
            for layer in layers
            for name, run in contenders(layer, x, bias).items()
            if name != "lut exact"
        }
    with torch.no_grad():  # compiled for it: inference mode would compile again
        times = paired({**dense, **theirs, **ours}, seconds)
        plain = {**dense, **theirs}
        found = [
            {
                **facts,
                "format": None,
                "kernel": n,
                **measured_row(n, times, which),
                **errors(run(), expected(layers[0], x, bias, 16)),
            }
            for n, run in plain.items()
        ]
        for layer in layers:
            for name, (_, _, act) in KERNELS.items():
                run = ours.get(f"{layer.scheme} {name}")
                if run is not None:
                    row = measured_row(f"{layer.scheme} {name}", times, which)
                    found.append(
                        {
                            **facts,
                            "format": layer.scheme,
                            "kernel": name,
                            "bits": layer.bits,
                            **row,
                            **errors(run(), expected(layer, x, bias, act)),
                        }
                    )
    return found


# ---- AQLM
# ------------------------------------------------------------------------------------------------------------


def aqlm_layer(layer: Layer) -> nn.Module:
    """The aqlm package's QuantizedLinear with that layer's codes, in float32: what its CPU kernel takes."""
    try:
        from aqlm import QuantizedLinear
    except ImportError as error:
        raise AquabitError(f"aqlm could not be imported ({error}); {NEEDS}") from error
    stored = to_aqlm(layer.coded)
    count, codewords, out_group, group = stored["codebooks"].shape
    theirs = QuantizedLinear(
        layer.shape[1], layer.shape[0], group, out_group, count, codewords.bit_length() - 1, bias=False
    )
    theirs.codes.data = stored["codes"]
    theirs.codebooks.data, theirs.scales.data = stored["codebooks"].float(), stored["scales"].float()
    return theirs


def _against_aqlm(tokens: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """Its LUT kernel, compiled by Numba in its first call, beside ours of the same codes. Its threads add
    to the same outputs without a lock: with more than one its errors are not its arithmetic's."""
    import numba

    torch.manual_seed(0)
    numba.set_num_threads(count)
    layer = Layer(AQLM_FORMAT, SHAPES[AQLM_SHAPE])
    x, bias = torch.randn(tokens, layer.shape[1]), torch.zeros(layer.shape[0])
    theirs = aqlm_layer(layer)
    few = x[:CHECKED]
    with torch.inference_mode():
        started = time.perf_counter()
        theirs(x[:1])
        compiling = time.perf_counter() - started
        torch.set_num_threads(
            count
        )  # Numba's first parallel call sets OpenMP's own number, which is torch's too
        runs: dict[str, Run] = {
            "aqlm": lambda: theirs(x),
            **contenders(layer, x, bias),
            "float32": dense_runs(x, layer.decoded, bias)[0]["float32"],
        }
        times = paired(runs, 0.0, (rounds, rounds), PAUSE)
        rows = []
        for name, own in times.items():
            y = theirs(few) if name == "aqlm" else runs[name]()[:CHECKED]
            row = {
                "shape": AQLM_SHAPE,
                "tokens": tokens,
                "threads": count,
                "format": None if name == "float32" else AQLM_FORMAT,
                "kernel": name,
                "ms": 1e3 * statistics.median(own),
                "rounds": rounds,
                "over_aqlm": ratio(times["aqlm"], own),
            }
            rows.append(row | errors(y, expected(layer, few, bias, KERNELS.get(name, ("", "", 16))[2])))
        rows[0]["compiling_s"] = compiling
    return rows
