"""Groups: layers that choose together, as numbers. Searches work on one row for each group, whose costs and
damages are the sums over its members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aquabit.ties import Tied


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each of L layers, ``index`` [L], and the place of each of G groups' first layer, ``first``
    [G], which rises; without ties both count the layers."""

    index: np.ndarray
    first: np.ndarray

    @staticmethod
    def of(layers: Sequence[str], tied: Tied) -> Groups:
        leader = {member: group[0] for group in tied for member in group}
        heads = dict.fromkeys(leader.get(name, name) for name in layers)
        number, place = {name: i for i, name in enumerate(heads)}, {k: i for i, k in enumerate(layers)}
        index = [number[leader.get(name, name)] for name in layers]
        return Groups(np.array(index, int), np.array([place[name] for name in heads], int))

    @property
    def alone(self) -> bool:
        """Whether nothing is tied."""
        return len(self.index) == len(self.first)

    def members(self, group: int) -> list[int]:
        """The places of a group's layers."""
        return [int(i) for i in np.flatnonzero(self.index == group)]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Values [L, ...] added up over the members of each group, [G, ...]."""
        if self.alone:
            return values
        total = np.zeros((len(self.first), *values.shape[1:]), values.dtype)
        np.add.at(total, self.index, values)
        return total
