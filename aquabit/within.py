"""A time that a run is to fit: settings are lowered, rung by rung, until its plan does."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import ceil
from typing import Any

from aquabit.jsonio import record
from aquabit.progress import span
from aquabit.scheme import AquabitError, Protocol
from aquabit.sensitivity.plan import ALL, WANTED, Planner, RunPlan, SampleOptions
from aquabit.space import make_space

UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
# samples, swaps, images, the share of the steps; None: as they are. Samples and swaps tell how far the answer
# can be trusted, images how well: the answer itself comes from gradients, so that these go first
RUNGS: tuple[tuple[int | None, int | None, int | None, float], ...] = (
    (None, None, None, 1.0),
    (80, 24, None, 1.0),
    (48, 16, None, 1.0),
    (32, 10, None, 1.0),
    (32, 10, 64, 1.0),
    (24, 8, 32, 1.0),
    (24, 8, 16, 1.0),
    (24, 8, 16, 0.5),
)
UNIFORM: dict[str, Any] = {
    "levels": []
}  # the default space without additive formats, whose fits take longest

_Formats = tuple[dict[str, Any] | None, str]  # options of the space, and which additive formats are fitted


def parse_time(text: str) -> float:
    """Seconds of "90s", "20min", "2h", "1d"; raises AquabitError for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|min|h|d)", text.strip())
    if found is None or not float(found[1]) > 0:
        raise AquabitError(
            f"the time {text!r:.40} must be a number above 0 and a unit, as in 90s, 20min or 2h"
        )
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Fitted:
    """Settings that fit a time, and what they are planned to take: ``parts`` {name: seconds}. ``space``: the
    options of the space that are to be used instead of the given ones; None: these."""

    within: float
    samples: int
    swaps: int
    images: int
    steps: int
    parts: dict[str, float]
    space: dict[str, Any] | None = None
    fits: str = ALL

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def text(self) -> str:
        """The settings as a sentence."""
        formats = ", additive formats where they are wanted" if self.fits == WANTED else ""
        formats = " and uniform formats alone" if self.space is not None else formats
        return (
            f"to fit {span(self.within)}: {self.samples} samples, {self.swaps} swaps, {self.images} images of"
            f" {self.steps} steps{formats}; planned {span(self.seconds)}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: Any, source: str = "the stored plan") -> Fitted:
        """The inverse of ``to_dict``; raises AquabitError where it is none."""
        return record(Fitted, value, source)


def compared(planned: Fitted, spent: Mapping[str, float]) -> str:
    """What a run took, part by part, beside its plan."""
    parts = ", ".join(f"{k} {span(v)} ({span(planned.parts.get(k, 0.0))})" for k, v in spent.items())
    total = sum(spent.values())
    return f"took {span(total)}, planned {span(planned.seconds)}: {parts}"


def fit_within(
    planner: Planner,
    seconds: float,
    sample: SampleOptions,
    swaps: int,
    space: Mapping[str, Any] | None,
    kept: Collection[str] = (),
    fits: str = ALL,
) -> Fitted:
    """The highest rung whose plan takes at most ``seconds``; what is ``kept`` ("samples", "swaps", "images",
    "steps", "fits") stays as it is, and so does a ``space`` that was given. Raises AquabitError with the
    least time where none does."""
    least = float("inf")
    for (options, formats), tried, count, protocol in _rungs(planner, sample, swaps, space, kept, fits):
        made = planner.space
        if options is not None:
            made = make_space(
                planner.opened.graph,
                planner.opened.fingerprint,
                planner.opened.reference,
                **{"calibration": planner.space.calibration, **options},
            )
        found: RunPlan = planner.run(tried, count, protocol, made, formats)
        if found.seconds <= seconds:
            parts, images, steps = dict(found.parts), protocol.images, protocol.steps
            return Fitted(seconds, tried.samples, count, images, steps, parts, options, formats)
        least = min(least, found.seconds)
    raise AquabitError(
        f"the smallest run of this model takes about {least / 60:.1f} minutes here, and {seconds / 60:.3g}"
        " were given; give more time, fewer --steps, or a GPU (--device cuda)"
    )


def _rungs(
    planner: Planner,
    sample: SampleOptions,
    swaps: int,
    space: Mapping[str, Any] | None,
    kept: Collection[str],
    fits: str,
) -> Iterator[tuple[_Formats, SampleOptions, int, Protocol]]:
    """(formats, sample, swaps, protocol), from the best to the quickest."""
    formats = (fits,) if fits == WANTED or "fits" in kept else (ALL, WANTED)
    asked: list[_Formats] = [(None, each) for each in formats]
    uniform: list[_Formats] = [] if space else [(UNIFORM, ALL)]
    given = planner.protocol
    fixed = "steps" in kept or planner.space.steps is not None  # step groups are of so many steps
    for spaces, (samples, count, images, share) in product((asked, uniform), RUNGS):
        protocol = replace(
            given,
            images=given.images if "images" in kept else min(images or given.images, given.images),
            # at least as many as leave one to run where sampling begins with a picture
            steps=given.steps if fixed else max(ceil(1 / (given.strength or 1)), round(given.steps * share)),
        )
        fewer = replace(sample, samples=min(samples or sample.samples, sample.samples))
        for each in spaces:
            yield (
                each,
                sample if "samples" in kept else fewer,
                swaps if "swaps" in kept else min(count or swaps, swaps),
                protocol,
            )
