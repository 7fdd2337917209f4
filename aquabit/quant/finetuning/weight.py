"""A coded weight while it is trained: float32 codebooks, scale and offset, integer codes, and their gradients
from the dense weight's.

W[o, n] = scale[o] * sum_m codebooks[codes[o, n, m]] + offset[o] over groups n of g weights, so with G =
dL/dW, taken apart into groups: dL/dcodebook[k] = sum of scale * G over the groups that use k, dL/dscale = sum
of G * (sum of codewords), dL/doffset = sum of G.
"""

from __future__ import annotations

from math import log, prod

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from aquabit.kernels.additive_search import SMALL, sweep_search
from aquabit.kernels.codebook import CodebookWeight, Scale, ceil_divide
from aquabit.kernels.fixed_levels import level_values, nearest_codes
from aquabit.quant.schemes.scalar import halves

EPSILON = 1e-12
JOINT = 4096  # rows of 8 weights, 128 kB: caches hold them


class Parameter:
    """A float32 tensor with its gradient and AdamW's state. ``unit`` is the root mean square it starts with:
    rates are relative to it. One that is ``fixed`` keeps its value.

    ``masses`` are what the moments' weights add up to (1 - beta^t), so that a moment that was forgotten is
    corrected as a new one.
    """

    def __init__(self, value: Tensor, fixed: bool = False):
        self.fixed = fixed
        self.value = value.float().clone()
        self.gradient, self.first, self.second = (torch.zeros_like(self.value) for _ in range(3))
        self.masses = [0.0, 0.0]
        self.unit = float(self.value.square().mean().sqrt())

    def step_(self, rate: float, betas: tuple[float, float], decay: float) -> None:
        """One step of AdamW (Loshchilov and Hutter, algorithm 2); the gradient is used up."""
        self.masses = [b * m + 1 - b for b, m in zip(betas, self.masses, strict=True)]
        self.first.lerp_(self.gradient, 1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(self.gradient, self.gradient, value=1 - betas[1])
        self.value.mul_(1 - rate * decay)
        size = (self.second / self.masses[1]).sqrt_().add_(EPSILON)
        self.value.addcdiv_(self.first, size, value=-rate * self.unit / self.masses[0])
        self.gradient.zero_()

    def forget_(self) -> None:
        """Without a first moment, as before the first step."""
        self.first.zero_()
        self.masses[0] = 0.0

    def state(self) -> dict[str, Tensor]:
        masses = torch.tensor(self.masses, dtype=torch.float64)
        return {"value": self.value, "first": self.first, "second": self.second, "masses": masses}

    def restore_(self, state: dict[str, Tensor]) -> None:
        for name in ("value", "first", "second"):
            getattr(self, name).copy_(state[name])
        self.masses = state["masses"].tolist()


class TrainedWeight:
    """One layer's codes, its scale and offset, and the tables it may share with other layers.

    ``index`` [O, n, M] int64 are rows of ``tables.value.view(-1, g)``, or the codes themselves where the
    table is implied (uniform). ``values`` [O, n, g] are the sums of codewords, ``decoded`` the weight in
    groups; both are kept up to date by ``decode_``.
    """

    def __init__(self, coded: CodebookWeight, tables: Parameter | None):
        self.shape, self.bits, self.order, self.tables = tuple(coded.shape), coded.bits, coded.order, tables
        self.size, self.row = coded.group, prod(coded.shape[1:])
        self.index = coded.codes.permute(2, 0, 1).long().contiguous()
        if tables is not None:
            self.index += self._bases()
        self.start = self.index.clone()
        self.levels, self.kept = coded.levels, (coded.scale, coded.offset)
        self.scale, self.offset = (None if t is None else _factor_of(t, self.shape[0]) for t in self.kept)
        self.decode_()
        self.unit = float(self.dense().square().mean().sqrt())

    def _bases(self) -> Tensor:
        """The first row of each codebook: [1 or O, 1, M]."""
        assert self.tables is not None
        c, m, k, _ = self.tables.value.shape
        return (torch.arange(c * m, device=self.tables.value.device) * k).view(c, 1, m)

    @property
    def parameters(self) -> list[Parameter]:
        found = (self.tables, self.scale, self.offset)
        return [p for p in found if p is not None and not p.fixed]

    @property
    def groups(self) -> int:
        return self.index.shape[0] * self.index.shape[1]

    def grouped(self, dense: Tensor) -> Tensor:
        """A dense weight or gradient [out, in (, kh, kw)] as [O, n, g], padded with zeros."""
        wide = dense.float()
        if wide.ndim == 4 and self.order == "inputs":
            wide = wide.permute(0, 2, 3, 1)
        flat = wide.reshape(len(wide), -1)
        short = self.index.shape[1] * self.size - flat.shape[1]
        return (pad(flat, (0, short)) if short else flat).view(len(wide), -1, self.size)

    def dense(self, groups: Tensor | None = None) -> Tensor:
        """``groups`` [O, n, g], by default the decoded weight, in the layer's shape."""
        flat = (self.decoded if groups is None else groups).flatten(1)[:, : self.row]
        if len(self.shape) == 4 and self.order == "inputs":
            out, cin, kh, kw = self.shape
            return flat.view(out, kh, kw, cin).permute(0, 3, 1, 2)
        return flat.view(self.shape)

    def spread(self, factor: Tensor) -> Tensor:
        """A scale or offset [out] or [out, s] beside the groups: [O, 1 or n, 1]."""
        if factor.ndim == 1 or factor.shape[1] == 1:
            return factor.view(-1, 1, 1)
        return factor.repeat_interleave(ceil_divide(self.row, factor.shape[1]), 1)[:, : self.row, None]

    def _gathered(self, sums: Tensor, like: Tensor) -> Tensor:
        """The transpose of ``spread``: [O, n, g] summed into the shape of a scale or offset."""
        if like.ndim == 1 or like.shape[1] == 1:
            return sums.sum((1, 2)).view_as(like)
        per = ceil_divide(self.row, like.shape[1])
        return pad(sums.flatten(1), (0, like.shape[1] * per - self.row)).view(*like.shape, per).sum(2)

    def looked_up(self, index: Tensor, table: Tensor | None = None) -> Tensor:
        """Sums of codewords for ``index`` [..., M]: [..., g]; ``table`` instead of the trained one."""
        if self.tables is None:
            return level_values(self.levels, self.bits, index)
        rows = (self.tables.value if table is None else table).view(-1, self.size)
        if self.size == 1 and index.shape[-1] == 1:
            return rows.view(-1)[index]
        found = embedding_bag(index.reshape(-1, index.shape[-1]), rows, mode="sum")
        return found.view(*index.shape[:-1], self.size)

    def decode_(self) -> None:
        """``values`` and ``decoded`` from codes, tables, scale and offset as they are now."""
        self.values = self.looked_up(self.index)
        self.decoded = self._affine(
            self.values, *(None if p is None else p.value for p in (self.scale, self.offset))
        )

    def _affine(self, values: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        scaled = values if scale is None else values * self.spread(scale)
        return scaled if offset is None else scaled + self.spread(offset)

    def stored(self) -> Tensor:
        """The weight as it will be once tables, scale and offset are rounded to float16."""
        tables, scale, offset = (
            None if p is None else p.value if p.fixed else halves(p.value)
            for p in (self.tables, self.scale, self.offset)
        )
        return self.dense(self._affine(self.looked_up(self.index, tables), scale, offset))

    def add_gradients_(self, gradient: Tensor) -> None:
        """Add to the gradients of tables, scale and offset what dL/dW in groups [O, n, g] means for them."""
        if self.scale is not None and not self.scale.fixed:
            self.scale.gradient += self._gathered(gradient * self.values, self.scale.value)
        if self.offset is not None and not self.offset.fixed:
            self.offset.gradient += self._gathered(gradient, self.offset.value)
        if self.tables is not None:
            scaled = gradient if self.scale is None else gradient * self.spread(self.scale.value)
            self._add_to_tables_(scaled.reshape(-1, self.size), self.tables.gradient)

    def _add_to_tables_(self, rows: Tensor, into: Tensor) -> None:
        """Add each group's row [O * n, g] to the codewords that it uses, in ``into`` [C, M, K, g]: over joint
        codes of as many codebooks as JOINT allows, then over what they share (half to a third of the time of
        one codebook after another).
        """
        c, count, k, _ = into.shape
        if c > 1:
            into.view(-1, self.size).index_add_(0, self.index.view(-1), rows)
            return
        together = max(1, int(log(JOINT, k) + 1e-9))
        for first in range(0, count, together):
            books = range(first, min(first + together, count))
            joint, base = torch.zeros_like(self.index[..., 0]), 0
            for m in books:
                joint, base = joint.mul_(k).add_(self.index[..., m]), base * k + m * k
            sums = rows.new_zeros(k ** len(books), self.size).index_add_(0, joint.sub_(base).view(-1), rows)
            apart = sums.view(*[k] * len(books), self.size)
            for axis, m in enumerate(books):
                into[0, m] += (
                    apart.sum([a for a in range(len(books)) if a != axis]) if len(books) > 1 else apart
                )

    def nearest(self, chosen: Tensor, target: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        """For the groups ``chosen`` [k] of O * n: codes as ``index`` has them [k, M] and the weights they
        decode to [k, g], never farther from ``target`` [k, g] than the present ones, up to rounding. Exact
        for scalar codes, else a beam search.
        """
        flat = self.index.view(-1, self.index.shape[2])
        out = chosen // self.index.shape[1]
        scale, offset = (self._factor(p, chosen) for p in (self.scale, self.offset))
        centred = target if offset is None else target - offset
        one = torch.ones_like(target[:, :1]) if scale is None else scale
        if self.tables is None:
            wanted = nearest_codes(
                self.levels, self.bits, centred / torch.where(one.abs() > SMALL, one, torch.ones_like(one))
            )
            index = torch.where(one.abs() > SMALL, wanted, flat[chosen])
        elif len(self.tables.value) > 1:  # tables of their own for each output channel
            index = (
                (centred[:, None] - one[:, None] * self.tables.value[out, 0]).square().sum(2).argmin(1)
                + self._bases()[out, 0, 0]
            )[:, None]
        else:
            tables, bases = self.tables.value, self._bases()[0]
            now = self.decoded.view(-1, self.size)[chosen]
            now = now if offset is None else now - offset
            eye = torch.eye(self.size, device=target.device)[None, None]
            codes = (flat[chosen] - bases)[None, :, None]
            found = sweep_search(
                (centred - now)[None].contiguous(),
                now[None].contiguous(),
                codes,
                eye,
                tables,
                one.view(1, -1),
                beam,
            )
            index = found.codes[0, :, 0] + bases
        decoded = self.looked_up(index) * one
        return index, decoded if offset is None else decoded + offset

    def _factor(self, parameter: Parameter | None, chosen: Tensor) -> Tensor | None:
        """Scale or offset of chosen groups, [k, 1]."""
        if parameter is None:
            return None
        wide = self.spread(parameter.value).expand(-1, self.index.shape[1], -1)
        return wide[chosen // self.index.shape[1], chosen % self.index.shape[1]]

    def set_codes_(self, chosen: Tensor, index: Tensor, decoded: Tensor) -> None:
        """Give the groups ``chosen`` new codes and the weights that they decode to."""
        self.index.view(-1, self.index.shape[2])[chosen] = index
        self.decoded.view(-1, self.size)[chosen] = decoded
        self.values.view(-1, self.size)[chosen] = self.looked_up(index)

    def copy_padding_(self, into: Tensor) -> None:
        """Give ``into`` [O, n, g] this weight's padding of the last groups, so that they differ in real
        weights only."""
        if self.index.shape[1] * self.size > self.row:
            into.flatten(1)[:, self.row :] = self.decoded.flatten(1)[:, self.row :]

    @property
    def changed(self) -> int:
        """Groups whose codes are not those of the start."""
        return int((self.index != self.start).any(2).sum())

    def coded(self, tables: Tensor | None) -> CodebookWeight:
        """What is stored; ``tables`` are the float16 codebooks, one tensor for all layers that share them."""
        codes = (self.index if self.tables is None else self.index - self._bases()).permute(1, 2, 0)
        scale, offset = (
            stored if p is None or p.fixed else halves(p.value).half()
            for p, stored in zip((self.scale, self.offset), self.kept, strict=True)
        )
        return CodebookWeight.from_codes(
            codes, tables, scale, offset, self.shape, self.bits, self.order, self.levels
        )


def _factor_of(stored: Scale, out: int) -> Parameter:
    """A scale or offset; what is not stored as float16 cannot be moved a little, and stays."""
    plain = isinstance(stored, Tensor) and stored.dtype == torch.float16
    value = stored.float()
    return Parameter(value.expand(out) if tuple(value.shape) == (1,) else value, fixed=not plain)
