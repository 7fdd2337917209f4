"""Other programs' own quantizers, and how the table of targets places what they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, Scheme
from benchmarks import own_rounding, targets

FORMATS = [(to, scheme) for to, row in targets.RECIPES.items() for scheme in row]


def weight(*shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (drawn / 16).half().float()


@pytest.mark.parametrize(("to", "scheme"), FORMATS)
def test_it_rounds_to_the_format(to: str, scheme: str) -> None:
    if own_rounding.installed(to) is None:
        pytest.skip(f"{own_rounding.PACKAGES[to]} is not installed")
    full, parsed = weight(64, 256), Scheme.parse(scheme)
    before = full.clone()
    found = own_rounding.own_rounding(to, parsed, full)
    assert found.shape == full.shape and found.dtype == torch.float32 and torch.equal(full, before)
    ours = quantize_weight(full, scheme).dequantize()
    error, usual = ((one - full).square().mean() for one in (found, ours))
    assert usual * 0.99 < error < 1.6 * usual  # ours searches scales for the least error
    group = parsed.range_group or 256
    for row in found.reshape(-1, group)[:8]:
        assert len(row.unique()) <= 2**parsed.bits


@pytest.mark.parametrize(("to", "scheme"), [("gguf", "q4_K"), ("sdnq", "nf4g64"), ("torchao", "usq4")])
def test_what_it_does_not_make_is_refused(to: str, scheme: str) -> None:
    if own_rounding.installed(to) is None:
        pytest.skip(f"{own_rounding.PACKAGES[to]} is not installed")
    with pytest.raises(AquabitError, match=f"does not quantize to {scheme} here"):
        own_rounding.own_rounding(to, Scheme.parse(scheme), weight(64, 256))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_rounding, "PACKAGES", {"gguf": "no-such-package-of-anybody"})
    assert own_rounding.installed("gguf") is None
    with pytest.raises(AquabitError, match="no-such-package-of-anybody is not installed: pip install"):
        own_rounding.own_rounding("gguf", Scheme.parse("q4_0"), weight(4, 32))


def row(name: str, psnr: float, **more: Any) -> dict[str, Any]:
    return {
        "target": "gguf",
        "model": "digits-dit",
        "name": name,
        "psnr": [psnr, psnr + 0.5],
        "bytes": 1,
        "bits": 4.5,
        "fid": [1.0, 2.0],
        **more,
    }


def test_rows_stand_with_their_recipe_and_are_compared_with_both_roundings() -> None:
    own = row(f"q4_0, gguf{targets.OWN}", 32, by="gguf 1")
    rows = [row("full precision", 99), row("q4_0", 30), row("found, q4_0's bytes", 40), row("q8_0", 60), own]
    names = [r["name"] for r in sorted(rows, key=targets.rank)]
    assert names == ["full precision", "q4_0", own["name"], "found, q4_0's bytes", "q8_0"]
    assert targets.origin(own) != targets.origin(rows[0])
    of = f", gguf{targets.OWN}"
    assert targets.over_row(rows[2], rows, "").startswith("+10.0")
    assert targets.over_row(rows[2], rows, of).startswith("+8.0")
    assert targets.over_row(own, rows, "").startswith("+2.0") and targets.over_row(own, rows, of) == ""
    assert "gguf 1" in targets.rounded_by(rows)
    lines = targets.text({"rows": rows, "command": "", "machine": {"cpu": "", "cores": 1, "torch": ""}})
    assert lines.count("\n| gguf |") == len(rows)
