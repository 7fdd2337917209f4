"""What the schemes of a layer have in common is made once: its checked H, that in the order of a fit, its
factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# function -> what it was last called with, and its result; None where nothing is kept. Other threads have
# their own
Kept = dict[Callable[..., Any], tuple[tuple[Any, ...], Any]]
_KEPT: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextmanager
def shared_work() -> Iterator[None]:
    """While it lasts, functions that are ``shared`` keep their last result. Tensors that they were given must
    not change meanwhile, nor what they return. May be nested."""
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def shared(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` (of arguments without names), which while work is shared (``shared_work``) is not run
    again for the very objects that it was last given."""

    @wraps(function)
    def called(*given: P.args, **named: P.kwargs) -> R:
        kept = _KEPT.get()
        if kept is None or named:
            return function(*given, **named)
        last = kept.pop(function, None)
        if last is not None and not _same(last[0], given):
            last = None  # let go before another is made: of a wide layer each is a gigabyte
        if last is None:
            last = given, function(*given, **named)
        kept[function] = last
        found: R = last[1]
        return found

    return called


def _same(last: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    plain = (int, str, bool)
    return len(last) == len(given) and all(
        a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)
        for a, b in zip(last, given, strict=True)
    )
