"""Functions of the user's that are named as ``module:function``: code runs because somebody named it, and
never because a file does."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from aquabit.errors import AquabitError

# what code of the user's raises: SystemExit, too, by which a script ends (sys.exit, argparse)
FAILURES = (Exception, SystemExit)


def names_function(text: str) -> bool:
    """Whether a text has the form ``module:function`` (``package.module:function``), and is no file."""
    module, colon, function = text.partition(":")
    named = bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))
    return named and not Path(text).exists()


def search_in(folder: str) -> None:
    """Let Python find modules in a folder, last: what lies there takes the place of no installed module."""
    if folder not in sys.path:
        sys.path.append(folder)


def folder_of(name: str) -> str:
    """The folder that Python finds the module of a ``module:function`` in, once it is imported, for other
    processes to find it too; "" where that is not known."""
    top = name.partition(":")[0].partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        return ""
    path = Path(file).resolve()
    return str(path.parents[1] if path.stem == "__init__" else path.parent)


def code_digest(function: Callable[..., Any]) -> str:
    """Of a function's source and of what it uses of its own module: functions, classes and plain constants.
    Objects that hold state (networks, tensors) are not in it."""
    parts, waiting, seen = list[str](), [function], set[int]()
    while waiting:
        found = inspect.unwrap(waiting.pop())
        while isinstance(found, partial):
            parts.append(repr([v for v in (*found.args, *found.keywords.items()) if _plain(v)]))
            found = found.func
        if not inspect.isroutine(found) and not inspect.isclass(found):
            found = type(found)  # an object that is called
        found = getattr(found, "__func__", found)
        if id(found) in seen:
            continue
        seen.add(id(found))
        parts.append(_source(found))
        for name, value in _used(found):
            if callable(value) and getattr(value, "__module__", None) == getattr(found, "__module__", ""):
                waiting.append(value)
            elif _plain(value):
                parts.append(f"{name} = {value!r}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _source(found: Any) -> str:
    try:
        return inspect.getsource(found)
    except (OSError, TypeError):  # typed in, or compiled
        code = getattr(found, "__code__", None)
        return f"{getattr(found, '__qualname__', '')} {'' if code is None else code.co_code.hex()}"


def _used(found: Any) -> list[tuple[str, Any]]:
    """The global and enclosing values that a function names, by name."""
    if getattr(found, "__code__", None) is None:
        return []
    codes, names = [found.__code__], set[str]()
    while codes:  # those of functions inside it too
        code = codes.pop()
        names |= {*code.co_names, *code.co_freevars}
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    cells = dict(zip(found.__code__.co_freevars, found.__closure__ or (), strict=False))
    there = {k: v for k, v in found.__globals__.items() if k in names}
    with suppress(ValueError):  # a cell may be empty yet
        there |= {k: cell.cell_contents for k, cell in cells.items()}
    return sorted(there.items(), key=lambda item: item[0])


def _plain(value: Any) -> bool:
    """Whether a value is a constant whose text says all of it."""
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def named_function(name: str, what: str) -> tuple[Callable[..., Any], ModuleType]:
    """The function that ``name`` names, and its module, found as Python finds it or in the current folder;
    ``what`` says in messages what it is for.

    Raises AquabitError for another form, a module that fails, and a function that is not there.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise AquabitError(f"{what} {name!r} must be module:function, as in my_code:function")
    search_in(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except FAILURES as error:  # whatever the user's module does
        ends = isinstance(error, SystemExit)
        how = '; what ends the program belongs behind if __name__ == "__main__"' if ends else ""
        raise AquabitError(
            f"module {module!r} of {what} {name!r} cannot be imported ({type(error).__name__}: {error}){how}"
        ) from error
    called: Any = getattr(found, function, None)
    if not callable(called):
        raise AquabitError(f"module {module!r} has no function {function!r}, which {what} {name!r} names")
    return called, found
