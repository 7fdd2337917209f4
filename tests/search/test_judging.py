"""Judging: the best of a few candidates by paired values, with few measurements, and the seeds that it is
done on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from aquabit.quality import PAIRED
from aquabit.scheme import Protocol
from aquabit.search.judging import JUDGED_BLOCK, ROUNDS, judge, paired_metric, pieces
from aquabit.stats import paired_difference


class Panel:
    """Values [candidates, blocks] with a noise that all candidates of a block share, and a small one of
    their own; counts what is measured for the first time, as a study does."""

    def __init__(self, means: Sequence[float], seed: int, shared: float = 5.0, own: float = 0.1):
        rng = np.random.default_rng(seed)
        self.values = (
            np.array(means)[:, None]
            + shared * rng.normal(size=(1, ROUNDS[-1]))
            + own * rng.normal(size=(len(means), ROUNDS[-1]))
        )
        self.known: set[tuple[int, int]] = set()

    def __call__(self, candidates: Sequence[int], count: int) -> np.ndarray:
        self.known |= {(i, b) for i in candidates for b in range(count)}
        return self.values[list(candidates), :count].copy()


@pytest.mark.parametrize("rounds", [ROUNDS, (4, 8, 16)])
def test_the_best_is_found_nearly_always_and_with_half_of_the_measurements(rounds: tuple[int, ...]) -> None:
    right, spent, most, left = 0, [], 0, 8
    for before, count in pairwise((0, *rounds)):  # half of those that are left go on, while more than one is
        most, left = most + left * (count - before), max(2, -(-left // 2))
    for seed in range(200):
        means = np.random.default_rng([seed, 1]).permutation(8) * 0.2
        panel = Panel(means.tolist(), seed)
        found = judge(range(8), panel, rounds)
        right += found.winner == int(means.argmin())
        spent.append(len(panel.known))
        assert sum(found.blocks.values()) == len(panel.known) and set(found.blocks) == set(range(8))
    assert right >= 194, (
        "own noise of 0.1 in 8 blocks tells 0.2 in all but one of thousands; two blocks seldom lose the best"
    )
    assert max(spent) <= most <= 64 < 8 * rounds[-1]
    assert np.mean(spent) < most, "what is shown to be worse leaves earlier"


def test_what_is_clear_is_decided_in_the_first_round() -> None:
    panel = Panel([9.0, 1.0, 5.0, 7.0], 0)
    found = judge(range(4), panel, (4, 8, 16))
    assert found.winner == 1 and set(found.blocks.values()) == {4} and len(panel.known) == 16


def test_a_judgement_says_how_much_worse_the_others_are_on_common_blocks() -> None:
    panel = Panel([0.3, 0.0, 0.05, 0.2, 0.4], 4)
    found = judge(range(5), panel)
    winner = found.winner
    assert set(found.worse) == set(range(5)) - {winner} and found.blocks[winner] == max(found.blocks.values())
    for i, gap in found.worse.items():
        n = found.blocks[i]
        assert found.mean[i] == pytest.approx(panel.values[i, :n].mean())
        assert gap == paired_difference(list(panel.values[i, :n]), list(panel.values[winner, :n]))


def test_candidates_that_failed_lose() -> None:
    panel = Panel([0.0, 1.0, 2.0], 0)
    panel.values[0, 2] = np.nan
    found = judge(range(3), panel, (4, 8, 16))
    assert found.winner == 1 and found.mean[0] == np.inf and 0 not in found.worse and found.blocks[0] == 4
    late = Panel([0.0, 0.01, 9.0], 0, own=0.3)
    late.values[0, 6] = np.nan  # after the first round
    late.values[0, :4] = late.values[1, :4] - 0.01 * np.arange(-1, 3)
    found = judge(range(3), late, (4, 8, 16))
    assert found.winner == 1 and found.blocks[0] in (4, 8)
    gone = Panel([0.0, 1.0, 2.0], 0)
    gone.values[:] = np.nan
    found = judge([2, 0, 1], gone)
    assert found.winner == 2 and not found.worse, "all failed: the first that was named"


def test_ties_go_to_the_first_that_is_named() -> None:
    panel = Panel([1.0, 1.0, 1.0, 1.0], 0, own=0.0)
    for order in ([3, 1, 0, 2], [0, 2, 1, 3], [2]):
        found = judge(order, panel)
        assert found.winner == order[0]
        assert all(g.value == 0 for g in found.worse.values())
    twice = Panel([1.0, 0.0], 0)
    assert judge([0, 1, 0, 1], twice).winner == 1 and set(judge([0, 1, 0, 1], twice).blocks) == {0, 1}, (
        "named twice, judged once"
    )


def test_a_later_round_corrects_an_early_one() -> None:
    panel = Panel([0.0, 0.0], 0, own=0.0)
    panel.values[1, :4] += [0.5, -0.3, 0.4, -0.2]  # worse at first, within the noise
    panel.values[1, 4:] -= 1.0
    found = judge(range(2), panel, (4, 8))
    assert found.winner == 1 and found.blocks == {0: 8, 1: 8}, "the last two are told apart on all blocks"
    third = Panel([0.0, 0.0, 3.0], 0, own=0.0)
    third.values[1] = panel.values[1] - panel.values[0] + third.values[0]
    found = judge(range(3), third, rounds=(4, 8))
    assert found.winner == 1 and found.blocks == {0: 8, 1: 8, 2: 4}


# ---- seeds


def images(protocol: Protocol) -> set[int]:
    """The seeds of a protocol's images."""
    return set(range(protocol.seed, protocol.seed + protocol.images))


@pytest.mark.parametrize("count", [6, 8, 128, 1000])
def test_pieces_are_of_seeds_that_nothing_else_is_measured_on(count: int) -> None:
    protocol = Protocol(images=count, micro_batch=64, seed=3)
    made = [p for seed in (0, 1, 7) for p in pieces(protocol, ROUNDS[-1], seed)]
    every = [images(p) for p in made]
    assert len(set.union(*every)) == sum(map(len, every)), (
        "one image is never judged twice, nor for two seeds"
    )
    others = [protocol.block(b) for b in (0, 1, 3, 4, 5, 11, 12, 13, 14, 15)]
    assert not set.union(*every) & set.union(*map(images, others))
    assert {p.images for p in made} == {max(2, -(-count // 4))} and all(
        p.micro_batch <= p.images for p in made
    )
    assert images(pieces(protocol, 1)[0]) <= set(
        range(protocol.block(JUDGED_BLOCK).seed, protocol.block(JUDGED_BLOCK + 1).seed)
    )
    assert len({p.digest for p in made}) == len(made)


def test_more_pieces_begin_with_the_same_and_keep_what_is_measured() -> None:
    protocol = Protocol(images=10, steps=7, guidance=2.5, objective="psnr")
    assert pieces(protocol, ROUNDS[-1], 2)[:4] == pieces(protocol, 4, 2) and not pieces(protocol, 0)
    for p in pieces(protocol, 4):
        assert (p.steps, p.guidance, p.objective, p.reference, p.measures) == (
            7,
            2.5,
            "psnr",
            protocol.reference,
            protocol.measures,
        )


def test_pieces_cover_what_the_protocol_asks_for() -> None:
    prompts = tuple(f"prompt {i}" for i in range(16))
    protocol = Protocol(images=16, conditions=prompts)
    made = [
        (p.conditions or ())[i % len(p.conditions or ())]
        for p in pieces(protocol, 4)
        for i in range(p.images)
    ]
    assert set(made) == set(prompts)


def test_fidelity_is_the_objective_where_that_is_a_paired_distance() -> None:
    for metric in PAIRED:
        assert paired_metric(Protocol(objective=metric)) == metric
    for metric in ("fid", "kid", "is", "clip_score"):
        assert paired_metric(Protocol(objective=metric)) == "psnr"
    assert paired_metric(Protocol(objective="my.metrics:sharpness")) == "my.metrics:sharpness"
