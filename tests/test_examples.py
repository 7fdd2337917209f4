"""The examples are run on a tiny model: the script whole, the notebook cell by cell."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = "WIDTH, SAMPLES, IMAGES, STEPS = 4, 22, 4, 2\n"  # explain needs 20 measurements


def test_own_model_as_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes from a bare network to a packed one, whose images come from codes; the sampler and the call of
    aquabit.Model take at most 25 lines."""
    sizes = ["--samples", "2", "--images", "4", "--steps", "2", "--width", "4"]
    monkeypatch.setattr(sys, "argv", ["own_model.py", "--out", str(tmp_path), *sizes])
    runpy.run_path(str(EXAMPLES / "own_model.py"), run_name="__main__")
    assert "images [4, 1, 8, 8] from codes" in capsys.readouterr().out
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "aquabit"
    monkeypatch.syspath_prepend(EXAMPLES)
    from own_model import own_model, sample

    written = [inspect.getsource(f).splitlines() for f in (sample, own_model)]
    assert sum(len([line for line in lines if line.strip()]) for lines in written) <= 25


def test_own_model_as_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid nbformat 4, without stored outputs; its cells run in order."""
    book = json.loads((EXAMPLES / "own_model.ipynb").read_text())
    assert book["nbformat"] == 4 and len({c["id"] for c in book["cells"]}) == len(book["cells"])
    cells = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in cells)
    monkeypatch.syspath_prepend(EXAMPLES)
    names: dict[str, object] = {}
    for cell in cells:
        lines = [TINY if line.startswith("WIDTH,") else line for line in cell["source"]]
        exec(compile("".join(lines), "own_model.ipynb", "exec"), names)
    assert names["WIDTH"] == 4, "the notebook's sizes were not made small"
    front: Any = names["front"]
    assert front.best in [member.config for member in front.members]
