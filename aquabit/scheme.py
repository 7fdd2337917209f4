"""The plain values, none of which needs torch, for whoever uses several: each is explained where it is
defined."""

# ruff: noqa: F401
# mypy: implicit-reexport
from aquabit.activation_bits import (
    CODE_SHIFT,
    ROUNDINGS,
    Act,
    Rounding,
    StepGroups,
    act_bits,
    act_code,
    act_of,
    act_parts,
    act_text,
    closest,
    known_rounding,
    lowest,
    output_rounding,
    parse_rounding,
    rounding_of,
)
from aquabit.budget import Budget
from aquabit.errors import AquabitError
from aquabit.jsonio import digest
from aquabit.progress import Progress, no_progress
from aquabit.protocol import LOWER_IS_BETTER, SCHEDULERS, Calibration, Measurement, Protocol, direction
from aquabit.quant_config import METHOD, RANGES, LayerChoice, QuantConfig, parse_correction
from aquabit.scheme_kinds import FP, UNIT_GAIN_FITS, Scheme, parse_swap
