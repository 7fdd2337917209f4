"""The winner under a budget: what may replace the one that is nearest to full precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aquabit.scheme import LayerChoice, Protocol, QuantConfig, Scheme, no_progress
from aquabit.search.winner import OBJECTIVE_BLOCKS, _by_objective

PROTOCOL = Protocol(images=8)
FULL = QuantConfig("f", {})
CONFIGS = [QuantConfig("f", {f"layer {i}": LayerChoice(Scheme.parse("usq3"), 8)}) for i in range(40)]


class Seeds:
    """A search whose configurations have a FID of their own on every block of seeds: ``gain`` below that of
    the first, and noise. ``measured``: blocks on which something was asked for."""

    def __init__(self, seed: int, gain: float = 0.0):
        rng = np.random.default_rng(seed)
        blocks = [PROTOCOL, *(PROTOCOL.block(b) for b in OBJECTIVE_BLOCKS)]
        of_block = dict(zip((p.digest for p in blocks), rng.normal(5, 1, len(blocks)), strict=True))
        self.table = {
            key: {
                FULL.digest: level,
                **{
                    c.digest: level + 0.3 - gain * (i > 0) + rng.normal(0, 0.1) for i, c in enumerate(CONFIGS)
                },
            }
            for key, level in of_block.items()
        }
        self.measured: set[str] = set()
        self.progress = no_progress
        self.session = SimpleNamespace(
            protocol=PROTOCOL,
            measure_full=lambda *_: None,
            measure=self.measure,
            space=SimpleNamespace(full_precision=lambda: FULL),
        )

    def measure(self, configs: Any, kind: str, progress: Any, protocols: Any, what: str) -> None:
        assert len(configs) <= 3
        self.measured |= {p.digest for p in protocols}

    def values(self, metric: str, protocol: Protocol = PROTOCOL) -> dict[str, float]:
        return self.table[protocol.digest]


def chosen(seeds: Seeds) -> QuantConfig:
    return _by_objective(seeds, CONFIGS[0], CONFIGS)  # type: ignore[arg-type]


def test_the_luckiest_on_the_own_seeds_does_not_replace_the_winner() -> None:
    worlds = [Seeds(seed) for seed in range(300)]
    replaced = sum(chosen(world) != CONFIGS[0] for world in worlds)
    assert replaced <= 0.05 * len(worlds)
    assert PROTOCOL.digest not in worlds[0].measured and len(worlds[0].measured) == len(OBJECTIVE_BLOCKS)


@pytest.mark.parametrize("seed", range(5))
def test_one_that_is_better_on_other_seeds_does(seed: int) -> None:
    assert chosen(Seeds(seed, gain=2.0)) != CONFIGS[0]


def test_a_winner_that_is_as_good_as_full_precision_stays() -> None:
    world = Seeds(0, gain=2.0)
    for block in world.table.values():
        block[FULL.digest] = block[CONFIGS[0].digest]
    assert chosen(world) == CONFIGS[0]
