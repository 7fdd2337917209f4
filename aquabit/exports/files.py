"""The programs whose files are written, weights included: a table of writers.

A writer is a module with ``write`` and ``check``, entered in ``WRITERS``; it takes ``Exported`` from
``exports.exported``, so that modules form no circle.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from aquabit.exports import bitsandbytes, comfy, gguf, sdnq, torchao_files
from aquabit.exports.exported import Exported
from aquabit.exports.model_folder import is_ours

__all__ = ["WRITERS", "Exported", "Writer"]


class Writer(NamedTuple):
    """``write`` makes the file or folder, whole or not at all, never over somebody's, and returns what is
    lost or worth saying, a sentence each. ``check`` raises AquabitError where the program cannot hold what
    is to be written, before anything is fitted; ``Exported.weights`` is empty then. ``may_replace``: whether
    what is there already is one of ours, and may be written over. ``folder``: what it makes is one."""

    write: Callable[[Exported, Path], list[str]]
    check: Callable[[Exported], None]
    may_replace: Callable[[Path], bool] = lambda _: False
    folder: bool = False


def _folders(program: ModuleType) -> Writer:
    """A program that reads folders as diffusers has them."""
    return Writer(program.write, program.check, partial(is_ours, to=program.METHOD), folder=True)


WRITERS: dict[str, Writer] = {
    "gguf": Writer(gguf.write, gguf.check, gguf.is_ours),
    "sdnq": _folders(sdnq),
    "bitsandbytes": _folders(bitsandbytes),
    "torchao": _folders(torchao_files),
    "comfy": Writer(comfy.write, comfy.check, comfy.is_ours),
}
