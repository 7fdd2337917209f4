"""Denoiser calls that are recorded while images are made in full precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.scheme import AquabitError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one denoiser call, tensors on the CPU


def record_calls(denoiser: nn.Module, runs: Sequence[Callable[[], object]], limit: int) -> list[Call]:
    """At most ``limit`` of the denoiser calls that ``runs`` make, in order; each run makes one micro-batch of
    images.

    Runs should hold different conditions (and seeds). ``limit`` is shared out evenly over the runs. A run
    with more calls than its share keeps the steps that were kept least often so far, so that over all runs
    each step counts the same (+-1 where all runs have as many steps); among equals it takes every n-th, and
    n's phase moves on with each round through all steps, so that a step meets the conditions of different
    runs even where those repeat. Tensors are copied to the CPU; one that does not change from call to call is
    kept once. Raises AquabitError where nothing is recorded.
    """
    kept: list[Call] = []
    seen: list[Call] = []
    times: Counter[int] = Counter()
    before: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now: list[Tensor] = []

        def copied(tensor: Tensor) -> Tensor:
            copy = tensor.detach().to("cpu", copy=True)
            same = before[len(now)] if len(now) < len(before) else None
            now.append(
                same if same is not None and same.dtype == copy.dtype and torch.equal(same, copy) else copy
            )
            return now[-1]

        seen.append((mapped(args, copied), mapped(kwargs, copied)))
        before[:] = now

    handle = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    try:
        for i, run in enumerate(runs):
            share = limit * (i + 1) // len(runs) - limit * i // len(runs)
            if share > 0:
                seen.clear()
                run()
                steps = _steps(len(seen), share, times)
                times.update(steps)
                kept += [seen[step] for step in steps]
    finally:
        handle.remove()
    if not kept:
        raise AquabitError(
            f"no denoiser call was recorded from {len(runs)} micro-batches ({limit=}); calibration needs"
            " images"
        )
    return kept


def _steps(total: int, share: int, times: Counter[int]) -> list[int]:
    """``share`` of ``total`` steps, least often kept first."""
    if not total:
        return []
    stride, rounds = max(1, round(total / share)), times.total() // total
    return sorted(sorted(range(total), key=lambda t: (times[t], (t - rounds) % stride, t))[:share])


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in its tuples, lists and dictionaries changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    return type(value)(mapped(v, change) for v in value) if type(value) in (tuple, list) else value
