"""Fitting before measuring: every scheme of a space into the bank, and what it does alone into the study."""

from __future__ import annotations

from aquabit.measuring.gradient_damages import add_gradient_damages
from aquabit.measuring.pools import Pool
from aquabit.measuring.tasks import Fit, Portions
from aquabit.scheme import FP, AquabitError, Progress, Protocol, act_code, act_text, no_progress
from aquabit.space import SearchSpace
from aquabit.study import Study

PROBES, GRADIENTS = "probes", "gradients"  # where damages come from


def check_source(damages: str) -> None:
    """Raise AquabitError for an unknown source of damages."""
    if damages not in (PROBES, GRADIENTS):
        raise AquabitError(f"damages {damages!r} is unknown; it must be {PROBES} or {GRADIENTS}")


def fit_all(
    pool: Pool,
    study: Study,
    space: SearchSpace,
    protocol: Protocol,
    progress: Progress = no_progress,
    damages: str = PROBES,
) -> None:
    """Every (layer, scheme) of the space into the bank, and what it does alone into the study, by ``damages``
    of each; what is known is skipped."""
    check_source(damages)
    if damages == GRADIENTS:
        _fit(pool, study, space, protocol, progress, probe=False)
        add_gradient_damages(pool, study, space, protocol, progress)
    else:
        _fit(pool, study, space, protocol, progress, probe=True)


def _fit(
    pool: Pool, study: Study, space: SearchSpace, protocol: Protocol, progress: Progress, probe: bool
) -> None:
    """Fit what is not known, and probe it."""
    known, fact = study.features(), "damage" if probe else "error"
    schemes = {
        k: [s for s in row if s != FP and fact not in known.get((k, str(s)), {})]
        for k, row in space.choices.items()
    }
    choices = [a for a in space.act_choices if a != 16 and probe]
    probes = {
        k: tuple(act_code(a) for a in choices if row != (FP,) and (k, act_text(a)) not in known)
        for k, row in space.choices.items()
    }
    acts = tuple(sorted(space.activations, reverse=True))
    layers = [k for k in space.choices if schemes[k] or probes[k]]
    if not layers:
        return
    portions: list[list[str]] = [[k] for k in layers]
    if space.calibration is not None:  # H of a portion is measured in one run
        progress("calibrating", 0, 1)
        aware = tuple(k for k in layers if any(s.calibrated for s in space.choices[k]))
        request = Portions(aware, acts, space.calibration)
        portions = [part for _, found in pool.run([request]) for whole in found for part in _parts(whole)]
        portions += [[k] for k in layers if k not in aware]
        progress("calibrating", 1, 1)

    def fit(schemes: dict[str, tuple[str, ...]], probes: dict[str, tuple[int, ...]]) -> Fit:
        return Fit(schemes, probes, acts, protocol, space.calibration, space.steps, probe)

    own = {k: tuple(str(s) for s in schemes[k] if not s.shared) for k in layers}
    tasks = [fit({k: own[k] for k in part}, {k: probes[k] for k in part}) for part in portions]
    together: dict[str, dict[str, tuple[str, ...]]] = {}  # layers that share codebooks are fitted together
    for k in layers:
        for scheme in schemes[k]:
            if scheme.shared:
                row = together.setdefault(space.codebook(k), {})
                row[k] = (*row.get(k, ()), str(scheme))
    tasks += [fit(row, dict.fromkeys(row, ())) for row in together.values()]
    for done, (place, found) in enumerate(pool.run(tasks), 1):
        study.add_features(
            {(layer, scheme): value for layer, facts in found.items() for scheme, value in facts.items()}
        )
        every = [v for facts in found.values() for v in facts.values()]
        errors = [float(v["output"] if "output" in v else v.get("error", 0.0)) for v in every]
        layer, worst = next(iter(tasks[place].schemes)), max(errors, default=0.0)
        doing = "fitting and probing" if probe else "fitting"
        progress(f"{doing}: {layer}, largest error {worst:.3f}", done, len(tasks))


def _parts(layers: list[str], size: int = 6) -> list[list[str]]:
    """Small portions, so that workers share the work evenly and an interruption loses little."""
    return [layers[i : i + size] for i in range(0, len(layers), size)]
