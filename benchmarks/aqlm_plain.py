"""AQLM's layer-wise procedure in plain torch, as published: the baseline of the additive quantizer's
benchmark.

The procedure is that of Extreme Compression of Large Language Models via Additive Quantization (arXiv
2401.06118); defaults, order of phases and stopping rule were read off the authors' released program
(github.com/Vahe1994/AQLM), and the code is our own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aquabit.scheme import AquabitError

KMEANS_ITERATIONS = 100
KMEANS_CHECK = 10  # iterations between two tests of convergence
KMEANS_BLOCK = 1 << 19  # distances held at once: within a cache
EPSILON = 1e-9  # added to a row's norm
BETAS = (0.0, 0.95)

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Result:
    """decoded[o, group j] = scales[o] * sum_m codebooks[m, codes[o, j, m]]."""

    decoded: Tensor  # [out, in] float32
    codes: Tensor  # [out, in / g, M] int64
    codebooks: Tensor  # [M, 2^B, g] float32
    scales: Tensor  # [out] float32
    loss: float  # tr(dW H dW^T), float64
    rounds: int  # sweeps of the search over all codes
    history: list[
        tuple[str, float, float]
    ]  # after each phase: "init", "adam" or "search"; CPU seconds so far; loss


def aqlm(
    weight: Tensor,
    hessian: Tensor,
    codebooks: int,
    bits: int,
    group: int,
    seed: int = 0,
    tolerance: float = 0.01,
    adam_steps: int = 100,
    lr: float = 1e-4,
    max_rounds: int = 1000,
    callback: Progress | None = None,
) -> Result:
    """Quantize ``weight`` [out, in] under H [in, in] to M = ``codebooks`` tables of 2^``bits`` vectors of
    ``group`` weights.

    Scales start as the rows' L2 norms, codes and tables by residual k-means on the normalised groups. A round
    is ``adam_steps`` of Adam (beta 0 and 0.95, amsgrad, one state for the whole run) on tables and scales,
    minimising tr(dW H dW^T) / out with the product in float64, then one sweep of the search with beam size 1.
    It ends as published: where a round begins less than ``tolerance`` (relative) below the best loss that an
    earlier one began with, so its last phase is a search.

    Three things cost less than in the released program, with the same result up to rounding: the gradient of
    the loss takes one product with H, where differentiating the formula takes two; dW H[:, group] is computed
    once per group and updated by rank g between its codebooks, not once per codebook; and only the group that
    changed is decoded again, not the whole weight.

    ``callback`` is called with each entry of the history. Seconds are of the process's CPU time and leave out
    the losses that are computed for the history alone. Raises AquabitError where the inputs are no whole
    number of groups or shapes do not match.
    """
    out, inputs = weight.shape
    if inputs % group or hessian.shape != (inputs, inputs):
        raise AquabitError(
            f"a weight {[out, inputs]} with H {list(hessian.shape)} needs H [{inputs}, {inputs}] and inputs"
            f" divisible by {group}"
        )
    reference = weight.detach().float()
    wide = ((hessian + hessian.T) / 2).double()
    history: list[tuple[str, float, float]] = []
    started = time.process_time()

    def record(phase: str) -> float:
        nonlocal started
        seconds = time.process_time() - started
        history.append(
            (phase, seconds, output_loss(reference - decode(codes, tables, scales).detach(), wide))
        )
        if callback is not None:
            callback(*history[-1])
        started = time.process_time() - seconds
        return history[-1][2]

    scales = (reference.norm(dim=1) + EPSILON).requires_grad_()
    codes, tables = residual_kmeans(
        reference / scales.detach()[:, None], codebooks, 1 << bits, group, torch.Generator().manual_seed(seed)
    )
    tables.requires_grad_()
    optimizer = torch.optim.Adam([tables, scales], lr=lr, betas=BETAS, amsgrad=True)
    order = random.Random(seed)
    loss, best, rounds = record("init"), float("inf"), 0
    while rounds < max_rounds and loss <= (1 - tolerance) * best:
        best = min(best, loss)
        for _ in range(adam_steps):
            adam_step(optimizer, reference, wide, codes, tables, scales)
        record("adam")
        search_(codes, tables.detach(), scales.detach(), reference, wide.float(), order)
        rounds += 1
        loss = record("search")
    decoded = decode(codes, tables, scales).detach()
    return Result(decoded, codes, tables.detach(), scales.detach(), loss, rounds, history)


def output_loss(difference: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) in H's type."""
    wide = difference.to(hessian.dtype)
    return float(((wide @ hessian) * wide).sum())


def decode(codes: Tensor, tables: Tensor, scales: Tensor) -> Tensor:
    """[out, in] from codes [out, groups, M], tables [M, K, g] and scales [out]; differentiable in the last
    two."""
    count, size, group = tables.shape
    offsets = torch.arange(count, device=codes.device) * size
    sums = F.embedding_bag((codes + offsets).reshape(-1, count), tables.reshape(-1, group), mode="sum")
    return sums.reshape(len(codes), -1) * scales[:, None]


def adam_step(
    optimizer: torch.optim.Adam,
    reference: Tensor,
    hessian: Tensor,
    codes: Tensor,
    tables: Tensor,
    scales: Tensor,
) -> None:
    """One step on tr(dW H dW^T) / out, whose derivative by the decoded weight is 2 dW H / out."""
    decoded = decode(codes, tables, scales)
    product = (decoded.detach() - reference).to(hessian.dtype) @ hessian
    optimizer.zero_grad()
    decoded.backward((2 / len(reference) * product).to(decoded.dtype))
    optimizer.step()


@torch.no_grad()
def search_(
    codes: Tensor, tables: Tensor, scales: Tensor, reference: Tensor, hessian: Tensor, order: random.Random
) -> None:
    """One sweep: for each group and codebook, in random order, every row takes the codeword of least loss
    given all its others.

    With the current codeword removed and P = dW H[:, group], codeword c changes a row's loss by s^2 c^T
    H[group, group] c - 2 s P c.
    """
    count, _, group = tables.shape
    difference = reference - decode(codes, tables, scales)
    squares, column = scales.square(), scales[:, None]
    for j in shuffled(codes.shape[1], order):
        span = slice(j * group, (j + 1) * group)
        product, block = difference @ hessian[:, span], hessian[span, span]
        for m in shuffled(count, order):
            table = tables[m]
            current = table[codes[:, j, m]] * column
            product += current @ block
            norms = ((table @ block) * table).sum(1)
            codes[:, j, m] = torch.addmm(
                torch.outer(squares, norms), column * product, table.T, alpha=-2
            ).argmin(1)
            chosen = table[codes[:, j, m]] * column
            product -= chosen @ block
            difference[:, span] += current - chosen


def shuffled(count: int, order: random.Random) -> list[int]:
    numbers = list(range(count))
    order.shuffle(numbers)
    return numbers


def residual_kmeans(
    normalised: Tensor, count: int, size: int, group: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes [out, groups, M] and tables [M, K, g]: one k-means after another over all groups, each on what
    the last ones left."""
    residual = normalised.reshape(-1, group).clone()
    codes, tables = [], []
    for _ in range(count):
        table = kmeans(residual, size, generator)
        code = nearest(residual, table)
        residual -= table[code]
        codes.append(code)
        tables.append(table)
    return torch.stack(codes, 1).reshape(len(normalised), -1, count), torch.stack(tables)


def kmeans(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Lloyd's iterations from sampled points; a centre without points stays. Centres [size, g], repeated
    where points are fewer."""
    chosen = torch.randperm(len(points), generator=generator)[:size].to(points.device)
    centres = points[chosen.repeat(-(-size // len(chosen)))[:size]]
    for i in range(KMEANS_ITERATIONS):
        code = nearest(points, centres)
        counts = torch.bincount(code, minlength=size)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, code, points)
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        if i % KMEANS_CHECK == 0 and torch.allclose(moved, centres, rtol=1e-6, atol=1e-8):
            break
        centres = moved
    return centres


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of each point's nearest centre, [n] int64."""
    halves = -0.5 * centres.square().sum(1)
    rows = max(1, KMEANS_BLOCK // len(centres))
    return torch.cat([torch.addmm(halves, block, centres.T).argmax(1) for block in points.split(rows)])
