"""Which additive formats are worth their fit, once the others are fitted: what uniform formats do in a layer
says what an error does there, the rate-distortion function what error a format leaves, and the budget what a
byte is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.layer_formats import expected_loss
from aquabit.scheme import FP, Scheme
from aquabit.space import SearchSpace

# relative squared error of the best uniform quantizer of Gaussian weights, by bits (Max 1960, table II)
UNIFORM_ERROR = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.0115, 5: 0.00349, 6: 0.00104, 7: 3.04e-4, 8: 8.69e-5}
REACH = 0.25  # bits per weight around the budget at which a format may be wanted: contexts lie as near
DOUBT = 1.5  # better than expected by this factor; chosen on digits-unet, where half are wrong by no more
PRICES = 25  # of a byte, between the two ends of REACH

Features = Mapping[tuple[str, str], Mapping[str, Any]]


def worth_fitting(space: SearchSpace, costs: CostModel, features: Features, bits: float) -> SearchSpace:
    """The space without the additive formats that no configuration within REACH of ``bits`` per weight is
    expected to want: at every price of a byte between, something else does less in their layer, even were
    they DOUBT times better than expected.

    ``features`` have the damages of the formats that are not additive; layers without one of these keep what
    they have.
    """
    groups = space.groups
    expected = groups.sums(expected_damages(space, features))
    sizes = groups.sums(costs.bytes.astype(float))
    wanted = np.zeros(expected.shape, bool)
    for price in _prices(space, costs, expected, bits):
        cost = expected + price * sizes
        wanted |= expected / DOUBT + price * sizes <= cost.min(1, keepdims=True)
    column = space.columns
    choices = {
        layer: tuple(s for s in row if not s.additive or wanted[groups.index[i], column[s]])
        for i, (layer, row) in enumerate(space.choices.items())
    }
    return replace(space, choices={k: row or space.choices[k] for k, row in choices.items()})


def expected_damages(space: SearchSpace, features: Features) -> np.ndarray:
    """[layers, schemes of the space]: what each scheme does alone, known or, of additive formats, expected:
    between the uniform formats of the layer a power of the error, beyond them in proportion to it. 0 where a
    layer has no uniform format to tell by; infinite where it may not take a scheme."""
    found, column = np.full((len(space.choices), len(space.schemes)), np.inf), space.columns
    for i, (layer, row) in enumerate(space.choices.items()):
        damages = {s: features.get((layer, str(s)), {}).get("damage") for s in row}
        known = {s: max(float(d), 1e-30) for s, d in damages.items() if d is not None}
        uniform = [s for s in known if s.record.even and s.code_bits(1) in UNIFORM_ERROR]
        points = sorted((log(UNIFORM_ERROR[int(s.code_bits(1))]), log(known[s])) for s in uniform)
        for scheme in row:
            if scheme == FP or (scheme not in known and not points):
                value = 0.0
            elif scheme in known:
                value = known[scheme]
            else:
                area = (space.kernel_area or {}).get(layer, 1)
                value = _between(points, log(expected_error(scheme, area)))
            found[i, column[scheme]] = value
    return found


def expected_error(scheme: Scheme, kernel_area: int) -> float:
    """Relative squared error that an additive format leaves on Gaussian weights."""
    return expected_loss(scheme) * float(4.0 ** -scheme.code_bits(kernel_area))


def _between(points: list[tuple[float, float]], error: float) -> float:
    errors, damages = zip(*points, strict=True)
    inside = float(np.interp(error, errors, damages))
    return float(np.exp(inside + max(0.0, error - errors[-1]) + min(0.0, error - errors[0])))


def _prices(space: SearchSpace, costs: CostModel, expected: np.ndarray, bits: float) -> np.ndarray:
    """Prices of a byte at which the least sum of damage and price has within REACH of ``bits`` per weight."""
    act, groups = space.closest_act, space.groups
    sizes = groups.sums(costs.bytes.astype(float))

    def size(price: float) -> float:
        chosen = (expected + price * sizes).argmin(1)[groups.index]
        return float(costs.totals(Choices.at(space, chosen[None], act))["bits"][0])

    finite = expected[np.isfinite(expected) & (expected > 0)]
    if not finite.size:
        return np.zeros(1)
    grid = float(finite.max()) / max(1.0, float(sizes[sizes > 0].min())) * np.logspace(-16, 0, 400)
    reached = np.array([size(price) for price in grid])
    near = np.abs(reached - bits) <= REACH
    if not near.any():
        return grid[[int(np.argmin(np.abs(reached - bits)))]]
    return np.geomspace(grid[near][0], grid[near][-1], PRICES)
