"""What the command line says while it works: progress bars, errors with their exit codes, JSON."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any

import typer
from rich.console import Console

from aquabit.errors import AquabitError, printable
from aquabit.scheme import Progress

console, errors = Console(), Console(stderr=True)
EVERY = 60.0  # seconds between lines where there is no terminal
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]


def shielded(verb: Callable[..., None]) -> Callable[..., None]:
    """Bad input: one sentence and exit code 2. Ctrl-C: a study that continues. Anything else is our fault:
    exit code 1."""

    @wraps(verb)
    def call(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except (AquabitError, OSError) as error:
            if debug:
                raise
            errors.print(f"[bold red]error:[/] {plain(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _interrupted()
        except Exception as error:
            cause: BaseException | None = error
            # what was left half done on Ctrl-C may fail in its own way (torch's mode stack does)
            while cause is not None:
                if isinstance(cause, KeyboardInterrupt):
                    _interrupted()
                cause = cause.__context__
            if debug:
                raise
            from aquabit.runtime import out_of_memory  # with torch, which only what fails has loaded

            if out_of_memory(error):
                said = f"out of memory ({error!s:.200}); lower --micro-batch, --resolution or --workers"
                errors.print(f"[bold red]error:[/] {plain(said)}", highlight=False, soft_wrap=True)
                raise typer.Exit(2) from None
            errors.print(
                f"[bold red]internal error:[/] {type(error).__name__}: {plain(str(error))}\nPlease report it;"
                " --debug shows where.",
                highlight=False,
            )
            raise typer.Exit(1) from None

    call.__annotations__ = {**verb.__annotations__, "debug": Debug}
    signature = inspect.signature(verb, eval_str=True)
    extra = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    return call


def quiet() -> None:
    """Libraries' own warnings and bars are not ours to show."""
    import logging
    import warnings

    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def _interrupted() -> None:
    errors.print("interrupted; nothing measured is lost: run the same command to continue")
    os._exit(130)


def plain(text: str) -> str:
    """``text`` as it is, line by line: no markup, and no characters that a terminal would obey."""
    from rich.markup import escape

    return escape("\n".join(map(printable, text.split("\n"))))


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress with the time that is left: bars on a terminal, elsewhere (a log) a line every EVERY
    seconds."""
    if not errors.is_terminal:
        with _lines() as progress:
            yield progress
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=errors) as drawn:
        known: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if total <= 0:
                return
            name = what.split(": ")[0]  # what comes after it changes from step to step
            if name not in known or drawn.tasks[known[name]].completed > done:
                known[name] = drawn.add_task(what, total=total)
            drawn.update(known[name], completed=done, total=total, description=plain(what))

        yield progress


@dataclass
class _Part:
    """What is being worked on: ``first`` were done when it was first heard of, at ``began``."""

    what: str
    done: int
    total: int
    began: float
    first: int

    def line(self, now: float) -> str:
        """What is done, for how long, and how long the rest takes at the same pace."""
        made, spent = self.done - self.first, now - self.began
        rest = f", about {_duration(spent / made * (self.total - self.done))} left" if made else ""
        return f"{self.what}: {self.done} of {self.total}, {_duration(spent)}{rest}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


@contextmanager
def _lines() -> Iterator[Progress]:
    """A line on standard error every EVERY seconds, also where nothing was heard meanwhile."""
    parts: list[_Part] = []
    began, ended = time.monotonic(), Event()

    def progress(what: str, done: int, total: int) -> None:
        if total <= 0:
            return
        name = what.split(": ")[0]
        if not parts or parts[-1].what.split(": ")[0] != name or parts[-1].done > done:
            parts[:] = [_Part(what, done, total, time.monotonic(), done)]
        parts[-1].what, parts[-1].done, parts[-1].total = what, done, total

    def say() -> None:
        while not ended.wait(EVERY):
            now = time.monotonic()
            said = parts[-1].line(now) if parts else f"starting, {_duration(now - began)}"
            with suppress(OSError, ValueError):  # nobody reads the log any more
                errors.print(plain(said), highlight=False, soft_wrap=True)

    speaker = Thread(target=say, daemon=True)
    speaker.start()
    try:
        yield progress
    finally:
        ended.set()
        speaker.join()


def emit(value: Any, target: str | None) -> bool:
    """Write JSON where a machine would read it; whether anything was written to standard output."""
    if target is None:
        return False
    if target == "-":
        sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
        return True
    from aquabit.jsonio import write_json

    write_json(Path(target), value)
    return False


def tell(json_: str | None, text: str) -> None:
    """Say something on standard error, but not where a machine reads."""
    if json_ != "-":
        errors.print(plain(text), highlight=False, soft_wrap=True)
