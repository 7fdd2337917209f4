"""Judging: which of a few configurations is best, by paired distances on common seeds, with few images for
many and many for few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from aquabit.quality import PAIRED  # distances to full-precision images of the same seeds
from aquabit.scheme import Protocol
from aquabit.stats import Interval, paired_difference

# a protocol's images are judged in so many blocks: differences between blocks say how noisy a difference is
PIECES = 4
# blocks that the candidates of each round are judged on; about half of them go on to the next
ROUNDS = (2, 4, 8, 16)
# block of fresh seeds that judging takes its images from; block 1 belongs to validation, 11 and up to reports
JUDGED_BLOCK = 2
SEEDS_APART = 1000  # blocks between those of two seeds of the search
# a mean of logarithms: a few images that turned into others do not rule it, as they rule the mean squared
# error
FIDELITY = "psnr"

# (candidates [n], blocks k) -> values [n, k] on the first k blocks, larger = worse
Measure = Callable[[Sequence[int], int], np.ndarray]


def paired_metric(protocol: Protocol) -> str:
    """The metric that tells configurations apart: the objective where it is a paired distance (one of
    ours, or a user's function, which sees full-precision images too), else FIDELITY."""
    return protocol.objective if protocol.objective in PAIRED or ":" in protocol.objective else FIDELITY


def pieces(
    protocol: Protocol, count: int, seed: int = 0, conditions: Sequence[str | int] | None = None
) -> list[Protocol]:
    """The first ``count`` blocks that judging uses: small ones, on image seeds that nothing else is measured
    on, others for each ``seed``. ``conditions`` are the protocol's prompts or classes (default: those it
    names): a block goes on where the last one ended, and so with pictures.
    """
    size = max(2, ceil(protocol.images / PIECES))
    block = protocol.block(JUDGED_BLOCK + SEEDS_APART * seed)
    asked = conditions or protocol.conditions

    def of(i: int) -> tuple[str | int, ...] | None:
        return None if asked is None else tuple(asked[(i * size + k) % len(asked)] for k in range(size))

    small = replace(block, images=size, micro_batch=min(size, protocol.micro_batch))
    blocks = [replace(small, seed=block.seed + i * size, conditions=of(i)) for i in range(count)]
    if protocol.inputs is None:
        return blocks
    return [
        replace(b, inputs=protocol.inputs.turned(range(i * size, (i + 1) * size)))
        for i, b in enumerate(blocks)
    ]


@dataclass(frozen=True)
class Judgement:
    """The ``winner`` (an index of the candidates), and for each candidate that was judged: its ``mean``
    (larger = worse), the number of ``blocks`` it was judged on, and how much worse it is than the winner on
    the blocks that both were judged on (95 % interval).
    """

    winner: int
    mean: dict[int, float]
    blocks: dict[int, int]
    worse: dict[int, Interval]


def judge(candidates: Sequence[int], measure: Measure, rounds: Sequence[int] = ROUNDS) -> Judgement:
    """Successive halving: all candidates on a few blocks, the better half on more, until one is left or the
    rounds are.

    In every round those stay that are among the better half and not shown to be worse than the best (95 %
    paired interval above 0). The winner has the least mean of the last round; ties go to the candidate named
    first. Values that are NaN count as worst.
    """
    alive = list(dict.fromkeys(candidates))
    values: dict[int, np.ndarray] = {}
    for number, count in enumerate(rounds):
        found = np.asarray(measure(alive, count), float)
        found = np.where(np.isnan(found), np.inf, found)
        values |= dict(zip(alive, found, strict=True))
        alive = sorted(alive, key=lambda i: (values[i].mean(), candidates.index(i)))
        if len(alive) == 1 or number == len(rounds) - 1:
            break
        best = values[alive[0]]
        shown = [
            i
            for i in alive[1:]
            if not np.isfinite(values[i]).all() or paired_difference(list(values[i]), list(best)).low > 0
        ]
        # two stay for all blocks
        alive = [i for i in alive if i not in shown][: max(2, ceil(len(alive) / 2))]
        if len(alive) == 1:
            break
    winner = alive[0]
    worse = {}
    for i, own in values.items():
        common = min(len(own), len(values[winner]))
        if i != winner and np.isfinite(own).all():
            worse[i] = paired_difference(list(own[:common]), list(values[winner][:common]))
    return Judgement(
        winner, {i: float(v.mean()) for i, v in values.items()}, {i: len(v) for i, v in values.items()}, worse
    )
