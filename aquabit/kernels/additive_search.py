"""The additive quantizer's code search over a block of groups: in C++ on a CPU, and its reference in torch.

Weights are rows [Z, O, R]: Z blocks of O rows, each row n groups of g weights, R = n g. ``tables`` [T, M, K,
g] are M codebooks of K codewords; block z uses set z // (Z / T). A group stands for scale times the sum c of
one codeword of each codebook. Its codes are to minimise c metric c^T - 2 c pull^T, and two searches look for
them: each codeword replaced by its best given the others, in turn; and, for a beam above 1, from nothing, the
``beam`` best sums grown codebook by codebook. Groups are searched in order, and what the outcome of one means
for those after it is applied before they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.kernels.extension import chosen
from aquabit.kernels.extension import native as _native

Backend = Literal["native", "reference"]

CODEBOOKS = 64  # the most that the extension serves
SMALL = 1e-30  # scales up to this are as good as none


class Problem(NamedTuple):
    """What a search of rows is given: ``metric`` [Z, n, g, g], ``tables`` [T, M, K, g], ``scale`` [Z, O];
    ``coupling`` [Z, R, R], or None where groups do not hear of each other."""

    metric: Tensor
    tables: Tensor
    scale: Tensor
    coupling: Tensor | None
    beam: int


class Found(NamedTuple):
    """``codes`` [Z, O, n, M] int64; ``moved`` [Z, O, R]: what later blocks have to hear of, times their part
    of the coupling.

    ``gain`` [Z, O] float64: the change of each row's loss by a sweep, which is not positive, up to rounding;
    0 with feedback.
    """

    codes: Tensor
    moved: Tensor
    gain: Tensor


def feedback_search(
    weight: Tensor,
    metric: Tensor,
    tables: Tensor,
    scale: Tensor,
    beam: int = 1,
    *,
    inverse: Tensor | None = None,
    coupling: Tensor | None = None,
    backend: Backend | None = None,
) -> Found:
    """Codes from nothing for ``weight`` [Z, O, R] under ``metric`` [Z, n, g, g] and ``scale`` [Z, O].

    The error (w - q) ``inverse``_n [Z, n, g, g] of each group, times ``coupling`` [Z, R, R], is taken from
    the groups after it; ``moved`` is the errors. Without ``inverse`` errors are w - q, without ``coupling``
    groups do not hear of each other. Raises AquabitError where ``backend`` cannot serve.
    """
    problem = Problem(metric, tables, scale, coupling, beam)
    if select(backend, weight, tables) == "native":
        return _search_natively(weight, problem, inverse=inverse)
    return _feedback_reference(weight, problem, inverse)


def sweep_search(
    gradient: Tensor,
    decoded: Tensor,
    codes: Tensor,
    metric: Tensor,
    tables: Tensor,
    scale: Tensor,
    beam: int = 1,
    *,
    coupling: Tensor | None = None,
    backend: Backend | None = None,
) -> Found:
    """Codes, starting from ``codes``, that decode to ``decoded``, on the ``gradient`` (w - decoded) H, both
    [Z, O, R].

    ``metric`` [Z, n, g, g] are the diagonal blocks of H, ``coupling`` [Z, R, R] is H, None where it is
    block-diagonal; ``moved`` is the change of the decoded weights. Raises AquabitError where ``backend``
    cannot serve.
    """
    problem = Problem(metric, tables, scale, coupling, beam)
    if select(backend, gradient, tables) == "native":
        return _search_natively(gradient, problem, decoded, codes)
    return _sweep_reference(gradient, problem, decoded, codes)


def select(backend: Backend | None, rows: Tensor, tables: Tensor) -> Backend:
    """What serves these tensors: ``backend``, or the best there is. Raises AquabitError where ``backend``
    cannot."""
    return chosen(backend, _missing(rows, tables))


def _missing(rows: Tensor, tables: Tensor) -> str | None:
    if not hasattr(_native, "additive_search"):
        return "needs the C++ extension, which is not there"
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return f"works on float32 on a CPU, not on {rows.dtype} on {rows.device}"
    if tables.shape[1] > CODEBOOKS:
        return f"works with up to {CODEBOOKS} codebooks, not {tables.shape[1]}"
    return None


class _Call(NamedTuple):
    """What the extension reads, by these names; it checks shapes and kinds. ``target``, ``codes``, ``moved``
    and ``gain`` are written to."""

    target: Tensor
    decoded: Tensor | None
    codes: Tensor
    metric: Tensor
    tables: Tensor
    scale: Tensor
    inverse: Tensor | None
    coupling: Tensor | None
    beam: int
    moved: Tensor
    gain: Tensor


def _search_natively(
    target: Tensor,
    problem: Problem,
    decoded: Tensor | None = None,
    codes: Tensor | None = None,
    *,
    inverse: Tensor | None = None,
    level: int = 0,
) -> Found:
    """``level``: index into the extension's list of instruction sets, best first. Raises AquabitError for
    tensors that do not fit each other."""
    (z, o, r), (_, m, _, g) = target.shape, problem.tables.shape
    found = target.new_zeros(z, o, r // g, m, dtype=torch.int64) if codes is None else _copied(codes)
    changed = _copied(target)  # later groups' part of it is changed on the way
    moved, gain = torch.empty_like(changed), target.new_zeros(z, o, dtype=torch.float64)
    call = _Call(
        changed,
        _plain(decoded),
        found,
        problem.metric.float().contiguous(),
        problem.tables.float().contiguous(),
        problem.scale.float().contiguous(),
        _plain(inverse),
        _plain(problem.coupling),
        problem.beam,
        moved,
        gain,
    )
    try:
        _native.additive_search(call, torch.get_num_threads(), level)
    except ValueError as error:
        raise AquabitError(f"the code search: {error}") from None
    return Found(found, moved, gain)


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _feedback_reference(weight: Tensor, problem: Problem, inverse: Tensor | None) -> Found:
    metric, tables, scale, coupling, beam = problem
    rows, size = weight.clone(), tables.shape[3]
    of_blocks = _of_blocks(tables, len(weight))
    codes, errors = [], torch.empty_like(rows)
    for n in range(rows.shape[2] // size):
        at, rest = slice(n * size, (n + 1) * size), slice((n + 1) * size, None)
        pull = torch.bmm(_unscaled(rows[..., at], scale), metric[:, n])
        found, total = _choose(pull, metric[:, n], of_blocks, None, beam)
        codes.append(found)
        error = rows[..., at] - total * scale[..., None]
        errors[..., at] = error if inverse is None else torch.bmm(error, inverse[:, n])
        if coupling is not None:
            rows[..., rest] -= torch.bmm(errors[..., at], coupling[:, at, rest])
    return Found(torch.stack(codes, 2), errors, weight.new_zeros(weight.shape[:2], dtype=torch.float64))


def _sweep_reference(gradient: Tensor, problem: Problem, decoded: Tensor, codes: Tensor) -> Found:
    metric, tables, scale, coupling, beam = problem
    gradient, codes, size = gradient.clone(), codes.clone(), tables.shape[3]
    of_blocks = _of_blocks(tables, len(gradient))
    moved, gain = torch.empty_like(gradient), gradient.new_zeros(gradient.shape[:2], dtype=torch.float64)
    for n in range(gradient.shape[2] // size):
        at, rest = slice(n * size, (n + 1) * size), slice((n + 1) * size, None)
        before = decoded[..., at]
        pull = _unscaled(gradient[..., at], scale) + torch.bmm(_unscaled(before, scale), metric[:, n])
        codes[:, :, n], total = _choose(pull, metric[:, n], of_blocks, codes[:, :, n], beam)
        moved[..., at] = total * scale[..., None] - before
        gain += _cost(moved[..., at], gradient[..., at], metric[:, n])
        if coupling is not None:
            gradient[..., rest] -= torch.bmm(moved[..., at], coupling[:, at, rest])
    return Found(codes, moved, gain)


def _of_blocks(tables: Tensor, blocks: int) -> list[Tensor]:
    """Each codebook of every block, [Z, K, g]."""
    return list(tables.repeat_interleave(blocks // len(tables), 0).unbind(1))


def _unscaled(rows: Tensor, scale: Tensor) -> Tensor:
    return rows / torch.where(scale.abs() > SMALL, scale, torch.ones_like(scale))[..., None]


def _choose(
    pull: Tensor, metric: Tensor, tables: list[Tensor], codes: Tensor | None, beam: int
) -> tuple[Tensor, Tensor]:
    """Codes [Z, O, M] for pulls [Z, O, g], from ``codes`` or from nothing; the sum of their codewords [Z,
    O, g]."""
    own = [(torch.bmm(t, metric) * t).sum(2)[:, None] for t in tables]  # [Z, 1, K]
    chosen = [
        torch.zeros_like(pull) if codes is None else _rows(t, codes[..., m]) for m, t in enumerate(tables)
    ]
    total = torch.stack(chosen).sum(0) if len(chosen) > 1 else chosen[0]
    picked = []
    for m, table in enumerate(tables):
        others = total - chosen[m]
        left = pull - torch.bmm(others, metric) if len(tables) > 1 else pull
        picked.append(torch.baddbmm(own[m], left, table.transpose(1, 2), alpha=-2).argmin(2))
        chosen[m] = _rows(table, picked[m])
        total = others + chosen[m]
    found = torch.stack(picked, -1)
    return _beam(pull, metric, tables, own, beam, found, total) if beam > 1 else (found, total)


def _rows(table: Tensor, codes: Tensor) -> Tensor:
    """table [Z, K, g] at codes [Z, O]: [Z, O, g]."""
    return table.gather(1, codes[..., None].expand(-1, -1, table.shape[2]))


def _cost(total: Tensor, pull: Tensor, metric: Tensor) -> Tensor:
    return ((torch.bmm(total, metric) - 2 * pull) * total).sum(2)


def _beam(
    pull: Tensor,
    metric: Tensor,
    tables: list[Tensor],
    own: list[Tensor],
    beam: int,
    found: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    """The better, row by row, of ``found`` (its sum ``total``) and the best of ``beam`` partial sums grown
    codebook by codebook."""
    z, o, g = pull.shape
    sums, value = pull.new_zeros(z, o, 1, g), pull.new_zeros(z, o, 1)
    codes = torch.zeros(z, o, 1, 0, dtype=torch.int64, device=pull.device)
    for m, table in enumerate(tables):
        width, k = sums.shape[2], table.shape[1]
        left = pull[:, :, None] - torch.bmm(sums.reshape(z, o * width, g), metric).reshape(z, o, width, g)
        score = torch.baddbmm(own[m], left.reshape(z, o * width, g), table.transpose(1, 2), alpha=-2).reshape(
            z, o, width, k
        )
        score = (score + value[..., None]).reshape(z, o, width * k)
        keep = min(beam if m + 1 < len(tables) else 1, width * k)
        value, at = score.topk(keep, 2, largest=False)
        parent, code = at // k, at % k
        sums = sums.gather(2, parent[..., None].expand(-1, -1, -1, g)) + _rows(
            table, code.reshape(z, -1)
        ).reshape(z, o, keep, g)
        codes = torch.cat(
            [codes.gather(2, parent[..., None].expand(-1, -1, -1, codes.shape[3])), code[..., None]], 3
        )
    better = _cost(sums[:, :, 0], pull, metric) < _cost(total, pull, metric)
    return torch.where(better[..., None], codes[:, :, 0], found), torch.where(
        better[..., None], sums[:, :, 0], total
    )
