"""Commands as a user types them, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from aquabit.cli.app import app


def call(out: Path, *words: str, ok: bool = True):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        patch.setenv("AQUABIT_BANK", str(out / "bank"))
        result = CliRunner().invoke(app, list(words))
    if ok:
        assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def run(out: Path, *words: str) -> str:
    """What it says; where a machine reads, without what is said of long work on standard error."""
    found = call(out, *words)
    return str(found.stdout if "--json" in words else found.output)


def fails(out: Path, *words: str, code: bool = False) -> str:
    """The sentence that a wrong command ends with; exit code 2 and no traceback. With ``code`` it is said
    first that code of the user's runs."""
    result = call(out, *words, ok=False)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    if code:
        assert lines.pop(0).startswith("running your code: "), result.output
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]
