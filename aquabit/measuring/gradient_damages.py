"""Damages from gradients: what every scheme of every layer does alone, from a few backward passes through the
sampler (``sketches``), whatever the number of layers and schemes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from aquabit.measuring.evaluator import PROBE_IMAGES, SKETCH_SEED, sketch
from aquabit.measuring.pools import Pool
from aquabit.measuring.tasks import MeasureSketches
from aquabit.scheme import FP, LayerChoice, Progress, Protocol, QuantConfig, act_text, digest, no_progress
from aquabit.space import SearchSpace
from aquabit.study import Study

IMAGES = 16  # that gradients pass through; images differ more than signs do
PASSES = 4  # backward passes through them


def add_gradient_damages(
    pool: Pool, study: Study, space: SearchSpace, protocol: Protocol, progress: Progress = no_progress
) -> None:
    """Give every (layer, scheme) and activation choice of the space that has none a damage and a sketch, as
    probes would (``Evaluator.probe``), marked by "gradient". All schemes must be fitted. Layers that no
    gradient tells of get none; the study's fact "untold" says why."""
    known = study.features()
    missing = [cell for cell in space.cells() if "damage" not in known.get(cell, {})]
    if not missing:
        return
    found, untold = gradient_features(pool, study, space, protocol, progress)
    if untold:
        study.set(untold={**(study.get("untold") or {}), **untold})
    study.add_features({c: {**known.get(c, {}), **found[c]} for c in missing if c in found})


def gradient_features(
    pool: Pool,
    study: Study,
    space: SearchSpace,
    protocol: Protocol,
    progress: Progress = no_progress,
    images: int = IMAGES,
    passes: int = PASSES,
    what: str = "gradients",
) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, str]]:
    """(layer, scheme or activation choice) -> "damage", "sketch", "gradient", from ``passes`` backward passes
    through ``images``; and the layers that no gradient tells of, with the reason. The study keeps what each
    pass found, so that nothing is done twice."""
    parts = _sketched(pool, study, space, protocol, progress, images, passes, what)
    untold: dict[str, str] = {k: why for part in parts for k, why in part["untold"].items()}
    values = {}
    for layer, name in space.cells():
        if layer in untold:
            continue
        found = [np.reshape(part["numbers"][layer][name], (passes, -1)) for part in parts]
        change = torch.from_numpy(np.concatenate(found, 1).T).float()  # so many images, a pixel a pass
        facts = {"damage": float(change.square().mean()), "sketch": sketch(change), "gradient": True}
        values[layer, name] = facts
    return values, untold


def _sketched(
    pool: Pool,
    study: Study,
    space: SearchSpace,
    protocol: Protocol,
    progress: Progress,
    images: int,
    passes: int,
    what: str,
) -> list[Any]:
    """The sketches of all images, by micro-batch; from the study where it has them."""
    top = space.closest_act
    layers = [k for k, row in space.choices.items() if row != (FP,)]
    like = QuantConfig(
        space.fingerprint,
        {k: LayerChoice(FP, top) for k in layers} if top != 16 else {},
        calibration=space.calibration,
    )
    choices = {k: tuple(str(s) for s in space.choices[k] if s != FP) for k in layers}
    acts = tuple(a for a in space.act_choices if a != 16)
    few = min(PROBE_IMAGES, protocol.micro_batch)
    full = space.full_precision().digest
    calibration = None if space.calibration is None else space.calibration.digest
    about = [protocol.digest, SKETCH_SEED, few, passes, choices, [act_text(a) for a in acts], calibration]
    starts = range(0, images, few)
    keys = {start: digest(["sketched", *about, start]) for start in starts}
    found: dict[int, Any] = {start: study.outputs(key).get(full) for start, key in keys.items()}
    wanted = [start for start in starts if found[start] is None]
    tasks = [MeasureSketches(choices, acts, protocol, start, passes, like, space.steps) for start in wanted]
    progress(what, 0, len(tasks))
    for done, (place, value) in enumerate(pool.run(tasks), 1):
        start = wanted[place]
        study.add_outputs(keys[start], {full: dict(value)})
        found[start] = value
        progress(what, done, len(tasks))
    return [found[start] for start in starts]
