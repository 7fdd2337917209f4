"""diffusers learns of our quantizer when it is imported, and not before: importing it takes seconds.

diffusers has no function to register a quantizer, so an import hook on ``diffusers.quantizers.auto`` enters
ours into its tables.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TARGET = "diffusers.quantizers.auto"
QUANTIZER = "aquabit.quant.diffusers_quantizer"  # enters itself into the tables of TARGET


class _Registering(Loader):
    """Runs a module as its own loader does, then imports the quantizer."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(QUANTIZER)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def register_with_diffusers() -> None:
    """Make the quantization method ``aquabit`` known to diffusers: now where it is imported already, else
    as soon as it is."""
    if TARGET in sys.modules:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
