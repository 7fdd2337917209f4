"""Damages from gradients beside those from probes, on a model of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from aquabit import workflows
from aquabit.measuring import gradient_damages
from aquabit.measuring.gradient_damages import _by_sample
from aquabit.measuring.output_errors import OutputErrors
from aquabit.scheme import AquabitError, Protocol
from aquabit.study import Study
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(images=4, steps=4, micro_batch=4)
SPACE = {"schemes": ["usq8", "usq4", "usq3", "usq2"], "activations": [8, 6]}


def measured(folder: Path, name: str, damages: str, **space: Any) -> Study:
    study = Study(folder / name)
    options: dict[str, Any] = {"protocol": PROTOCOL, "space": SPACE | space, "bank": str(folder / "bank")}
    workflows.measure(tiny_pipeline("dit"), study, 0, damages=damages, **options)
    return study


@pytest.mark.parametrize("groups", [None, {"total": 4, "starts": [0, 2]}])
def test_they_rank_as_probes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: Any) -> None:
    monkeypatch.setattr(gradient_damages, "CELLS", 8)
    monkeypatch.setattr(gradient_damages, "ROUNDED", 3)
    space = {"step_groups": groups} if groups else {}
    found = measured(tmp_path, "gradients.db", "gradients", **space).probes()
    true = measured(tmp_path, "probes.db", "probes", **space).probes()
    assert set(found) == set(true)
    assert sum("gradient" not in v for v in found.values()) == 11, "the others are probed"
    for kind in ("u", "a"):  # schemes, and activation choices
        cells = [c for c, v in found.items() if c[1].startswith(kind) and "gradient" in v]
        own, wanted = ([of[c]["damage"] for c in cells] for of in (found, true))
        assert spearmanr(own, wanted).statistic > 0.85 and len(cells) > 10
        assert 0.3 < np.median(np.array(own) / wanted) < 3
    sketch, damage = (np.array([v[name] for v in found.values()]) for name in ("sketch", "damage"))
    assert np.square(sketch[:, :192]).sum(1) == pytest.approx(damage, rel=0.5), "squared lengths are damages"


def test_an_interrupted_one_continues_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    made: list[int] = []
    real = OutputErrors.outputs_of

    def counted(self: OutputErrors, samples: Any) -> torch.Tensor:
        if len(made) == 5 and not (tmp_path / "again").exists():
            raise Killed
        made.append(0)
        return real(self, samples)

    monkeypatch.setattr(OutputErrors, "outputs_of", counted)
    with pytest.raises(Killed):
        measured(tmp_path, "s.db", "gradients")
    (tmp_path / "again").touch()
    continued = measured(tmp_path, "s.db", "gradients").features()
    steps, parts = PROTOCOL.steps, gradient_damages.PARTS
    calls = 2 * steps * parts  # 8 samples are two micro-batches
    assert len(made) == calls + 1, "the pass that was broken off is made again, no other"
    whole = measured(tmp_path, "whole.db", "gradients").features()
    assert continued == whole
    before = len(made)
    assert before == 2 * calls + 1
    measured(tmp_path, "s.db", "gradients")
    assert len(made) == before


def test_sketches_become_changes_of_so_many_images() -> None:
    rows = np.arange(2 * 3 * 2 * 4, dtype=float).reshape(2, 3, 2, 4)  # steps, parts, passes, samples
    change = _by_sample(rows)
    assert change.shape == (12, 4)
    assert float(change.square().mean()) == pytest.approx(np.square(rows).mean())
    assert change[5].tolist() == [rows[s, 1, k, 1] for s in range(2) for k in range(2)]


def test_another_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="damages 'guesses' is unknown; it must be probes or gradients"):
        measured(tmp_path, "s.db", "guesses")


def test_a_study_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    study = Study(tmp_path / "s.db")
    options: dict[str, Any] = {"protocol": PROTOCOL, "space": SPACE, "bank": str(tmp_path / "bank")}
    study.set(damages="gradients")  # as one that was interrupted before it had any
    workflows.measure(tiny_pipeline("dit"), study, 0, **options)
    assert any("gradient" in v for v in study.features().values())


def test_calibrated_and_shared_schemes_are_sketched_too(tmp_path: Path) -> None:
    found = measured(tmp_path, "s.db", "gradients", schemes=["usq4h", "vq3", "aq1x4g8s"], activations=[8])
    own = found.probes()
    assert {c[1] for c, v in own.items() if "gradient" in v} >= {"usq4h", "vq3", "a8"}
    assert all(v["damage"] > 0 for v in own.values())
