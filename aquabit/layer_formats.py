"""Additive formats per layer (AQUATIC-Diff's LAQ, "layer heterogeneity-aware"): a table by operator type, and
a choice by shape.

Codebooks weigh much in small layers and nothing in large ones, so the best format of a size depends on the
shape. A format of b code bits leaves the relative error LOSS x 4^-b on Gaussian weights, and stores o bits a
weight besides its codes; of formats with about the same code bits the best has the least o + log4(LOSS): each
stored bit is worth a factor of 4.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from math import log, prod

from aquabit.scheme import AquabitError, Scheme

# code bits per weight: without any of them a budget between 1.6 and 3.5 bits loses .3 dB or more
LEVELS = (1.0, 1.5, 2.0, 3.0, 4.0)
LEVEL_TOLERANCE_BITS = 0.35  # code bits of a format lie within this of the level it stands for
# a format stores at most this many times its code bits: below that, codebooks and scales outweigh the codes
MOST_OVERHEAD = 2.0

LOSS: Mapping[str, float] = {  # measured on 512 x 576 Gaussian weights without H
    "aq1x8g8": 1.24,
    "aq3x4g8": 1.41,
    "aq2x6g8": 1.36,
    "aq4x4g8": 1.48,
    "aq2x8g8": 1.31,
    "aq2x4g4": 1.68,
    "aq3x4g4": 1.90,
    "aq2x6g4": 1.83,
    "aq4x4g4": 2.13,
    "aq2x8g4": 1.87,
    "aq6x4g8": 1.63,
    "aq4x6g8": 1.50,
    "aq1x8g4": 1.52,
    "aq1x6g4": 1.48,
    "aq8x4g8": 1.86,
    "aq5x6g8": 1.64,
    "aq3x6g8": 1.43,
    "aq3x4k": 1.36,
    "aq2x6k": 1.31,
    "aq4x4k": 1.41,
    "aq2x8k": 1.26,
    "aq7x4k": 1.60,
    "aq5x6k": 1.51,
    "aq9x4k": 1.81,
    "aq6x6k": 1.64,
}
UNKNOWN_LOSS = 2.4  # what 4 uniform bits leave: a format that was not measured is not preferred
LINEAR = tuple(text + tail for text in LOSS if not text.endswith("k") for tail in ("", "s"))
KERNEL = tuple(text + tail for text in LOSS if text.endswith("k") for tail in ("", "s"))
# "operator kernel" -> formats; the first match counts
FORMATS: Mapping[str, tuple[str, ...]] = {"* 1x1": LINEAR, "*": KERNEL + LINEAR}


def layer_formats(
    operator: str,
    shape: tuple[int, ...],
    levels: Sequence[float] = LEVELS,
    sharers: int = 1,
    table: Mapping[str, Sequence[str]] = FORMATS,
    operations: float | None = None,
) -> tuple[Scheme, ...]:
    """The best format of each level for a weight [out, in] or [out, in, kh, kw]; fewer where none is worth
    its codebooks.

    ``sharers`` layers of this operator type and shape could share codebooks; ``operations`` is the most that
    the table kernel may take, relative to the dense layer (M K / out + M / (2 g)). Raises AquabitError for a
    table that holds other than additive schemes.
    """
    kernel = "x".join(map(str, shape[2:] or (1, 1)))
    row = next(
        (
            formats
            for pattern, formats in table.items()
            if fnmatch.fnmatchcase(f"{operator} {kernel}", pattern)
        ),
        (),
    )
    schemes = [Scheme.parse(f) for f in row]
    wrong = [s for s in schemes if not s.additive]
    if wrong:
        raise AquabitError(
            f"the table of additive formats holds {wrong[0]} for {operator!r}; it takes aq schemes only, as"
            " in aq2x8g8"
        )
    affordable = [
        s
        for s in schemes
        if s.group_size(prod(shape[2:])) <= prod(shape[1:]) and (sharers > 1 or not s.shared)
    ]
    if operations is not None:
        affordable = [s for s in affordable if s.operations(shape) <= operations]
    picked = [_best(level, affordable, shape, sharers) for level in levels]
    return tuple(dict.fromkeys(s for s in picked if s is not None))


def _best(level: float, schemes: Sequence[Scheme], shape: tuple[int, ...], sharers: int) -> Scheme | None:
    area = prod(shape[2:])
    near = [s for s in schemes if abs(s.code_bits(area) - level) <= LEVEL_TOLERANCE_BITS]
    worth = [s for s in near if stored_bits(s, shape, sharers) <= MOST_OVERHEAD * s.code_bits(area)]
    return min(
        worth,
        key=lambda s: stored_bits(s, shape, sharers) - s.code_bits(area) + log(expected_loss(s), 4),
        default=None,
    )


def stored_bits(scheme: Scheme, shape: tuple[int, ...], sharers: int = 1) -> float:
    """Bits a weight that a layer stores, its share of shared codebooks included."""
    codes, codebooks = scheme.stored_bytes(shape)
    return 8 * (codes + codebooks / (sharers if scheme.shared else 1)) / prod(shape)


def expected_loss(scheme: Scheme) -> float:
    """Relative squared error on Gaussian weights over 4^-(code bits); UNKNOWN_LOSS for a format that was
    not measured."""
    return LOSS.get(str(scheme).removesuffix("s"), UNKNOWN_LOSS)
