"""Damages from gradients beside those from probes, on a model of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from torch import Tensor

from aquabit import workflows
from aquabit.measuring import gradient_damages
from aquabit.measuring.damage_scores import damage_score
from aquabit.measuring.fitting import SCORED, source_of
from aquabit.measuring.sketches import Sketches
from aquabit.quant.calibration.fitting import CALIBRATED_FITS
from aquabit.scheme import AquabitError, Protocol
from aquabit.study import Study
from tests.conftest import tiny_pipeline
from tests.tiny_pipelines import tiny

PROTOCOL = Protocol(images=4, steps=4, micro_batch=4)
SPACE = {"schemes": ["usq8", "usq4", "usq3", "usq2"], "activations": [8, 6]}


def measured(folder: Path, name: str, damages: str, **space: Any) -> Study:
    study = Study(folder / name)
    options: dict[str, Any] = {"protocol": PROTOCOL, "space": SPACE | space, "bank": str(folder / "bank")}
    workflows.measure(tiny_pipeline("dit"), study, 0, damages=damages, **options)
    return study


@pytest.mark.parametrize(
    "space",
    [{}, {"step_groups": {"total": 4, "starts": [0, 2]}}, {"activations": [8, "i8", "f8", 6]}],
    ids=["bits", "steps", "kinds"],
)
def test_they_rank_as_probes_do(tmp_path: Path, space: dict[str, Any]) -> None:
    found = measured(tmp_path, "gradients.db", "gradients", **space).probes()
    true = measured(tmp_path, "probes.db", "probes", **space).probes()
    assert set(found) == set(true) and all("gradient" in v for v in found.values())
    for kind in ("u", "aif"):  # schemes, and activation choices
        cells = [c for c in found if c[1][0] in kind]
        own, wanted = ([of[c]["damage"] for c in cells] for of in (found, true))
        assert spearmanr(own, wanted).statistic > 0.9 and len(cells) > 10
        assert 0.5 < np.median(np.array(own) / wanted) < 2
    sketch, damage = (np.array([v[name] for v in found.values()]) for name in ("sketch", "damage"))
    assert np.square(sketch[:, :192]).sum(1) == pytest.approx(damage, rel=0.5), "squared lengths are damages"


def test_an_interrupted_one_continues_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    made: list[int] = []
    real = Sketches.__call__

    def counted(self: Sketches, *given: Any) -> Any:
        if len(made) == 3 and not (tmp_path / "again").exists():
            raise Killed
        made.append(0)
        return real(self, *given)

    monkeypatch.setattr(Sketches, "__call__", counted)
    with pytest.raises(Killed):
        measured(tmp_path, "s.db", "gradients")
    (tmp_path / "again").touch()
    continued = measured(tmp_path, "s.db", "gradients").features()
    tasks = gradient_damages.IMAGES // PROTOCOL.micro_batch
    assert len(made) == tasks == 4
    assert continued == measured(tmp_path, "whole.db", "gradients").features()
    measured(tmp_path, "s.db", "gradients")
    assert len(made) == 2 * tasks


def test_another_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="damages 'guesses' is unknown; it must be probes or gradients"):
        measured(tmp_path, "s.db", "guesses")


def test_a_study_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    study = Study(tmp_path / "s.db")
    options: dict[str, Any] = {"protocol": PROTOCOL, "space": SPACE, "bank": str(tmp_path / "bank")}
    study.set(damages="gradients")  # as one that was interrupted before it had any
    workflows.measure(tiny_pipeline("dit"), study, 0, **options)
    assert any("gradient" in v for v in study.features().values())
    assert "from gradients, to first order" in " ".join(study.get("family_notes"))


def test_where_damages_come_from(tmp_path: Path) -> None:
    study = Study(tmp_path / "s.db")
    assert source_of(None, None) == source_of(study, None) == "gradients"
    assert source_of(study, "probes") == "probes"
    study.set(fingerprint="f")  # of before there were gradients
    assert source_of(study, None) == source_of(study, "probes") == "probes"
    with pytest.raises(AquabitError, match="begun with --damages probes, not gradients"):
        source_of(study, "gradients")


def test_calibrated_and_shared_schemes_are_sketched_too(tmp_path: Path) -> None:
    found = measured(tmp_path, "s.db", "gradients", schemes=["usq4h", "vq3", "aq1x4g8s"], activations=[8])
    own = found.probes()
    assert {c[1] for c, v in own.items() if "gradient" in v} >= {"usq4h", "vq3", "a8"}
    assert all(v["damage"] > 0 for v in own.values())


@pytest.mark.parametrize(("name", "dtype"), [("sd3", "float32"), ("pixart-sigma", "bfloat16")])
def test_pipelines_of_text_with_guidance(name: str, dtype: str, tmp_path: Path) -> None:
    protocol = Protocol(
        images=2, steps=2, micro_batch=2, guidance=5.0, objective="mse", conditions=("a", "b c")
    )
    found = {}
    for damages in ("gradients", "probes"):
        study = Study(tmp_path / f"{damages}.db")
        space = {"schemes": ["usq6", "usq3"], "activations": [8]}
        options: dict[str, Any] = {"protocol": protocol, "space": space, "bank": str(tmp_path / "bank")}
        workflows.measure(tiny(name), study, 0, damages=damages, dtype=dtype, **options)
        found[damages] = study.probes()
    cells = [c for c, v in found["probes"].items() if c[1] != "a8" and v["damage"] > 1e-12]
    own, true = ([found[s][c]["damage"] for c in cells] for s in ("gradients", "probes"))
    assert spearmanr(own, true).statistic > (0.95 if dtype == "float32" else 0.5) and len(cells) > 20


def test_where_no_gradient_passes_everything_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("element 0 of tensors does not require grad. More words")

    monkeypatch.setattr(Sketches, "__call__", refused)
    study = measured(tmp_path, "refused.db", "gradients", schemes=["usq4"])
    assert study.probes() == measured(tmp_path, "probes.db", "probes", schemes=["usq4"]).probes()
    [note] = study.get("family_notes")
    assert note.endswith("(no gradient passes the pipeline (element 0 of tensors does not require grad)).")


def test_a_layer_whose_gradient_is_not_finite_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, layer = Sketches.hear, "transformer_blocks.0.attn1.to_q"

    def hear(self: Sketches, name: str, x: Tensor, slope: Tensor, step: int) -> None:
        real(self, name, x, slope * float("inf") if (name, step) == (layer, 1) else slope, step)

    monkeypatch.setattr(Sketches, "hear", hear)
    study = measured(tmp_path, "s.db", "gradients", schemes=["usq4"])
    found, probed = study.probes(), measured(tmp_path, "p.db", "probes", schemes=["usq4"]).probes()
    assert {k for (k, _), v in found.items() if "gradient" not in v} == {layer}
    assert found[layer, "usq4"] == probed[layer, "usq4"] and found[layer, "a8"] == probed[layer, "a8"]
    assert f"do not: layer {layer} (its gradient is not finite in step 1)." in study.get("family_notes")[1]


def test_some_are_probed_too_and_the_study_says_how_true_gradients_are(tmp_path: Path) -> None:
    study = measured(tmp_path, "s.db", "gradients")
    true = measured(tmp_path, "p.db", "probes").probes()
    both = {cell: v for cell, v in study.features().items() if "probed" in v}
    assert len(both) == SCORED and all(v["probed"] == true[cell]["damage"] for cell, v in both.items())
    score = damage_score(study.features())
    assert score is not None and score.count == SCORED
    expected = spearmanr([v["damage"] for v in both.values()], [v["probed"] for v in both.values()]).statistic
    assert score.srcc == pytest.approx(expected) and score.low < score.ratio < score.high
    assert (
        f"24 that were probed too have a rank correlation of {score.srcc:.2f}" in study.get("family_notes")[0]
    )


def test_a_study_of_other_calibrated_fits_says_so(tmp_path: Path) -> None:
    study = measured(tmp_path, "s.db", "gradients", schemes=["usq4h"], activations=[8])
    assert study.get("calibrated_fits") == CALIBRATED_FITS
    assert not any("another version" in n for n in study.get("family_notes"))
    study.set(calibrated_fits=CALIBRATED_FITS - 1)
    measured(tmp_path, "s.db", "gradients", schemes=["usq4h"], activations=[8])
    assert sum("another version" in n for n in study.get("family_notes")) == 1
    assert study.get("calibrated_fits") == CALIBRATED_FITS - 1, "what was measured stays what it is"
