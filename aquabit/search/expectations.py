"""What damages alone let expect of configurations, before anything is measured for them."""

from __future__ import annotations

from math import isfinite, log10

import numpy as np

from aquabit.choices import Choices
from aquabit.measuring.session import Session
from aquabit.scheme import FP, QuantConfig
from aquabit.search.front import smallest_uniform
from aquabit.search.integer_program import Solution
from aquabit.search.search import Search
from aquabit.sensitivity.damages import Damages


def expectation(search: Search, solved: Solution) -> str:
    """What the damages let expect of the budget, before anything is measured."""
    space, here = search.session.space, solved.choices
    offset = psnr_offset(search.session, search.damages)
    bits = float(search.costs.totals(here)["bits"][0])
    psnr = expected_psnr(search.damages, here, offset)
    text = f"expected at {search.options.budget}: PSNR {psnr:.1f} dB to full precision at {bits:.2f} bits"
    uniform = smallest_uniform(search.costs, space, search.costs(here.config).bytes)
    if uniform is not None and search.inside(uniform):
        value = expected_psnr(search.damages, Choices.of(space, [uniform]), offset)
        text += (
            f"; {config_name(uniform)} for all layers, {search.costs(uniform).bits_per_weight:.2f} bits:"
            f" {value:.1f} dB"
        )
    return text + " (predicted from damages; nothing was measured for it)"


def expected_psnr(damages: Damages, chosen: Choices, offset: float = 0.0) -> float:
    """PSNR in dB that the sum of damages of one configuration (one row) lets expect."""
    total = float(damages.total(chosen)[0])
    return offset - 10 * log10(max(total, 1e-10))


def psnr_offset(session: Session, damages: Damages) -> float:
    """What mean PSNR is above that of the summed damages, in the median of what was measured: a mean of
    logarithms is not the logarithm of a mean, and few probes are noisy. 0 where nothing was measured."""
    table = session.study.measurements(session.protocol)
    configs = session.study.configs()
    known = set(session.space.schemes)
    if "psnr" not in table:
        return 0.0
    gaps = []
    for key, psnr in zip(table.config, table.psnr, strict=True):
        config = configs[key]
        if config.layers and isfinite(psnr) and all(config[k].weight in known for k in session.space.choices):
            gaps.append(float(psnr) - expected_psnr(damages, Choices.of(session.space, [config])))
    return float(np.median(gaps)) if gaps else 0.0


def config_name(config: QuantConfig) -> str:
    """``usq3h``, or ``aq, 3 bits`` of a family whose layers have formats of their own."""
    found = {str(c.weight) for c in config.layers.values() if c.weight != FP}
    kinds = {c.weight.kind for c in config.layers.values() if c.weight != FP}
    return next(iter(found)) if len(found) == 1 else "+".join(sorted(kinds)) if found else "fp"
