"""What `generate` says of a packed model's layers."""

from __future__ import annotations

from aquabit.cli import tables
from aquabit.quant.kernel_tuning import Placement


def said(placement: Placement) -> str:
    with tables.console.capture() as found:
        tables.show_placement(placement)
    return " ".join(found.get().split())


def test_layers_that_would_be_faster_dense_are_counted() -> None:
    ran = {"triton": 5}
    assert "faster" not in said(Placement(ran, 10**6, 4 * 10**6))
    packed = said(Placement(ran, 10**6, 4 * 10**6, (), 5))
    assert "5 layers would be faster with a dense copy; --memory auto keeps some" in packed
    full = said(Placement({"triton": 3, "dense": 2}, 2 * 10**6, 4 * 10**6, ("a", "b"), 3))
    assert "3 layers would be faster with a dense copy; there is no room for more" in full
