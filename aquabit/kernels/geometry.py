"""Geometry: how a Conv2d's kernel moves over its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from aquabit.errors import AquabitError

Pair = tuple[int, int]
MOST = 4096  # of a stride, a padding and a dilation: more than models have, and no sum overflows


@dataclass(frozen=True)
class Geometry:
    """Arguments of ``torch.nn.functional.conv2d``, each down and across. Raises AquabitError for values
    that no image fits."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        steps, largest = (*self.stride, *self.dilation), max(*self.stride, *self.dilation, *self.padding)
        if min(*steps, self.groups) < 1 or min(self.padding) < 0 or largest > MOST:
            raise AquabitError(
                f"stride={self.stride}, padding={self.padding}, dilation={self.dilation} and"
                f" groups={self.groups} do not fit a convolution; padding is at least 0, the others at"
                f" least 1, and none but groups is above {MOST}"
            )

    @property
    def numbers(self) -> list[int]:
        """As operators take it: stride, padding and dilation, each down and across; groups."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @staticmethod
    def of(numbers: Sequence[int]) -> Geometry:
        """The geometry of these ``numbers``."""
        if len(numbers) != 7:
            raise AquabitError(
                f"a geometry has 7 numbers (stride, padding and dilation, each down and across; groups), not"
                f" {list(numbers)}"
            )
        a, b, c, d, e, f, groups = numbers
        return Geometry((a, b), (c, d), (e, f), groups)

    def output(self, image: Sequence[int], kernel: Sequence[int]) -> Pair:
        """Height and width of the result, of those of an image and of a kernel; below 1 where the image is
        too small."""
        (stride, across), (padding, aside), (dilation, wide) = self.stride, self.padding, self.dilation
        return (
            (image[0] + 2 * padding - dilation * (kernel[0] - 1) - 1) // stride + 1,
            (image[1] + 2 * aside - wide * (kernel[1] - 1) - 1) // across + 1,
        )


UNPADDED = Geometry()  # of torch's defaults


def pair(value: int | Pair, name: str = "a size") -> Pair:
    """One number as two. Raises AquabitError for what is neither."""
    two = (value, value) if isinstance(value, int) else value
    if not isinstance(two, tuple | list) or len(two) != 2 or not all(isinstance(n, int) for n in two):
        raise AquabitError(f"{name} is {value!r:.60}; it must be one or two whole numbers")
    return int(two[0]), int(two[1])


def padded(
    x: Tensor, padding: int | str | Pair, stride: Pair, dilation: Pair, kernel: tuple[int, ...]
) -> tuple[Tensor, Pair]:
    """Padding as two numbers; where "same" takes one pixel more on one side, x is given it."""
    if not isinstance(padding, str):
        return x, pair(padding, "padding")
    if padding not in ("same", "valid") or (padding == "same" and stride != (1, 1)):
        raise AquabitError(
            f"padding {padding!r} with stride {stride} does not fit; it must be numbers, 'valid', or 'same'"
            " where the stride is 1"
        )
    Geometry(stride, (0, 0), dilation)  # before x is made larger
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    more = [t % 2 for t in total]
    if any(more):
        x = pad(x, (0, more[1], 0, more[0]))  # at the right and at the bottom, as torch does
    return x, (total[0] // 2, total[1] // 2)
