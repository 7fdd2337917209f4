"""On a GPU: a few tiles of each Triton kernel, for few and for many tokens, instead of all that are tuned
over; to compile those takes longer than all tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def keep(tuner: Any, tiles: set[tuple[int, ...]]) -> None:
    """Leave a tuner those of its tiles."""
    names = [name for name in tuner.configs[0].kwargs if name.startswith("BLOCK_")]
    by_tile = {tuple(c.kwargs[name] for name in names): c for c in tuner.configs}
    tuner.configs = [by_tile[tile] for tile in sorted(tiles)]


@pytest.fixture(autouse=True, scope="session")
def few_tiles() -> None:
    if not torch.cuda.is_available():
        return
    pytest.importorskip("triton")
    from aquabit.kernels.backends import triton_attention_device, triton_device, triton_int8_device

    keep(triton_device.tuned_matmul, {(16, 64, 64), (128, 128, 32), (16, 64, 16), (64, 64, 16)})
    keep(triton_int8_device.tuned_int8_matmul, {(16, 64, 32), (128, 128, 32), (64, 128, 64)})
    keep(triton_attention_device.tuned_attention, {(32, 32), (64, 64)})
