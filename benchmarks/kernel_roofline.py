"""The bound of each format on this machine, and the share of it that was reached.

The machine is measured by benchmarks/machine.cpp. The table kernel's bound is the time of its loads (64 bytes
from a table and their add, for 32 columns of int16 or 16 of float32) plus that of making its tables (the
larger of their multiply-adds and of storing them); nothing else is counted: neither reading codes, nor moving
activations, nor rounding. The decoding kernel's bound is its integer dot products. For one token, both are
bounded by reading the codes from memory too.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from aquabit.kernels.arranged import NIBBLE, Arranged
from aquabit.kernels.request import empty_like
from aquabit.quant.kernel_tuning import format_for
from aquabit.scheme import AquabitError, Progress, Scheme

SOURCE = Path(__file__).with_name("machine.cpp")
NEAR = 64  # rows of a table up to which those of eight lookups fit the first cache
LANES = {"fast": 32, "exact": 16}  # columns of a load
LOOKUPS = {
    "L1": ((16, 16, 1), (16, 8, 2), (64, 8, 1)),
    "L2": ((256, 16, 1), (256, 32, 1), (256, 16, 2)),
}  # rows, lookups, vectors
KINDS = ("float32", "bfloat16", "int16", "int8")
FEW = 4  # tokens that are multiplied one by one


@dataclass(frozen=True)
class Machine:
    """Seconds of a unit of work on each of ``threads`` cores that work at once."""

    threads: int
    load: dict[str, float]  # "L1", "L2": 64 bytes from a table, and their add
    multiply_add: dict[str, float]  # by type
    store: float  # 64 bytes
    read: float  # a byte of memory
    scalar: float  # one float from a table, and its add

    def facts(self) -> dict[str, Any]:
        """In the units of the report."""
        return {
            "what": "machine",
            "threads": self.threads,
            **{f"load_{k}_ns": 1e9 * v for k, v in self.load.items()},
            **{f"{k}_gmac_s": 1e-9 / v for k, v in self.multiply_add.items()},
            "store_ns": 1e9 * self.store,
            "read_gb_s": 1e-9 / self.read,
            "scalar_ns": 1e9 * self.scalar,
        }


def library() -> ctypes.CDLL:
    """benchmarks/machine.cpp, built for this machine; raises AquabitError where there is no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "machine.so"
        command = [
            "c++",
            "-O3",
            "-march=native",
            "-std=c++17",
            "-shared",
            "-fPIC",
            str(SOURCE),
            "-o",
            str(built),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise AquabitError(
                f"{SOURCE.name} could not be built by {command[0]!r}: {getattr(error, 'stderr', error)}"
            ) from error
        found = ctypes.CDLL(str(built))
    for name in (
        "lookup_seconds",
        "multiply_add_seconds",
        "store_seconds",
        "read_seconds",
        "scalar_lookup_seconds",
    ):
        getattr(found, name).restype = ctypes.c_double
    return found


def measured(native: ctypes.CDLL, threads: int, repeats: int = 20) -> Machine:
    """The machine as it is with so many cores at work."""
    wide = ctypes.c_int64

    def each(run: Callable[[], float]) -> float:
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter
            return max(pool.map(lambda _: run(), range(threads)))

    load = {
        place: min(
            each(lambda c=c: native.lookup_seconds(wide(c[0]), wide(c[1]), c[2], repeats)) for c in cases
        )
        for place, cases in LOOKUPS.items()
    }
    rates = {kind: each(lambda i=i: native.multiply_add_seconds(i, repeats)) for i, kind in enumerate(KINDS)}
    rates = {kind: rate or rates["float32"] for kind, rate in rates.items()}  # no such instruction: as floats
    return Machine(
        threads,
        load,
        rates,
        each(lambda: native.store_seconds(wide(1 << 18), repeats)),
        each(lambda: native.read_seconds(wide(1 << 28), 3)),
        min(each(lambda n=n: native.scalar_lookup_seconds(wide(n), repeats)) for n in (16, 24, 144)),
    )


# ---- what a format asks for
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Of one call: loads of 64 bytes from tables (each with its add), multiply-adds and stores of 64 bytes
    that make the tables; those of the dense layer; bytes of codes; rows of a table."""

    loads: int
    table_multiply_adds: int
    table_stores: int
    multiply_adds: int
    code_bytes: int
    table_rows: int
    lookups: int  # by one column


def work(scheme: str, shape: tuple[int, ...], columns: int, accuracy: str = "fast") -> Work:
    """Of a layer ``shape`` at ``columns`` tokens or output pixels, stride 1. Bytes of two narrow codes are
    one lookup in 256 rows, which are sums of 16 and 16 (fused scalar codes: of half as many bits); taps of a
    convolution share tables where groups run across channels.
    """
    own = empty_like(format_for(Scheme.parse(scheme), shape))
    if not isinstance(own, Arranged):
        raise AquabitError(f"{scheme} at {list(shape)} is not arranged for the kernels")
    row_bytes, vectors = sum(own.segment_bytes(s) for s in own.segments), ceil(columns / LANES[accuracy])
    bits = own.bits * own.fused
    rows = 256 if own.width == NIBBLE else 1 << bits
    tables = row_bytes if own.order == "kernel" else row_bytes // prod(shape[2:])
    halves = 2 * (1 << bits // 2) * (own.span // 2)
    products = halves if own.fused > 1 else (2 * 16 if own.width == NIBBLE else rows) * own.span
    lanes = vectors * LANES[accuracy]
    return Work(
        shape[0] * row_bytes * vectors,
        tables * products * lanes,
        tables * rows * vectors,
        prod(shape) * columns,
        shape[0] * row_bytes,
        rows,
        shape[0] * row_bytes,
    )


def bound(
    kernel: str, scheme: str, shape: tuple[int, ...], columns: int, machine: Machine
) -> tuple[Work, float]:
    """What ``kernel`` ("lut fast", "lut exact", "decode a16", "decode a8") has to do, and the seconds that
    the machine needs for it."""
    name, _, how = kernel.partition(" ")
    w, rate = work(scheme, shape, columns, how if name == "lut" else "fast"), machine.multiply_add
    few = columns <= FEW and len(shape) == 2
    read = w.code_bytes * machine.read if few else 0.0
    if name == "decode":
        kind = "int8" if how == "a8" and scheme.startswith("usq") else "float32" if few else "int16"
        return w, max(w.multiply_adds * rate[kind], read) / machine.threads
    if few:
        products = w.table_multiply_adds // (ceil(columns / LANES[how]) * LANES[how]) * columns
        return (
            w,
            max(columns * w.lookups * machine.scalar + products * rate["float32"], read) / machine.threads,
        )
    filling = max(
        w.table_multiply_adds * rate["int16" if how == "fast" else "float32"], w.table_stores * machine.store
    )
    place = "L1" if w.table_rows <= NEAR else "L2"
    return w, (w.loads * machine.load[place] + filling) / machine.threads


def roofline(
    progress: Progress, quick: bool, linear: list[dict[str, Any]], conv: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The machine with one and two threads, then a row for every measured one of a kernel that has a
    bound."""
    if not linear and not conv:
        raise AquabitError("roofline compares what `linear` and `conv` measured; run them first")
    if any("weight" not in row for row in conv):
        raise AquabitError("rows of `conv` say nothing of their weights' shapes: an older form; run it again")
    native, machines = library(), {}
    for count in sorted({r["threads"] for r in (*linear, *conv)}):
        progress("measuring the machine", len(machines), 2)
        machines[count] = measured(native, count, 5 if quick else 20)
    progress("measuring the machine", 2, 2)
    rows = [m.facts() for m in machines.values()]
    for row in (*linear, *conv):
        if row["format"] is None:
            continue
        if "tokens" in row:
            inputs, out = (int(n) for n in row["shape"].split(" -> "))
            shape, columns, facts = (out, inputs), row["tokens"], {"tokens": row["tokens"]}
        else:
            shape, columns, facts = tuple(row["weight"]), row["pixels"], {"side": row["side"]}
            if row["kernel"].startswith("lut") and (
                shape[1] != row["channels"] or columns != row["side"] ** 2
            ):
                continue  # tables for pixels or groups that ``work`` does not count
        w, seconds = bound(row["kernel"], row["format"], shape, columns, machines[row["threads"]])
        table = row["kernel"].startswith("lut")
        facts |= (
            {"loads": w.loads, "table_bytes": 64 * w.loads, "table_multiply_adds": w.table_multiply_adds}
            if table
            else {}
        )
        facts |= {"multiply_adds": w.multiply_adds, "code_bytes": w.code_bytes, "bound_ms": 1e3 * seconds}
        rows.append(
            {
                "what": "layer",
                "shape": row["shape"],
                "threads": row["threads"],
                "format": row["format"],
                "kernel": row["kernel"],
                "ms": row["ms"],
                **facts,
                "share": 1e3 * seconds / row["ms"],
            }
        )
    return rows
