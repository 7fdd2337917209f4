"""Denoiser calls that are recorded while images are made in full precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

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


def part_of(call: Call) -> str:
    """The part of several (``aquabit.parts.Parts``) that a call is of; "" of one network."""
    first = next(iter(call[0]), None)
    return first if isinstance(first, str) else ""


def _steps(total: int, share: int, times: Counter[int]) -> list[int]:
    """``share`` of ``total`` steps, least often kept first."""
    if not total:
        return []
    stride, rounds = max(1, round(total / share)), times.total() // total
    return sorted(sorted(range(total), key=lambda t: (times[t], (t - rounds) % stride, t))[:share])


def output_tensor(result: Any) -> Tensor:
    """The tensor in a denoiser's result, which may be wrapped; a list of one tensor a sample is stacked.

    Raises AquabitError where the samples of such a list have different sizes.
    """
    found = result if isinstance(result, Tensor) or _is_row_list(result) else result[0]
    if not _is_row_list(found):
        return cast(Tensor, found)
    if len({tensor.shape for tensor in found}) > 1:
        raise AquabitError("the denoiser returns samples of different sizes; make images of one size")
    return torch.stack(found)


def with_output(result: Any, output: Tensor) -> Any:
    """A denoiser's result with another tensor in the place of the one that ``output_tensor`` gives."""
    if isinstance(result, Tensor):
        return output
    if _is_row_list(result):
        return list(output)
    held = list(output) if _is_row_list(result[0]) else output
    if isinstance(result, tuple):
        return (held, *result[1:])
    result[next(iter(result))] = held  # diffusers' outputs are ordered dictionaries
    return result


def has_row_list(result: Any) -> bool:
    """Whether a denoiser's result is a list of one tensor a sample; its inputs then are such lists too."""
    return _is_row_list(result) or (not isinstance(result, Tensor) and _is_row_list(result[0]))


def _is_row_list(value: Any) -> TypeGuard[list[Tensor]]:
    return type(value) is list and bool(value) and all(isinstance(part, Tensor) for part in value)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in its tuples, lists and dictionaries changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    return type(value)(mapped(v, change) for v in value) if type(value) in (tuple, list) else value
