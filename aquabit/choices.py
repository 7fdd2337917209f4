"""Choices: rows of configurations as arrays, beside the space that they index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from aquabit.scheme import (
    CODE_SHIFT,
    FP,
    Act,
    AquabitError,
    QuantConfig,
    Rounding,
    act_bits,
    act_code,
    act_of,
    rounding_of,
)
from aquabit.space import SearchSpace

Variant = Sequence[tuple[int, int]]  # (layer, scheme) indices: what a row has instead


@dataclass(frozen=True, eq=False)
class Choices:
    """``n`` configurations of a space, one a row.

    ``weights`` [n, layers] are indices into ``space.schemes``. ``acts`` [n, layers] are activation choices as
    whole numbers (``act_code``), which are read by ``group_codes``, ``group_bits`` and ``act_index``; equal
    numbers are equal choices. Raises AquabitError for arrays of other shapes.
    """

    space: SearchSpace
    weights: np.ndarray
    acts: np.ndarray

    def __post_init__(self) -> None:
        shape = self.weights.shape
        if len(shape) != 2 or shape[1] != len(self.space.choices) or self.acts.shape != shape:
            raise AquabitError(
                f"scheme indices {list(shape)} and activation choices {list(self.acts.shape)} must both be"
                f" [rows, {len(self.space.choices)} layers]"
            )

    @staticmethod
    def of(space: SearchSpace, configs: Iterable[QuantConfig]) -> Choices:
        """Configurations as rows. Raises AquabitError for one of another model, of other groups of steps, or
        with a scheme that no layer of the space may take."""
        column = space.columns
        weight_rows, act_rows = [], []
        for config in configs:
            space.check(config, extra_schemes=True, broken_ties=True)
            if config.steps not in (None, space.steps):
                raise AquabitError(
                    f"the configuration has other groups of steps ({config.steps}) than the space"
                    f" ({space.steps})"
                )
            picked = [config[layer] for layer in space.choices]
            missing = [str(p.weight) for p in picked if p.weight not in column]
            if missing:
                raise AquabitError(
                    f"scheme {missing[0]} is in no layer's choices; the space has"
                    f" {', '.join(map(str, space.schemes))}"
                )
            weight_rows.append([column[p.weight] for p in picked])
            act_rows.append([act_code(p.act) for p in picked])
        shape = (len(weight_rows), len(space.choices))
        weights, acts = (np.array(rows, int).reshape(shape) for rows in (weight_rows, act_rows))
        return Choices(space, weights, acts)

    @staticmethod
    def picked(
        space: SearchSpace, weights: np.ndarray, index: np.ndarray, activations: Sequence[Act]
    ) -> Choices:
        """Scheme indices, and activations as ``index`` [n, layers] into ``activations``."""
        return Choices(space, weights, _codes(activations)[index])

    @staticmethod
    def at(space: SearchSpace, weights: np.ndarray, act: Act) -> Choices:
        """Scheme indices [n, layers] with all activations at ``act``, those of excluded layers off."""
        off = np.array([row == (FP,) for row in space.choices.values()])
        return Choices.picked(space, weights, np.broadcast_to(off, weights.shape).astype(int), (act, 16))

    @staticmethod
    def concat(parts: Sequence[Choices]) -> Choices:
        """The rows of one or more, one after the other."""
        weights = np.concatenate([part.weights for part in parts])
        return Choices(parts[0].space, weights, np.concatenate([part.acts for part in parts]))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: int | slice | np.ndarray | Sequence[int]) -> Choices:
        """Some rows, by number, slice, index array or Boolean array; one number gives one row."""
        taken = [rows] if isinstance(rows, int | np.integer) else rows
        return Choices(self.space, self.weights[taken], self.acts[taken])

    def __iter__(self) -> Iterator[Choices]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Choices):
            return NotImplemented
        same = np.array_equal(self.weights, other.weights) and np.array_equal(self.acts, other.acts)
        return same and (self.space is other.space or self.space == other.space)

    __hash__ = None  # type: ignore[assignment]  # arrays can be changed

    def differs(self, other: Choices) -> np.ndarray:
        """Boolean [n, layers]: where rows have another choice than those of ``other``, which has as many
        rows or one."""
        return np.asarray((self.weights != other.weights) | (self.acts != other.acts))

    def apart(self, other: Choices) -> np.ndarray:
        """In how many layers rows differ from those of ``other`` (as many, or one), [n]; tied layers count
        as one."""
        return np.asarray((self.space.groups.sums(self.differs(other).T.astype(int)) > 0).sum(0))

    def under(self, variants: Sequence[Variant]) -> Choices:
        """All rows under the first variant, then all under the next: [variants x n, layers]."""
        changed = np.tile(self.weights, (len(variants), 1, 1))
        for k, variant in enumerate(variants):
            for layer, scheme in variant:
                changed[k, :, layer] = scheme
        acts = np.tile(self.acts, (len(variants), 1))
        return Choices(self.space, changed.reshape(-1, self.weights.shape[1]), acts)

    def configs(self) -> list[QuantConfig]:
        """The inverse of ``of``."""
        space, schemes = self.space, self.space.schemes

        def config(weights: np.ndarray, acts: np.ndarray) -> QuantConfig:
            picked = zip(space.choices, weights, acts, strict=True)
            return space.config({n: space.choice(n, schemes[w], act_of(int(a))) for n, w, a in picked})

        return [config(*row) for row in zip(self.weights, self.acts, strict=True)]

    @property
    def config(self) -> QuantConfig:
        """The configuration of a single row; raises ValueError for any other number of rows."""
        (only,) = self.configs()
        return only

    def moved(self, space: SearchSpace) -> Choices:
        """The same configurations as rows of another space, which has every scheme and the same layers and
        groups of steps."""
        if space is self.space:
            return self
        column = space.columns
        return Choices(space, np.array([column[s] for s in self.space.schemes])[self.weights], self.acts)

    @property
    def group_codes(self) -> np.ndarray:
        """Codes of the roundings in each group of steps, [n, layers, groups] (one group where there are
        none)."""
        code = np.asarray(self.acts, np.int64)[..., None]
        if self.space.steps is None:
            return code
        parts = code >> CODE_SHIFT * np.arange(len(self.space.steps.starts)) & (1 << CODE_SHIFT) - 1
        return np.where(code < 1 << CODE_SHIFT, code, parts)

    @property
    def group_bits(self) -> np.ndarray:
        """Activation bits in each group of steps, [n, layers, groups]."""
        return by_rounding(act_bits)[self.group_codes]

    @property
    def mean_bits(self) -> np.ndarray:
        """Activation bits averaged over the steps, [n, layers]."""
        return self.space.over_steps(self.group_bits)

    def act_index(self, activations: Sequence[Act]) -> np.ndarray:
        """Where in ``activations`` each choice stands (the first place of equal ones), [n, layers]; it must
        be there."""
        codes = _codes(activations)
        order = np.argsort(codes, kind="stable")
        return np.asarray(order[np.searchsorted(codes[order], self.acts)])


def by_group(act: Act, groups: int) -> tuple[Rounding, ...]:
    """An activation choice as the rounding in each of ``groups`` groups of steps."""
    return act if isinstance(act, tuple) else (act,) * groups


@cache
def by_rounding(value: Callable[[Rounding], float]) -> np.ndarray:
    """A value of each rounding by its code, [32]."""
    return np.array([value(rounding_of(code)) for code in range(1 << CODE_SHIFT)])


def in_order(activations: Iterable[Act]) -> tuple[Act, ...]:
    """Distinct activation choices, plain bits first, each kind rising: the order of columns of tables."""
    return tuple(sorted(set(activations), key=act_code))


def _codes(activations: Sequence[Act]) -> np.ndarray:
    return np.array([act_code(a) for a in activations], int)
