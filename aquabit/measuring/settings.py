"""Settings of measuring: the protocol, the space, and what quality is measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aquabit.measuring.model import Model, check_correctable, first_step, settled
from aquabit.quality import QualityMeter, QualityOptions
from aquabit.quality.meter import check_available, default_objective
from aquabit.quant.bank import Bank
from aquabit.scheme import AquabitError, Calibration, Progress, Protocol, no_progress
from aquabit.space import SearchSpace, make_space
from aquabit.study import Study
from aquabit.targets import target_named

NO_REAL_IMAGES = (
    "{} names no real images, so the objective is {}, the distance to its own full-precision images; for FID"
    " give --reference DIR with --features inception=FILE (or effnet, for a distance like it), or choose psnr"
    " or ssim by --objective"
)


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured: how images are made (``protocol``), options of the search space as
    ``space.make_space`` takes them, and what images are measured with. None continues what the study has, or
    takes the defaults where it has nothing. ``damages`` is where what each (layer, scheme) does alone comes
    from: "gradients", a few backward passes through the sampler (the default), or "probes", images of each.
    """

    protocol: Protocol | None = None
    space: Mapping[str, Any] | None = None
    quality: QualityOptions | None = None
    damages: str | None = None


AS_BEGUN = MeasureOptions()  # nothing given: a study continues as it was begun


def meter_of(
    model: Model, study: Study | None, quality: QualityOptions | None, bank: Bank, device: str
) -> QualityMeter:
    """What images are measured with: a study's own options where none are given."""
    stored = QualityOptions.from_dict(study.get("quality") if study is not None else None)
    return QualityMeter(quality or stored, model.own, bank.folder, device, model.images)


def settings(
    model: Model,
    study: Study | None,
    options: MeasureOptions,
    dtype: str,
    meter: QualityMeter,
    progress: Progress = no_progress,
) -> tuple[Protocol, SearchSpace]:
    """The protocol and the space to measure with; ``dtype`` is that of a protocol which is no study's own.
    Micro-batches are evened (``Protocol.evened``), but where a study was begun with the very same ones.
    Raises AquabitError for what cannot be measured, and for what does not go together."""
    if study is not None and options.protocol is None and "protocol" in study:
        protocol = study.protocol
        settled(model, protocol)
    else:
        given = replace(options.protocol or Protocol(), dtype=dtype)
        protocol = protocol_for(model, given, meter, progress)
        if study is None or "protocol" not in study or study.protocol.digest != protocol.digest:
            protocol = protocol.evened()
    begun = study is not None and "space" in study and study.get("fingerprint") == model.fingerprint
    asked = dict(options.space or {})
    target = asked.pop("target", None)
    if study is not None and begun:
        check_target(study, target)
    stored = SearchSpace.from_dict(study.get("space")) if study is not None and begun else None
    if stored is not None and not asked and (target is None or stored.target == target):
        space = stored
    else:
        kept = {"calibration": Calibration.of(protocol), **(options.space or {})}
        if groups := kept.get("step_groups"):  # what does not run counts in no group
            first = {"first": found} if (found := first_step(model, protocol)) else {}
            kept["step_groups"] = {**groups, **first}
        space = make_space(model.graph, model.fingerprint, model.reference, **kept)
    check_correctable(model, protocol, space.correction, space.steps)
    if space.steps is not None and space.steps.total != protocol.steps:
        raise AquabitError(
            f"the step groups are of {space.steps.total} steps, the images are made in {protocol.steps};"
            " give both the same number"
        )
    return protocol, replace(space, sampled=Calibration.of(protocol))


def check_target(study: Study, target: str | None) -> None:
    """Raise AquabitError where a study was begun for another target."""
    asked, begun = target_named(target), (study.get("space") or {}).get("target")
    if asked is not None and begun is not None and asked.name != begun:
        raise AquabitError(
            f"{study.path} was begun for the target {begun}, not {asked.name}; use that, or another study"
        )


def protocol_for(
    model: Model, given: Protocol, meter: QualityMeter, progress: Progress = no_progress
) -> Protocol:
    """A protocol with what ``meter`` measures by; without real images the default objective is the distance
    to the full-precision images.

    Raises AquabitError for an objective that cannot be measured, saying what it needs.
    """
    given = replace(given, measures=meter.measures)
    given = settled(model, given)
    given.direction()  # raises for an unknown objective
    videos = model.videos and given.frames != 1
    available, objective = meter.available(model.prompts, videos), given.objective
    if objective == Protocol.objective and objective not in available:
        objective = default_objective(available)
        if objective == "mse":
            meter.notes.append(NO_REAL_IMAGES.format(model.reference, objective))
    check_available(objective, available, model.reference)
    size = model.size(given.resolution)
    return replace(given, reference=meter.reference_digest(size, progress), objective=objective)
