"""Before measuring: every scheme of a space into the bank, and what it does alone into the study."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aquabit.measuring.gradient_damages import add_gradient_damages
from aquabit.measuring.pools import Pool
from aquabit.measuring.tasks import Fit, Portions, Probe
from aquabit.scheme import FP, Act, AquabitError, Progress, Protocol, QuantConfig, act_text, no_progress
from aquabit.space import SearchSpace
from aquabit.study import Study

PROBES, GRADIENTS = "probes", "gradients"  # where damages come from
# of layers whose H are measured together, a worker: each part is a replay of the calibration's calls, and
# workers that are done early wait for the last one
PARTS = 2
SCORED = 24  # (layer, scheme) of those that gradients tell of that are probed too, to say how true they are
Cell = tuple[str, str]  # layer, and a scheme or an activation choice as text


def check_source(damages: str) -> None:
    """Raise AquabitError for an unknown source of damages."""
    if damages not in (PROBES, GRADIENTS):
        raise AquabitError(f"damages {damages!r} is unknown; it must be {PROBES} or {GRADIENTS}")


def source_of(study: Study | None, given: str | None) -> str:
    """Where damages come from: as ``given``, as the study was begun (before there were gradients it had
    probes and did not say so), else gradients. Raises AquabitError where a study was begun otherwise: what it
    knows is not made again."""
    begun = None
    if study is not None:
        begun = study.get("damages") or (PROBES if "fingerprint" in study else None)
    source = given or begun or GRADIENTS
    check_source(source)
    if study is not None and begun is not None and source != begun and "fingerprint" in study:
        raise AquabitError(
            f"{study.path} was begun with --damages {begun}, not {source}; use that or another file"
        )
    return source


def fit_all(
    pool: Pool,
    study: Study,
    space: SearchSpace,
    protocol: Protocol,
    progress: Progress = no_progress,
    damages: str = GRADIENTS,
    scored: bool = True,
    beside: Iterable[QuantConfig] = (),
) -> None:
    """Every (layer, scheme) of the space into the bank, and what it does alone into the study: from
    gradients, of which some are probed too where they are to be ``scored`` (``probed``), or by a probe of
    each; what is known is skipped. Layers that gradients do not tell of are probed. What is fitted with H is
    fitted for configurations ``beside`` the space too, which are measured later: H is not measured again."""
    check_source(damages)
    measured = study.known(protocol)
    _fit(pool, study, space, progress, [c for c in beside if c.digest not in measured])
    if damages == GRADIENTS:
        add_gradient_damages(pool, study, space, protocol, progress)
        if scored:
            _score(pool, study, space, protocol, progress)
    known = study.features()
    _probe(
        pool, study, space, protocol, [c for c in space.cells() if "damage" not in known.get(c, {})], progress
    )


def scored_cells(space: SearchSpace, known: Mapping[Cell, Mapping[str, Any]]) -> list[Cell]:
    """The (layer, scheme) whose gradients are compared with probes: SCORED drawn of those that changed
    something."""
    schemes = {str(s) for s in space.schemes}
    told = [c for c in space.cells() if known.get(c, {}).get("gradient") and c[1] in schemes]
    told = [c for c in told if known[c]["damage"] > 0]
    order = np.random.default_rng(0).permutation(len(told))
    return [told[i] for i in sorted(order[:SCORED])]


def _score(pool: Pool, study: Study, space: SearchSpace, protocol: Protocol, progress: Progress) -> None:
    """Probe some of what gradients tell of, beside it."""
    known = study.features()
    wanted = [c for c in scored_cells(space, known) if "probed" not in known[c]]
    _probe(pool, study, space, protocol, wanted, progress, beside=True)


def _probe(
    pool: Pool,
    study: Study,
    space: SearchSpace,
    protocol: Protocol,
    wanted: Collection[Cell],
    progress: Progress,
    beside: bool = False,
) -> None:
    """Probe cells that are fitted: as their damage, or ``beside`` the one that they have."""
    if not wanted:
        return
    act, rows, known = space.closest_act, dict[str, list[str]](), study.features()
    by_text: dict[str, Act] = {act_text(a): a for a in space.act_choices}
    for layer, name in wanted:
        rows.setdefault(layer, []).append(name)
    base = QuantConfig(space.fingerprint, {}, calibration=space.calibration)
    tasks = []
    for layer, names in rows.items():
        schemes, acts = (
            tuple(n for n in names if n not in by_text),
            [by_text[n] for n in names if n in by_text],
        )
        tasks.append(Probe(layer, schemes, tuple(acts), protocol, base, act, space.steps))
    progress("probing", 0, len(tasks))
    for done, (_, found) in enumerate(pool.run(tasks), 1):
        values = {(k, name): value for k, row in found.items() for name, value in row.items()}
        if beside:
            values = {cell: {"probed": value["damage"]} for cell, value in values.items()}
        study.add_features({cell: {**known.get(cell, {}), **value} for cell, value in values.items()})
        progress("probing", done, len(tasks))


def _schemes_beside(layer: str, space: SearchSpace, beside: Sequence[QuantConfig]) -> tuple[str, ...]:
    """Schemes with H that a layer has in configurations, and not in the space."""
    own = {config[layer].weight for config in beside if config.calibration == space.calibration}
    wanted = (s for s in own - set(space.choices[layer]) if s.calibrated and not s.shared)
    return tuple(sorted(map(str, wanted)))


def _fit(
    pool: Pool, study: Study, space: SearchSpace, progress: Progress, beside: Sequence[QuantConfig] = ()
) -> None:
    """Fit what is not known."""
    known = study.features()
    schemes = {
        k: [s for s in row if s != FP and "error" not in known.get((k, str(s)), {})]
        for k, row in space.choices.items()
    }
    layers = [k for k in space.choices if schemes[k]]
    if not layers:
        return
    portions: list[list[str]] = [[k] for k in layers]
    if space.calibration is not None:  # H of a portion is measured in one run
        progress("calibrating", 0, 1)
        aware = tuple(k for k in layers if any(s.calibrated for s in space.choices[k]))
        request = Portions(aware, space.calibration, PARTS * pool.workers)
        portions = [part for _, found in pool.run([request]) for part in found]
        portions += [[k] for k in layers if k not in aware]
        progress("calibrating", 1, 1)
    own = {k: tuple(str(s) for s in schemes[k] if not s.shared) for k in layers}
    others = {k: _schemes_beside(k, space, beside) for k in layers}
    tasks = [
        Fit({k: own[k] for k in part}, space.calibration, {k: others[k] for k in part if others[k]})
        for part in portions
    ]
    together: dict[str, dict[str, tuple[str, ...]]] = {}  # layers that share codebooks are fitted together
    for k in layers:
        for scheme in schemes[k]:
            if scheme.shared:
                row = together.setdefault(space.codebook(k), {})
                row[k] = (*row.get(k, ()), str(scheme))
    tasks += [Fit(row, space.calibration) for row in together.values()]
    for done, (place, found) in enumerate(pool.run(tasks), 1):
        study.add_features(
            {
                (layer, scheme): {**known.get((layer, scheme), {}), **value}
                for layer, facts in found.items()
                for scheme, value in facts.items()
            }
        )
        every = [v for facts in found.values() for v in facts.values()]
        errors = [float(v["output"] if "output" in v else v["error"]) for v in every]
        layer, worst = next(iter(tasks[place].schemes)), max(errors, default=0.0)
        progress(f"fitting: {layer}, largest error {worst:.3f}", done, len(tasks))
