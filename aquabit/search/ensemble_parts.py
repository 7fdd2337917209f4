"""What a bound knows of a surrogate: which features are sums over layers, and the leaves of its trees."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.sensitivity.features import Encoder


@dataclass(frozen=True)
class FeatureSum:
    """A feature that is ``outer`` (rising) of a sum over layers of ``parts`` [L, C] of their choices;
    ``layers`` [k] are those that it depends on. ``concave`` from ``concave_from`` on."""

    layers: np.ndarray
    parts: np.ndarray
    outer: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[float], float]
    slope: Callable[[np.ndarray], np.ndarray] | None = None  # None: it is the sum itself
    concave_from: float = 0.0


def feature_sums(encoder: Encoder, each: Choices) -> list[FeatureSum | None]:
    """What each feature is of the choices that ``each`` (C rows) gives the layers; None for a kind that is
    not such a sum.

    This is the table of kinds for features of several layers. A new kind has a row here, or nothing is known
    of it: the trees that split on it may give any of their leaves, and where the ridge has a weight for it
    there is no bound. Features of one layer need no row.
    """
    weights, floor = each.weights.T, encoder.FLOOR
    rows = np.arange(len(weights))[:, None]
    low, order = (part.T for part in encoder.activation_reduction(each.group_codes))
    tables = {
        "error": encoder.error[rows, weights],
        "low": low,
        "order": order,
        "bits": encoder.bits[rows, weights] * encoder.size_share[:, None],
    }
    if encoder.probed:
        tables["damage"] = encoder.damages(each).T
        tables["root"] = np.sqrt(tables["damage"])

    def log(table: str, layers: np.ndarray, mean: bool = False, add: float = 0.0) -> FeatureSum:
        parts = tables[table] / (len(layers) if mean else 1)
        return FeatureSum(
            layers,
            parts,
            lambda s: np.log10(s + add),
            lambda f: float(10.0**f - add),
            lambda s: 1 / (np.log(10) * (s + add)),
        )

    def plain(table: str, layers: np.ndarray, mean: bool = False) -> FeatureSum:
        return FeatureSum(layers, tables[table] / (len(layers) if mean else 1), np.asarray, float)

    def roots(layers: np.ndarray) -> FeatureSum:
        return FeatureSum(
            layers,
            tables["root"],
            lambda s: np.log10(s**2 + floor),
            lambda f: float(np.sqrt(max(10.0**f - floor, 0.0))),
            lambda s: 2 * s / (np.log(10) * (s**2 + floor)),
            concave_from=floor**0.5,
        )

    kinds: dict[str, Callable[[np.ndarray], FeatureSum]] = {
        "error": lambda k: log("error", k, mean=True),
        "actshare": lambda k: plain("low", k, mean=True),
        "bits": lambda k: plain("bits", k),
        "ordershare": lambda k: plain("order", k, mean=True),
        "damage": lambda k: log("damage", k, add=floor),
    }
    found: list[FeatureSum | None] = []
    for name, members in zip(encoder.columns, encoder.members, strict=True):
        make = roots if name == "damage:roots" else kinds.get(name.split(":")[0])
        found.append(None if make is None or len(members) == 1 else make(np.array(members)))
    return found


def own_values(encoder: Encoder, each: Choices) -> tuple[np.ndarray, np.ndarray]:
    """The layer [F] that alone decides each feature, -1 where there is none, and the values [F, C] at its
    choices: as encoded."""
    values, (count, layers) = encoder(each), each.weights.shape
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(count), (layers, 1)), axis=1)
    rows = np.arange(layers)[:, None]
    mixed = encoder(Choices(each.space, each.weights.T[rows, shuffled].T, each.acts.T[rows, shuffled].T))
    layer = np.full(len(encoder.columns), -1)
    for f, members in enumerate(encoder.members):
        if len(members) == 1 and np.array_equal(values[shuffled[members[0]], f], mixed[:, f], equal_nan=True):
            layer[f] = members[0]
    return layer, values.T


@dataclass(frozen=True)
class Leaves:
    """Leaves of all trees: ``tree`` [N], ``value`` [N] (divided by the number of averaged boosters); and the
    splits: ``feature``, ``threshold`` [S], with the pairs (split, leaf) of the leaves to the ``left``
    (feature < threshold) and to the ``right``.
    """

    tree: np.ndarray
    value: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @staticmethod
    def of(boosters: list[Any]) -> Leaves:
        tree, value, feature, threshold = list[int](), list[float](), list[int](), list[float]()
        left, right = list[tuple[int, int]](), list[tuple[int, int]]()

        def walk(body: dict[str, Any], node: int, number: int, share: float) -> list[int]:
            if body["left_children"][node] < 0:
                tree.append(number)
                value.append(share * float(body["split_conditions"][node]))
                return [len(tree) - 1]
            split = len(feature)
            feature.append(int(body["split_indices"][node]))
            threshold.append(float(np.float32(body["split_conditions"][node])))
            below = [
                walk(body, body[side][node], number, share) for side in ("left_children", "right_children")
            ]
            left.extend((split, leaf) for leaf in below[0])
            right.extend((split, leaf) for leaf in below[1])
            return [*below[0], *below[1]]

        number = 0
        for booster in boosters:
            for body in json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]["trees"]:
                walk(body, 0, number, 1 / len(boosters))
                number += 1
        pairs = (np.array(p, int).reshape(-1, 2) for p in (left, right))
        return Leaves(
            np.array(tree, int), np.array(value), np.array(feature, int), np.array(threshold), *pairs
        )
