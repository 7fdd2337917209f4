"""Damages from gradients: what every scheme of every layer does alone, from a few backward passes and some
thirty probes.

A sketch knows what a change does to the denoiser's output at each step, but not what that does to the image:
one weight a step, fitted to the probes of CELLS (layer, scheme), says so (SCIENCE section 8). Rounded
activations have a factor of their own, fitted to ROUNDED probes: their errors differ from step to step, and
add up to less than those of weights, which are the same in all. The probes cost so many samplings, whatever
the number of layers and schemes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aquabit.measuring.evaluator import SketchedStep, sketch
from aquabit.measuring.output_errors import stored
from aquabit.measuring.pools import Pool
from aquabit.measuring.step_weights import MIN_CELLS, fit_step_weights
from aquabit.measuring.tasks import Fit, MeasureSketches
from aquabit.scheme import (
    FP,
    Act,
    LayerChoice,
    Progress,
    Protocol,
    QuantConfig,
    act_code,
    act_text,
    digest,
    no_progress,
)
from aquabit.space import SearchSpace
from aquabit.study import Study

PARTS = 2  # of the stored inputs, 8 trajectories each
PASSES = 2  # backward passes a step and part: samples differ more than signs do
CELLS = 24  # (layer, scheme) that are probed, for the weights of the steps
ROUNDED = 6  # (layer, activation bits) that are probed, for their factor
Cell = tuple[str, str]  # a layer and a scheme, or an activation choice as a8


@dataclass(frozen=True)
class _Steps:
    """Sketches of all recorded steps: for each a row of what its parts found."""

    found: Sequence[Sequence[SketchedStep]]

    def numbers(self, layer: str, name: str | Act, space: SearchSpace) -> np.ndarray:
        """[steps, parts, passes, samples] of a scheme, or of an activation choice, which may change between
        steps."""
        rows = []
        for parts in self.found:
            key = name if isinstance(name, str) else _bits_name(name, parts[0]["step"], space)
            rows.append([p["numbers"].get(layer, {}).get(key, [0.0] * p["width"]) for p in parts])
        return np.array(rows).reshape(len(rows), PARTS, PASSES, -1)


def _bits_name(act: Act, step: int, space: SearchSpace) -> str:
    """``a8``: what the inputs are rounded to in a step."""
    bits = act if isinstance(act, int) else act[space.steps.of(step)]  # type: ignore[union-attr]
    return f"a{bits}"


def add_gradient_damages(
    pool: Pool, study: Study, space: SearchSpace, protocol: Protocol, progress: Progress = no_progress
) -> None:
    """Give every (layer, scheme) and activation choice of the space that has none a damage and a sketch, as
    probes would (``Evaluator.fit``), marked by "gradient". All schemes must be fitted."""
    known = study.features()
    acts = [a for a in space.act_choices if a != 16]
    names: dict[Cell, str | Act] = {}
    for layer, row in space.choices.items():
        names |= {(layer, str(s)): str(s) for s in row if s != FP}
        names |= {(layer, act_text(a)): a for a in acts if row != (FP,)}
    missing = [cell for cell in names if "damage" not in known.get(cell, {})]
    if not missing:
        return
    steps = _sketched(pool, study, space, protocol, progress)
    numbers = {cell: steps.numbers(cell[0], name, space) for cell, name in names.items()}
    errors = {cell: np.square(rows).mean((1, 2, 3)) for cell, rows in numbers.items()}
    rounded = {cell for cell in names if cell[1] in map(act_text, acts)}
    probed = _probed(pool, study, space, protocol, errors, progress)
    weights = _weights(errors, {c: v for c, v in probed.items() if c not in rounded}, len(steps.found))
    ratios = [
        v / float(errors[c] @ weights) for c, v in probed.items() if c in rounded and errors[c] @ weights > 0
    ]
    factor = float(np.median(ratios)) if ratios else 1.0
    known = study.features()
    values = {}
    for cell in (c for c in missing if "damage" not in known.get(c, {})):
        own = weights * (factor if cell in rounded else 1.0)
        change = _by_sample(np.sqrt(own * len(own))[:, None, None, None] * numbers[cell])
        facts = {"damage": float(change.square().mean()), "sketch": sketch(change), "gradient": True}
        values[cell] = {**known.get(cell, {}), **facts}
    study.add_features(values)


def _weights(errors: Mapping[Cell, np.ndarray], probed: Mapping[Cell, float], steps: int) -> np.ndarray:
    """Weights of the steps; equal ones where too little is probed, in a space whose schemes do nothing."""
    if len(probed) < MIN_CELLS:
        return np.ones(steps)
    return fit_step_weights(np.array([errors[c] for c in probed]), np.array(list(probed.values())))


def _by_sample(rows: np.ndarray) -> torch.Tensor:
    """[steps, parts, passes, samples] as the changes [parts x samples, steps x passes] of so many images."""
    steps, parts, passes, samples = rows.shape
    return torch.from_numpy(rows).permute(1, 3, 0, 2).reshape(parts * samples, steps * passes).float()


def _sketched(pool: Pool, study: Study, space: SearchSpace, protocol: Protocol, progress: Progress) -> _Steps:
    """The sketches of all steps, from the study where it has them."""
    top = max(space.activations)
    layers = [k for k, row in space.choices.items() if row != (FP,)]
    like = QuantConfig(
        space.fingerprint,
        {k: LayerChoice(FP, top) for k in layers} if top != 16 else {},
        calibration=space.calibration,
    )
    choices = {k: tuple(str(s) for s in space.choices[k] if s != FP) for k in layers}
    bits = sorted({b for a in space.act_choices for b in ((a,) if isinstance(a, int) else a)} - {16})
    full = space.full_precision().digest
    calibration = None if space.calibration is None else space.calibration.digest
    about = [PASSES, protocol.micro_batch, choices, bits, calibration]
    found: dict[tuple[int, int], SketchedStep] = {}

    def key(place: int, part: int) -> str:
        return digest(["sketches", stored(protocol, part)[0].digest, place, *about])

    def take(wanted: list[tuple[int, int]], total: int) -> None:
        for at in wanted:
            before: Any = study.outputs(key(*at)).get(full)
            if before is not None:
                found[at] = before
        wanted = [at for at in wanted if at not in found]
        tasks = [MeasureSketches(choices, tuple(bits), protocol, *at, PASSES, like) for at in wanted]
        for place, value in pool.run(tasks):
            study.add_outputs(key(*wanted[place]), {full: dict(value)})
            found[wanted[place]] = value
            progress("gradients", len(found), total)

    progress("gradients", 0, 1)
    take([(0, 0)], 1)
    steps = range(found[0, 0]["steps"])
    take([(place, part) for part in range(PARTS) for place in steps], PARTS * len(steps))
    return _Steps([[found[place, part] for part in range(PARTS)] for place in steps])


def _probed(
    pool: Pool,
    study: Study,
    space: SearchSpace,
    protocol: Protocol,
    errors: Mapping[Cell, np.ndarray],
    progress: Progress,
) -> dict[Cell, float]:
    """Damages of CELLS (layer, scheme) and of ROUNDED (layer, activation choice), evenly over the ranks of
    their summed errors, by probes; what was probed before counts."""
    acts = tuple(sorted(space.activations, reverse=True))
    choices = {act_text(a): act_code(a) for a in space.act_choices if a != 16}
    schemes = [(k, str(s)) for k, row in space.choices.items() for s in row if s != FP and not s.shared]
    cells = _spread(schemes, errors, CELLS)
    rounded = _spread(
        [(k, a) for k, row in space.choices.items() if row != (FP,) for a in choices], errors, ROUNDED
    )
    known = study.features()

    def measured(cell: Cell) -> bool:
        return "damage" in known.get(cell, {}) and "gradient" not in known[cell]

    def task(layer: str, name: str) -> Fit:
        alone = ((), (choices[name],)) if name in choices else ((name,), ())
        return Fit({layer: alone[0]}, {layer: alone[1]}, acts, protocol, space.calibration, space.steps)

    tasks = [task(*c) for c in (*cells, *rounded) if not measured(c)]
    for done, (_, facts) in enumerate(pool.run(tasks), 1):
        study.add_features({(k, s): value for k, row in facts.items() for s, value in row.items()})
        progress("probing", done, len(tasks))
    known = study.features()
    found = {c: float(known[c]["damage"]) for c in (*cells, *rounded) if measured(c)}
    return {c: value for c, value in found.items() if value > 0}


def _spread(cells: Sequence[Cell], errors: Mapping[Cell, np.ndarray], count: int) -> list[Cell]:
    """``count`` of those that change anything, evenly over the ranks of their errors."""
    size = {c: float(errors[c].sum()) for c in cells}
    ranked = sorted((c for c in cells if size[c] > 0), key=lambda c: (-size[c], c))
    if len(ranked) <= count:
        return ranked
    return [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))]
