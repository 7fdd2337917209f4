"""The C++ extension, or None where it was not built. Modules take it from here, not from the package, which
imports them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch  # noqa: F401  # before the extension: one libgomp then serves both

native: Any = None
why_not = ""  # it is not there
try:
    native = import_module("aquabit.kernels._native")
except ImportError as error:
    why_not = str(error)
