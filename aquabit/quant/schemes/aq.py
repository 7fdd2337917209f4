"""``aq``: additive quantization of Linear and Conv2d weights (AQLM, arXiv 2401.06118; AQUATIC-Diff, arXiv
2506.05960), layer by layer.

A group of g weights is the sum of M codewords of 2^B vectors each, times a scale per output row; ``k`` groups
are one k x k kernel slice (KAQ). What is minimised is AQLM's loss tr(dW H dW^T), by other means:

1. scales = root mean square of a row; tables by residual k-means (``additive.first_tables``);
2. passes of codes, group after group, each group's error fed into the later ones as GPTQ does with columns
   (``additive.codes.feedback``),
   scales in closed form and tables by conjugate gradients (``additive.tables``). Groups whose inputs weigh
   most come first. On correlated inputs feedback finds codes that no search from other codes reaches: a
   quarter less loss at 4x4;
3. rounds of codes, each group searched on the residual gradient (W - W_hat) H (``additive.codes.sweep``),
   scales and tables; begun from the
   first pass too, since where codes are too few for what feedback asks of the last groups, more passes do
   harm;
4. tables and scales rounded to float16 as they are stored, and a last search of the codes against what was
   rounded.

The M codes of a group are searched together, by a beam of BEAM.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.calibration.hessian import check_hessian
from aquabit.quant.schemes.additive.codes import Feedback, feedback, sweep
from aquabit.quant.schemes.additive.first_tables import initial_tables, start
from aquabit.quant.schemes.additive.state import Problem, State
from aquabit.quant.schemes.additive.tables import fit_scales, fit_tables
from aquabit.quant.schemes.progress import Phase, Report, Step, no_report
from aquabit.scheme import AquabitError, Scheme

TOLERANCE = 2e-3  # relative improvement of a round below which the alternation stops
PASSES = 16
PATIENCE = 2  # passes are not monotone: so many without improvement end them
SETTLE = 2  # rounds of 3 after which its two beginnings are compared
ROUNDS = 8
# groups a codeword, and rows, that tables are learned on: against all rows, up to 3 % more loss
LEARNED, MIN_GROUPS = (128, 160)
# against 8: a tenth less loss at 4x4, a fifth at 6x4, for half as much time again; 64 doubles that for a
# hundredth
BEAM = 32


Codes = Callable[[Problem, State], None]  # gives a state new codes


def fit(
    weights: Sequence[Tensor], scheme: Scheme, hessians: Sequence[Tensor | None], seed: int, report: Report
) -> list[CodebookWeight]:
    """All weights together, with the identity where there is no H."""
    return additive(weights, scheme, hessians, seed, shared=scheme.shared, report=report)


def additive(
    weights: Sequence[Tensor],
    scheme: Scheme,
    hessians: Sequence[Tensor | None],
    seed: int = 0,
    *,
    shared: bool = False,
    beam: int = BEAM,
    report: Report = no_report,
) -> list[CodebookWeight]:
    """Quantize weights of one shape [out, in] or [out, in, kh, kw] together, each with its H (see
    ``hessian``), or identity.

    Together means in batched operations: the result is what each weight would get alone, up to rounding.

    Each weight gets tables of its own; with ``shared`` all of them use the same tables (the very same
    tensor). ``beam`` is the width of the search over the M codes of a group. Groups that do not divide a row
    are padded. Warns where a format has more codewords than the layer has groups (the rest stay zero) or
    groups longer than a row. H is positive semi-definite, as ``conditioned`` leaves it. Raises AquabitError
    for H that is not finite, and for weights of different shapes.
    """
    shapes = {tuple(w.shape) for w in weights}
    if len(shapes) != 1:
        raise AquabitError(f"weights quantized together must have one shape, got {sorted(shapes)}")
    shape = shapes.pop()
    problem, order = _problem(weights, shape, scheme, hessians, shared)
    _warn(problem, shape, scheme)
    state = _solve(problem, seed, beam, report)
    codes = torch.empty_like(state.codes)
    codes.scatter_(2, order[:, None, :, None].expand_as(codes), state.codes)
    state.codes = codes
    return _packed(problem, state, shape, scheme)


def _problem(
    weights: Sequence[Tensor],
    shape: tuple[int, ...],
    scheme: Scheme,
    hessians: Sequence[Tensor | None],
    shared: bool,
) -> tuple[Problem, Tensor]:
    """Rows in the order in which their groups are searched, padded, with H in the same order; and that
    order of groups, [Z, groups]."""
    layout, row = scheme.layout(shape), prod(shape[1:])
    size = layout.group
    checked = [check_hessian(h, w, definite=False) for w, h in zip(weights, hessians, strict=True)]
    if len({h.ndim for h in checked}) > 1:
        raise AquabitError("weights quantized together need H of one kind: all full, or all diagonal")
    moments = max(len(h) for h in checked)
    index = input_order(shape, layout.order).to(weights[0].device)
    extra = -row % size
    rows, metrics = [], []
    for weight, h in zip(weights, checked, strict=True):
        h = h.expand(moments, *h.shape[1:])
        if len(shape) > 2:
            h = h[:, index] if h.ndim == 2 else h[:, index][:, :, index]
        wide = weight.detach().float().reshape(moments, -1, row)[:, :, index]
        rows.append(pad(wide, (0, extra)) if extra else wide)
        metrics.append(pad(h, (0, extra) if h.ndim == 2 else (0, extra, 0, extra)) if extra else h)
        del h
    tables, metric = 1 if shared else len(weights), metrics[0] if len(metrics) == 1 else torch.cat(metrics)
    del metrics
    return _heaviest_first(Problem(torch.cat(rows), metric, tables, scheme.codebooks, 1 << scheme.bits, size))


def _heaviest_first(problem: Problem) -> tuple[Problem, Tensor]:
    """The problem with each block's groups by falling trace of H_nn, and their order [Z, groups]."""
    diagonal = problem.hessian if problem.diagonal else problem.hessian.diagonal(dim1=1, dim2=2)
    order = (
        diagonal.reshape(len(diagonal), problem.groups, problem.size)
        .sum(2)
        .argsort(dim=1, descending=True, stable=True)
    )
    index = (order[..., None] * problem.size + torch.arange(problem.size, device=order.device)).reshape(
        len(order), -1
    )
    weight = problem.weight.gather(2, index[:, None].expand_as(problem.weight))
    if problem.diagonal:
        return replace(problem, weight=weight, hessian=problem.hessian.gather(1, index)), order
    hessian = torch.empty_like(problem.hessian)
    for into, h, i in zip(hessian, problem.hessian, index, strict=True):
        torch.index_select(h[i], 1, i, out=into)
    return replace(problem, weight=weight, hessian=hessian), order


def input_order(shape: tuple[int, ...], order: str) -> Tensor:
    """Positions in ``weight.flatten(1)`` of a row's weights in the order of their groups: (cin, kh, kw),
    or (kh, kw, cin)."""
    index = torch.arange(prod(shape[1:]))
    if len(shape) == 2 or order == "kernel":
        return index
    return index.reshape(shape[1:]).permute(1, 2, 0).reshape(-1)


def _warn(problem: Problem, shape: tuple[int, ...], scheme: Scheme) -> None:
    row, groups = prod(shape[1:]), problem.groups * problem.weight.shape[1] * problem.per_table
    if problem.size > row:
        warnings.warn(
            f"{scheme} on a weight {list(shape)}: groups of {problem.size} are longer than a row, which is"
            " padded",
            stacklevel=3,
        )
    if groups < problem.codewords:
        text = (
            f"{scheme} on a weight {list(shape)}: {groups} groups use at most as many of {problem.codewords}"
            " codewords, the others are 0"
        )
        warnings.warn(text, stacklevel=3)


def _solve(problem: Problem, seed: int, beam: int, report: Report) -> State:
    """Tables are learned on as many rows as they need; then all rows get codes, and the tables their last
    rounds."""
    started = time.perf_counter()
    beam = beam if problem.codebooks > 1 else 1
    factor = Feedback.of(problem)
    part = _sampled(problem, seed)

    def rounds(on: Problem, state: State, codes: Codes, most: int, phase: Phase | None = None) -> Tensor:
        norm = max(on.norm, 1e-30)

        def tell(number: int, loss: float) -> None:
            if phase is not None:
                report(Step(phase, number, loss / norm, time.perf_counter() - started))

        patience = PATIENCE if codes is assign else 1
        return _improve(on, state, lambda trial: codes(on, trial), most, patience, tell)

    def assign(on: Problem, state: State) -> None:
        feedback(on, state, factor, beam)

    def search(on: Problem, state: State) -> None:
        sweep(on, state, beam)

    state = initial_tables(part, factor.metric, seed)
    rounds(part, state, assign, 1)
    early = state.copy()
    rounds(part, state, assign, PASSES, "feedback")
    losses, other = rounds(part, state, search, SETTLE), rounds(part, early, search, SETTLE)
    state.take_(early, other < losses)
    if part is not problem:
        state = start(problem, state.tables)
        rounds(problem, state, assign, 2, "feedback")
    rounds(problem, state, search, ROUNDS, "round")
    state.round_()
    report(
        Step(
            "final", 1, sweep(problem, state, beam) / max(problem.norm, 1e-30), time.perf_counter() - started
        )
    )
    return state


def _sampled(problem: Problem, seed: int) -> Problem:
    """The problem on some of its rows: LEARNED groups a codeword and at least MIN_GROUPS, where that is at
    most half of them."""
    rows = problem.weight.shape[1]
    wanted = max(
        ceil(LEARNED * problem.codebooks * problem.codewords / (problem.groups * problem.per_table)),
        MIN_GROUPS,
    )
    if 2 * wanted > rows:
        return problem
    picked = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
    return replace(problem, weight=problem.weight[:, picked.to(problem.weight.device)])


def _improve(
    problem: Problem,
    state: State,
    codes: Callable[[State], None],
    rounds: int,
    patience: int,
    tell: Callable[[int, float], None],
) -> Tensor:
    """Rounds of codes, scales and tables, each set of tables until ``patience`` of them in a row improve its
    loss by less than TOLERANCE.

    ``state`` ends as the best seen of each set; returned are its losses [T].
    """
    trial = state.copy()
    best = torch.full((problem.tables,), torch.inf, dtype=torch.float64, device=state.tables.device)
    running, stale = torch.ones_like(best, dtype=torch.bool), torch.zeros_like(best, dtype=torch.int64)
    for number in range(rounds):
        codes(trial)
        fit_scales(problem, trial)
        losses = fit_tables(problem, trial)
        better, settled = running & (losses < best), losses > best * (1 - TOLERANCE)
        state.take_(trial, better)
        stale = torch.where(settled, stale + 1, 0)
        best, running = torch.where(better, losses, best), running & (stale < patience)
        tell(number + 1, float(best.sum()))
        if not bool(running.any()):
            break
    return best


def _packed(problem: Problem, state: State, shape: tuple[int, ...], scheme: Scheme) -> list[CodebookWeight]:
    """CodebookWeights from the state; those that share tables hold one tensor."""
    out, order = shape[0], scheme.layout(shape).order
    count = len(problem.weight) * problem.weight.shape[1] // out
    codes = state.codes.reshape(count, out, problem.groups, problem.codebooks)
    scales = state.scale.reshape(count, out).half()
    tables = state.tables.half()
    shared = [t[None].contiguous() for t in tables]
    packed = []
    for i in range(count):
        table = shared[i * len(shared) // count]
        packed.append(
            CodebookWeight.from_codes(
                codes[i].permute(1, 2, 0).contiguous(), table, scales[i], None, shape, scheme.bits, order
            )
        )
    return packed
