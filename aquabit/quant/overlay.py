"""Modules of other libraries that run by a forward of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def overlay_(module: nn.Module, forward: Forward) -> None:
    """Run ``module`` by ``forward(module, ...)``, a function of a Python module; its own forward is
    ``module.plainly``. A module that has one over its own already stays as it is."""
    kind: Any = type(module)
    if not hasattr(kind, "beneath"):
        module.__class__ = _overlaid(kind, forward)
        vars(module).pop("forward", None)  # one of its own would be taken instead


@cache
def _overlaid(plain: Any, replacement: Forward) -> Any:
    """A class of modules by the name of its base (``beneath``). It is a class since torch.compile takes
    modules of one for alike, and those with a forward of their own for different ones: it would compile each
    block of a model anew."""

    class Overlaid(plain):
        beneath = plain

        @wraps(plain.forward)  # diffusers reads the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return replacement(self, *args, **kwargs)

        def plainly(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

        def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles find the base by its name
            return _revived, (plain, replacement), self.__getstate__()

    Overlaid.__name__, Overlaid.__qualname__ = plain.__name__, plain.__qualname__
    Overlaid.__module__, Overlaid.__doc__ = plain.__module__, plain.__doc__
    return Overlaid


def _revived(plain: Any, replacement: Forward) -> nn.Module:
    """A module without its state."""
    kind = _overlaid(plain, replacement)
    made: nn.Module = kind.__new__(kind)
    return made
