"""Some hundred hostile inputs for everything that reads; ``benchmarks/robustness.py`` runs as many as one
wants. None may end in an internal error, a wrong number or a hang."""

from __future__ import annotations

import pytest

from tests.fuzzing import ACCEPTED, REFUSED, outcome, targets

CASES = 400  # of a target; fewer of those that take long


@pytest.mark.parametrize("name", list(targets()))
def test_hostile_input_is_refused_in_a_sentence_or_means_what_it_says(name: str) -> None:
    target = targets()[name]
    found = {n: outcome(target, n) for n in range(round(CASES * min(target.share, 1.0)))}
    bad = {n: o for n, o in found.items() if o.kind not in (ACCEPTED, REFUSED)}
    assert not bad, bad
    if name not in ("noise statistics", "artifact") and not name.startswith(
        "one bit"
    ):  # whose every change is noticed
        assert ACCEPTED in {o.kind for o in found.values()}, "what is mutated was no good input"


KNOWN = {  # cases that were faults once
    "scheme": (12438, 31837, 32915),
    "swap, correction, design, shape": (51652,),
    "one bit of a study": (4272, 7639),
    "contradicting weights": (9222,),
}


@pytest.mark.parametrize(("name", "number"), [(n, i) for n, row in KNOWN.items() for i in row])
def test_what_was_a_fault_is_none(name: str, number: int) -> None:
    found = outcome(targets()[name], number)
    assert found.kind in (ACCEPTED, REFUSED), found
