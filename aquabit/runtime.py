"""What the process is asked for: torch threads, memory that is used again, and whether memory ran out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the processor or on a GPU; torch says so in several ways."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in said for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


@contextmanager
def single_thread(device: str) -> Iterator[None]:
    """One torch thread on the CPU: results do not depend on how many cores or workers there are."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it, in pieces that grow with every large tensor that is
    converted (2 GB over those of a DiT-XL/2) or fitted (3 GB).

    Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def reuse_memory() -> None:
    """Let glibc keep freed activations for the next operation: giving them back and faulting them in again
    costs a tenth of a measurement, and a twentieth of a packed call of SD 1.5's U-Net on two threads.

    Changes the process: blocks up to 32 MB come from the heap, of which up to 256 MB stay when they are
    freed. Elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
