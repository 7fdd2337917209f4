"""Which measurements belong together because they share a context: to be drawn, and held out, as one."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from aquabit.choices import Choices

# configurations belong together where at most two layers differ, in small spaces at most one in eight
SHARE = 8


def group_numbers(choices: Choices) -> np.ndarray:
    """A group number from 0 for each row, in the order of first appearance.

    Two swaps of one context differ from each other in two layers; independent draws differ in most, and each
    is a group of its own.
    """
    most = min(2, len(choices.space.groups.first) // SHARE)
    near = [np.flatnonzero(choices.apart(row) <= most) for row in choices]
    rows = np.repeat(np.arange(len(near)), [len(n) for n in near])
    columns = np.concatenate(near) if near else rows
    _, label = connected_components(
        csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(near), len(near))), directed=False
    )
    _, first, number = np.unique(label, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[number])
