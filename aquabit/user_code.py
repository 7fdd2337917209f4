"""Functions of the user's that are named as ``module:function``: code runs because somebody named it, and
never because a file does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from aquabit.errors import AquabitError


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
    except Exception as error:  # whatever the user's module does
        raise AquabitError(
            f"module {module!r} of {what} {name!r} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    called: Any = getattr(found, function, None)
    if not callable(called):
        raise AquabitError(f"module {module!r} has no function {function!r}, which {what} {name!r} names")
    return called, found
