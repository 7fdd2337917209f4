"""The first answer of a run: from gradients alone, before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aquabit import workflows
from aquabit.measuring.session import Session, open_session
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.sketches import Sketches
from aquabit.measuring.where import Where
from aquabit.reports import report
from aquabit.scheme import FP, Protocol, QuantConfig, Scheme
from aquabit.search.first_answer import FirstAnswer, damage_answer, plain_space, quick_answer
from aquabit.sensitivity.damages import Damages
from aquabit.space import SearchSpace
from aquabit.study import Study
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(images=4, steps=2, micro_batch=4)
SPACE: dict[str, Any] = {"schemes": ["usq4h", "usq2h"], "activations": [8]}


class Stop(Exception):
    pass


def looked(folder: Path, bits: float = 5.0, **space: Any) -> tuple[Study, list[FirstAnswer | None]]:
    """A study of the tiny DiT in which nothing was fitted for its own space yet, and its first answer."""
    study, found = Study(folder / "s.db"), list[FirstAnswer | None]()

    def early(session: Session) -> None:
        found.append(quick_answer(session, bits))
        assert not study.features(), "the space's own schemes are fitted later"
        raise Stop

    options = MeasureOptions(PROTOCOL, SPACE | space)
    with (
        pytest.raises(Stop),
        open_session(tiny_pipeline("dit"), study, options, Where(bank=str(folder / "bank")), early=early),
    ):
        raise AssertionError("not reached")
    return study, found


def test_it_ranks_layers_and_chooses_within_the_budget_before_anything_is_fitted(tmp_path: Path) -> None:
    study, [found] = looked(tmp_path)
    assert found is not None and found.config is not None and found.bits is not None
    assert found.bits <= 5.0 and len(study.measurements(failed=True)) == 0
    damages = [row.damage for row in found.ranking]
    assert damages == sorted(damages, reverse=True) and damages[0] > 0
    config = QuantConfig.from_dict(found.config)
    assert {c.weight.kind for c in config.layers.values()} == {"usq"}
    assert len({str(c.weight) for c in config.layers.values()}) > 1, "it mixes formats"
    assert FirstAnswer.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_budget_out_of_reach_of_plain_formats_leaves_the_ranking(tmp_path: Path) -> None:
    _, [found] = looked(tmp_path, bits=1.2)
    assert found is not None and found.config is None and found.ranking
    assert found.text.endswith("1.2 bits a weight are out of reach of these formats")


def test_where_gradients_do_not_tell_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Sketches, "__call__", refused)
    assert looked(tmp_path)[1] == [None]


def test_pinned_and_excluded_layers_stay(tmp_path: Path) -> None:
    study, _ = looked(tmp_path, pinned={"*attn1.to_q": "usq4h"}, excluded=["*to_k"])
    own = SearchSpace.from_dict(study.get("space"))
    plain = plain_space(own).choices
    assert all(row == (Scheme.parse("usq4"),) for k, row in plain.items() if k.endswith("attn1.to_q"))
    assert all(row == (FP,) for k, row in plain.items() if k.endswith("to_k"))


def test_the_page_can_be_opened_from_the_start_and_is_improved(tmp_path: Path) -> None:
    study, [found] = looked(tmp_path)
    assert found is not None
    study.set(first=found.to_dict(), running="fitting every format, and gradients")
    page = report(study, tmp_path / "report").read_text()
    assert "This run goes on: fitting every format, and gradients comes next" in page
    assert "aquabit explain" not in page, "nobody need ask for what the run makes"
    assert found.ranking[0].layer in page and "predicted from gradients alone" in page
    options: dict[str, Any] = {"protocol": PROTOCOL, "space": SPACE, "bank": str(tmp_path / "bank")}
    workflows.measure(tiny_pipeline("dit"), study, 0, **options)
    with open_session(tiny_pipeline("dit"), study, where=Where(bank=str(tmp_path / "bank"))) as session:
        better = damage_answer(session, 5.0)
        damages = Damages.of(session.space, study.features())
    assert "is predicted from gradients, to first order" in report(study, tmp_path / "report").read_text()
    assert better.formats == "all formats of the space" and better.swap == "usq4h:usq2h"
    top, columns = better.ranking[0], session.space.columns
    row = damages.weights[session.space.layers.index(top.layer)]
    high, low = (columns[Scheme.parse(s)] for s in ("usq2h", "usq4h"))
    assert top.damage == pytest.approx(row[high] - row[low])
    assert np.isfinite(better.psnr or np.nan)


def test_a_study_of_probes_says_so_and_takes_no_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sketches, "__call__", None)
    options = MeasureOptions(PROTOCOL, SPACE, damages="probes")
    looked_at: list[FirstAnswer | None] = []

    def early(session: Session) -> None:
        looked_at.append(quick_answer(session, 5.0))

    where = Where(bank=str(tmp_path / "bank"))
    with open_session(tiny_pipeline("dit"), Study(tmp_path / "s.db"), options, where, early=early) as session:
        found = damage_answer(session, 5.0)
    assert looked_at == [None] and found.source == "probes" and "predicted from probes alone" in found.text
