"""Replay buffer: what a full-precision denoiser was asked while images were made, and what it answered, in
batches, shuffled or in order.

A denoiser call is nested tensors. Those whose first dimension is the batch are taken apart into samples; the
others belong to the whole call, and only samples whose calls agree in them share a batch. A timestep given
once for a call is one number a sample where the denoiser takes that, which is tried: then a batch mixes
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.quant.bank import weight_hash
from aquabit.quant.calibration.recording import Call, has_row_list, mapped, output_tensor, part_of
from aquabit.quant.correction.guidance import doubled, guidance_weights, noise_part, step_arguments
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.scheme import AquabitError, Calibration

HELD_OUT = 16  # one run of so many is for validation, one at least
AGREE = 1e-4  # relative difference up to which a denoiser answers the same


@dataclass(frozen=True)
class Recorded:
    """One denoiser call and its output, tensors on the CPU, of a ``step`` (from 0) of a ``run`` of the
    sampler. ``lists``: samples come and go as lists of tensors."""

    call: Call
    output: Tensor
    run: int
    step: int
    lists: bool = False


@dataclass(frozen=True)
class Recording:
    """Calls in the order in which they were made; where guidance doubles a batch, which half is the
    conditional one (None: it does not)."""

    calls: list[Recorded]
    conditional_first: bool | None = True


Record = Callable[[Calibration, int], Recording]  # images as a calibration says, made in batches of so many


class _Steps(Watcher):
    """Knows the step of the sampler, and how guidance combined what the denoiser returned in it."""

    def __init__(self) -> None:
        self.now, self.outputs, self.orders = 0, list[Tensor](), set[bool | None]()

    def before(self, step: int) -> None:
        self.now = step

    def output(self, step: int, call: int, output: Tensor) -> Tensor:
        self.outputs = [*(self.outputs if call else []), output]
        return output

    def advance(self, step: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.orders.add(_conditional_first(self.outputs, args, kwargs))
        return run(*args, **kwargs)

    @property
    def conditional_first(self) -> bool | None:
        return self.orders.pop() if len(self.orders) == 1 else None


def _conditional_first(
    outputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool | None:
    """Whether the first half of a step's only call is the branch that guidance adds: its weight in what the
    scheduler is given is the larger one (some pipelines turn the sign). None: its halves are no branches."""
    if len(outputs) != 1 or (len(args) < 3 and "sample" not in kwargs):
        return None
    output, (combined, _, sample) = outputs[0], step_arguments(args, kwargs)
    if doubled(outputs, combined, sample):
        combined = combined[: len(combined) // 2]
    if len(output) != 2 * len(combined):
        return None
    halves = output.chunk(2)
    if halves[0].numel() != combined.numel():  # learned variances
        halves = tuple(noise_part(half, combined.shape[-1 if combined.ndim == 3 else 1]) for half in halves)
    if halves[0].numel() != combined.numel():
        return None
    found = min((guidance_weights(halves, sign * combined) for sign in (1, -1)), key=lambda f: f[1])
    return found[0][0] > found[0][1]


def recording(denoiser: nn.Module, runs: Sequence[Callable[[], object]], scheduler: Any = None) -> Recording:
    """``record_outputs``, and which half of a guided call is the conditional one."""
    steps = _Steps()
    return Recording(record_outputs(denoiser, runs, scheduler, steps), steps.conditional_first)


def record_outputs(
    denoiser: nn.Module,
    runs: Sequence[Callable[[], object]],
    scheduler: Any = None,
    steps: _Steps | None = None,
) -> list[Recorded]:
    """Every denoiser call that ``runs`` make, with its output and the step of ``scheduler`` (None: each call
    is a step). Raises AquabitError where there is none, or one that is not finite."""
    made: list[Recorded] = []
    steps, number = steps or _Steps(), [0]

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", copy=True)

        call = mapped(args, copied), mapped(kwargs, copied)
        output = copied(output_tensor(result))
        made.append(Recorded(call, output, number[0], steps.now, has_row_list(result)))

    handle = denoiser.register_forward_hook(see, with_kwargs=True)
    try:
        for i, run in enumerate(runs):
            number[0] = i
            with following(denoiser, scheduler, [steps]):
                run()
    finally:
        handle.remove()
    if not made:
        raise AquabitError(
            f"no denoiser call was recorded from {len(runs)} micro-batches; fine-tuning needs images"
        )
    bad = [r for r in made if not bool(torch.isfinite(r.output).all())]
    if bad:
        raise AquabitError(
            f"the full-precision model returns NaN or infinity in step {bad[0].step} of its own images; it"
            " cannot teach"
        )
    return made


Leaf = Tensor | list[Tensor]  # a tensor, or a list of one a sample


def _changed(value: Any, rows: int | None, change: Callable[[Any], Any]) -> Any:
    """As ``mapped``; a list of ``rows`` tensors is one leaf."""
    if type(value) is list and len(value) == rows and all(isinstance(v, Tensor) for v in value):
        return change(value)
    if isinstance(value, dict):
        return {k: _changed(v, rows, change) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_changed(v, rows, change) for v in value)
    return change(value) if isinstance(value, Tensor) else value


def _rows(recorded: Recorded) -> int | None:
    """The length of a call's lists of samples; None where samples are rows of tensors."""
    return len(recorded.output) if recorded.lists else None


def leaves(recorded: Recorded) -> list[Leaf]:
    """The leaves of a call, in order."""
    found: list[Leaf] = []
    _changed(recorded.call, _rows(recorded), lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


@dataclass
class _Kind:
    """Samples that may share a batch. ``parts`` holds, for each leaf of the call, [samples, branches, ...] (a
    list of samples of lists of branches where that has lists), or None where it is shared (then it stands in
    ``template``)."""

    template: Recorded
    parts: list[Tensor | list[list[Tensor]] | None]
    target: Tensor


class Replay:
    """Samples of recorded calls, the last runs of them held out. ``branches``: 2 where a sample is a
    conditional and an unconditional row of one call, which stay together (the conditional one first)."""

    def __init__(self, recording: Recording, denoiser: nn.Module, branches: int = 1):
        calls = recording.calls
        self.branches, flip = branches, branches == 2 and not recording.conditional_first
        if branches == 2 and recording.conditional_first is None:
            raise AquabitError(
                "guidance does not combine the two halves of a denoiser call here (its branches are calls of"
                " their own, or the sampler is not followed); fine-tune without guidance"
            )
        odd = [len(c.output) for c in calls if len(c.output) % branches]
        if odd:
            raise AquabitError(
                f"a call of {odd[0]} rows is not two branches of guidance; fine-tune without guidance"
            )
        spread: dict[str, set[int]] = {}
        for c in calls:  # of each form of call
            if _form(c) not in spread:
                spread[_form(c)] = _spread(c, denoiser)
        keys: dict[Any, list[int]] = {}
        split = [_split(c, spread[_form(c)]) for c in calls]
        for i, (_, key) in enumerate(split):
            keys.setdefault(key, []).append(i)
        self.kinds: list[_Kind] = []
        self.places: list[tuple[int, int, int]] = []  # (run, row, step) of each sample
        self._where: list[tuple[int, int]] = []  # (kind, index in it)
        self._calls: list[range] = []  # samples of each call
        start = {
            i: n
            for members in keys.values()
            for i, n in zip(members, _starts(calls, members, branches), strict=True)
        }
        kind_of = {i: k for k, members in enumerate(keys.values()) for i in members}
        for members in keys.values():
            columns = [[split[i][0][j] for i in members] for j in range(len(split[members[0]][0]))]
            parts = [_joined(c, branches, flip) for c in columns]
            target = torch.cat([_paired(calls[i].output, branches, flip) for i in members])
            self.kinds.append(_Kind(calls[members[0]], parts, target))
        for i, c in enumerate(calls):
            rows = len(c.output) // branches
            self._calls.append(range(len(self.places), len(self.places) + rows))
            self.places += [(c.run, row, c.step) for row in range(rows)]
            self._where += [(kind_of[i], start[i] + row) for row in range(rows)]
        runs = sorted({c.run for c in calls})
        if len(runs) < 2:
            raise AquabitError(
                "the replay buffer has one batch of images; fine-tuning needs two, since one is held out"
            )
        held = set(runs[-max(1, len(runs) // HELD_OUT) :])
        self._held = [c.run in held for c in calls]
        self._epoch = lru_cache(1)(self._shuffled)

    def __len__(self) -> int:
        return len(self.places)

    def kind(self, sample: int) -> int:
        """The number of the kind that a sample is of: those of one may share a batch."""
        return self._where[sample][0]

    def output_of(self, sample: int) -> tuple[Any, ...]:
        """What tells the network and the form of a sample's output: those of one are equal in it."""
        template = self.kinds[self.kind(sample)].template
        return part_of(template.call), tuple(template.output.shape[1:])

    def batch(self, samples: Sequence[int], device: torch.device) -> tuple[Call, Tensor]:
        """A call of some samples (of one kind) and the outputs it should have, [branches * samples, ...]:
        one branch after the other."""
        kind = self.kinds[self._where[samples[0]][0]]
        index = torch.tensor([self._where[s][1] for s in samples])
        waiting = iter(kind.parts)

        def filled(shared: Leaf) -> Any:
            part = next(waiting)
            if part is None:
                return mapped(shared, lambda t: t.to(device))
            if isinstance(part, Tensor):
                return part[index].transpose(0, 1).flatten(0, 1).to(device)
            return [part[i][b].to(device) for b in range(self.branches) for i in index.tolist()]

        call = _changed(kind.template.call, _rows(kind.template), filled)
        return call, kind.target[index].transpose(0, 1).flatten(0, 1).to(device)

    def training(self, step: int, order: str, batch: int, seed: int) -> list[int]:
        """The samples of a step's batch: a function of these numbers alone."""
        if order == "walking":
            own = [c for c, held in zip(self._calls, self._held, strict=True) if not held]
            return list(own[step % len(own)])
        epoch, at = divmod(step, len(self._epoch(0, batch, seed)))
        return self._epoch(epoch, batch, seed)[at]

    def _shuffled(self, epoch: int, batch: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        by_kind: dict[int, list[int]] = {}
        for samples, held in zip(self._calls, self._held, strict=True):
            if not held:
                by_kind.setdefault(self._where[samples[0]][0], []).extend(samples)
        batches: list[list[int]] = []
        for own in by_kind.values():
            mixed = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
            whole = max(batch, len(mixed) // batch * batch)  # a last short batch would count its samples more
            batches += [mixed[i : i + batch] for i in range(0, min(whole, len(mixed)), batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def validation(self, batch: int, limit: int) -> list[list[int]]:
        """Batches of at most ``limit`` held-out samples, evenly spread over trajectories and steps."""
        by_kind: dict[int, list[int]] = {}
        for samples, held in zip(self._calls, self._held, strict=True):
            if held:
                by_kind.setdefault(self._where[samples[0]][0], []).extend(samples)
        total, batches = sum(map(len, by_kind.values())), []
        for own in by_kind.values():
            keep = max(1, min(len(own), round(limit * len(own) / total)))
            picked = [own[i * len(own) // keep] for i in range(keep)]
            batches += [picked[i : i + batch] for i in range(0, keep, batch)]
        return batches

    def continues(self, before: Sequence[int], now: Sequence[int]) -> bool:
        """Whether ``now`` holds the trajectories of ``before``, row by row, one step later."""
        later = [(run, row, step + 1) for run, row, step in (self.places[s] for s in before)]
        return later == [self.places[s] for s in now]


def _starts(calls: Sequence[Recorded], members: Sequence[int], branches: int) -> list[int]:
    """Where the samples of each member begin among those of all."""
    found, total = [], 0
    for i in members:
        found.append(total)
        total += len(calls[i].output) // branches
    return found


def _paired(tensor: Tensor, branches: int, flip: bool) -> Tensor:
    """[branches * n, ...] -> [n, branches, ...], the conditional branch first."""
    apart = tensor.unflatten(0, (branches, -1)).transpose(0, 1)
    return apart.flip(1) if flip else apart


def _joined(column: Sequence[Leaf | None], branches: int, flip: bool) -> Tensor | list[list[Tensor]] | None:
    """One leaf of several calls, by sample."""
    if isinstance(column[0], Tensor):
        return torch.cat([_paired(t, branches, flip) for t in column if isinstance(t, Tensor)])
    if column[0] is None:
        return None
    order = range(branches - 1, -1, -1) if flip else range(branches)
    return [
        [leaf[b * (len(leaf) // branches) + i] for b in order]
        for leaf in column
        if leaf is not None
        for i in range(len(leaf) // branches)
    ]


def _split(recorded: Recorded, spread: set[int]) -> tuple[list[Leaf | None], Any]:
    """A call's leaves that have one part a sample (None for the others), and what calls must agree in to
    share a batch."""
    rows, key, parts = len(recorded.output), list[Any](), list[Leaf | None]()
    for i, leaf in enumerate(leaves(recorded)):
        if isinstance(leaf, list):
            parts.append(leaf)
            key.append(("list", leaf[0].dtype))
            continue
        if i in spread:
            leaf = leaf.reshape(1).expand(rows)
        own = leaf.ndim > 0 and len(leaf) == rows
        parts.append(leaf if own else None)
        key.append(
            (leaf.dtype, tuple(leaf.shape[1:])) if own else (leaf.dtype, tuple(leaf.shape), weight_hash(leaf))
        )
    return parts, (tuple(key), _form(recorded), tuple(recorded.output.shape[1:]))


def _form(recorded: Recorded) -> str:
    """A call without its tensors."""
    return repr(_changed(recorded.call, _rows(recorded), lambda _: None))


@torch.no_grad()
def _spread(recorded: Recorded, denoiser: nn.Module) -> set[int]:
    """The single numbers of a call that the denoiser takes once a sample as well, with the same answer."""
    rows, found = len(recorded.output), set[int]()
    device = next(chain(denoiser.parameters(), denoiser.buffers())).device
    single = [
        i
        for i, leaf in enumerate(leaves(recorded))
        if isinstance(leaf, Tensor) and leaf.numel() == 1 and (leaf.ndim == 0 or rows > 1)
    ]
    for i in single:
        count = iter(range(len(leaves(recorded))))

        def given(leaf: Leaf, i: int = i, count: Any = count) -> Any:
            here = next(count) == i and isinstance(leaf, Tensor)
            return mapped(leaf.reshape(1).expand(rows) if here else leaf, lambda t: t.to(device))  # type: ignore[union-attr]

        args, kwargs = _changed(recorded.call, _rows(recorded), given)
        try:
            answer = output_tensor(denoiser(*args, **kwargs)).cpu()
        except Exception:  # whatever a denoiser says to a shape that it does not take
            continue
        close = (answer - recorded.output).abs().max() <= AGREE * recorded.output.abs().max()
        if answer.shape == recorded.output.shape and bool(close):
            found.add(i)
    return found
