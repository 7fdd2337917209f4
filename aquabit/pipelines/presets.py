"""Presets: the settings of published tables, each with the number that its paper reports. What a source
does not state is left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aquabit.scheme import AquabitError

_QUA2SEDIMO = "Qua2SeDiMo, arXiv 2412.14628"
_PTQD = "PTQD, arXiv 2305.10657, W4A8; 20 steps as QuEST, arXiv 2402.03666, lists it"
_AQUATIC = "AQUATIC-Diff, arXiv 2506.05960, W4A8: sFID 1.92 below full precision"


@dataclass(frozen=True)
class Preset:
    """``family`` is the name of a pipeline family, ``weights`` and ``activations`` the bits of the paper's
    configuration (16: left as they were), ``protocol`` the values of a Protocol that its source states,
    ``reported`` the numbers it gives for that configuration and ``full_precision`` for the model as it
    was, by metric."""

    name: str
    family: str
    model: str
    source: str
    weights: float
    activations: int
    protocol: Mapping[str, Any] = field(default_factory=dict)
    reported: Mapping[str, float] = field(default_factory=dict)
    full_precision: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# FID on 1,000 images is what the search of Qua2SeDiMo is labelled by; the sampler and the steps of its tables
# are left to the user.
_LABELS = {"images": 1000}
_LDM4 = {"images": 50_000, "scheduler": "ddim", "eta": 0.0, "resolution": 256}
_STEPS_20 = {**_LDM4, "steps": 20, "guidance": 3.0}  # the scale of the sampling script that comes with LDM-4
_FULL_20 = {"fid": 11.28, "sfid": 7.70, "is": 364.7}

PRESETS: tuple[Preset, ...] = (
    Preset(
        "qua2sedimo-pixart-alpha",
        "pixart-alpha",
        "PixArt-alpha",
        _QUA2SEDIMO,
        3.4,
        16,
        _LABELS,
        {"fid": 35.5},
        {"fid": 34.1},
    ),
    Preset(
        "qua2sedimo-pixart-sigma",
        "pixart-sigma",
        "PixArt-Sigma",
        _QUA2SEDIMO,
        3.9,
        16,
        _LABELS,
        {"fid": 30.3},
        {"fid": 36.9},
    ),
    Preset(
        "qua2sedimo-hunyuan",
        "hunyuan",
        "Hunyuan-DiT",
        _QUA2SEDIMO,
        3.65,
        16,
        _LABELS,
        {"fid": 42.0},
        {"fid": 41.9},
    ),
    Preset(
        "qua2sedimo-dit", "dit", "DiT-XL/2 256", _QUA2SEDIMO, 3.5, 16, {**_LABELS, "resolution": 256}
    ),  # one image a class
    Preset("qua2sedimo-sdxl", "sdxl", "SDXL base", _QUA2SEDIMO, 3.7, 16, _LABELS),
    Preset(
        "ptqd-ldm4",
        "ldm-class",
        "LDM-4 ImageNet",
        _PTQD,
        4,
        8,
        _STEPS_20,
        {"fid": 8.74, "sfid": 7.98, "is": 344.7},
        _FULL_20,
    ),
    Preset(
        "ptqd-ldm4-250",
        "ldm-class",
        "LDM-4 ImageNet",
        _PTQD,
        4,
        8,
        {**_LDM4, "steps": 250},
        {"fid": 5.11},
        {"fid": 5.05},
    ),
    Preset(
        "aquatic-ldm4",
        "ldm-class",
        "LDM-4 ImageNet",
        _AQUATIC,
        4,
        8,
        _STEPS_20,
        {"sfid": round(7.70 - 1.92, 2)},
        _FULL_20,
    ),
)


def preset_named(name: str) -> Preset:
    """The preset of that name; raises AquabitError where there is none."""
    found = next((p for p in PRESETS if p.name == name), None)
    if found is None:
        raise AquabitError(f"preset {name!r} is unknown; known: {', '.join(p.name for p in PRESETS)}")
    return found
