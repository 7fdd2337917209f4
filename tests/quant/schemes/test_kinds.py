"""The contract of every registered kind of schemes; a new kind is tested by being registered."""

from __future__ import annotations

import ast
import re
from math import prod
from pathlib import Path

import pytest
import torch

from aquabit.kernels.request import format_of
from aquabit.quant.kernel_tuning import format_for
from aquabit.quant.schemes import usq
from aquabit.quant.weights import FITS, quantize_weights, relative_error
from aquabit.scheme import FP, AquabitError, Scheme
from aquabit.scheme_kinds import KINDS

PACKAGE = Path(__file__).parents[3] / "aquabit"
EXAMPLES = [(kind.name, text) for kind in KINDS.values() for text in kind.examples]
CODED = [text for name, text in EXAMPLES if name != "fp"]
SHAPES = [(24, 40), (7, 33), (12, 8, 3, 3), (10, 16, 1, 1)]
# of formats whose groups divide nothing smaller
WIDE = [(6, 256), (3, 256, 1, 3), (5, 256, 1, 1)]
CASES = [
    (text, shape)
    for text in CODED
    for shape in SHAPES + (WIDE if Scheme.parse(text).refuses((24, 40)) else [])
]


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_text_round_trip(name: str, text: str) -> None:
    scheme = Scheme.parse(text)
    assert str(scheme) == text and scheme.record is KINDS[name] and Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_only_its_own_kind_reads_a_text(name: str, text: str) -> None:
    assert [kind.name for kind in KINDS.values() if re.fullmatch(kind.pattern, text)] == [name]


def test_every_coded_kind_has_a_fit() -> None:
    assert FITS.keys() == KINDS.keys() - {"fp"}


@pytest.mark.filterwarnings("ignore:aq.*codewords")
@pytest.mark.parametrize(("text", "shape"), CASES, ids=str)
def test_a_fit_has_the_declared_form(text: str, shape: tuple[int, ...]) -> None:
    scheme, row = Scheme.parse(text), prod(shape[1:])
    if scheme.refuses(shape):
        with pytest.raises(AquabitError, match=re.escape(f"{text} cannot hold a weight {list(shape)}: its ")):
            quantize_weights([torch.ones(shape)], scheme, [torch.eye(row)] if scheme.calibrated else None)
        return
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) for _ in range(1 + scheme.shared)]
    inputs = torch.randn(min(4 * row, 512), row, generator=generator)
    h = inputs.T @ inputs / len(inputs) if scheme.calibrated else None
    before = [w.clone() for w in weights]
    coded = quantize_weights(weights, scheme, [h] * len(weights))
    layout = scheme.layout(shape)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True)), (
        "weights are left as they are"
    )
    for weight, result in zip(weights, coded, strict=True):
        assert result.shape == shape and result.bits == layout.bits == scheme.bits
        assert result.nbytes == sum(scheme.stored_bytes(shape))
        assert format_of(result) == format_for(scheme, shape)
        tables = result.codebooks
        assert (None if tables is None else tuple(tables.shape)) == layout.codebook_shape(shape[0])
        assert relative_error(weight, result) < 0.5 and result.dequantize().shape == shape
    if scheme.shared:
        assert coded[0].codebooks is coded[1].codebooks


def test_full_precision_takes_two_bytes_a_weight() -> None:
    assert [FP.stored_bytes(shape) for shape in SHAPES] == [(2 * prod(shape), 0) for shape in SHAPES]


def asked_by_name(source: str) -> list[int]:
    """Lines that compare ``.kind`` with the name of a kind of schemes, or look it up in a table of names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            kinds = any(isinstance(p, ast.Attribute) and p.attr == "kind" for p in parts)
            named = {c.value for p in parts for c in ast.walk(p) if isinstance(c, ast.Constant)}
            if kinds and named & KINDS.keys():
                found.append(node.lineno)
    return found


# which kinds another program holds is a fact of that program: those files name them
OTHERS = {PACKAGE / "targets.py", *(PACKAGE / "exports").glob("*.py")}
OWN = sorted(set(PACKAGE.rglob("*.py")) - OTHERS)


@pytest.mark.parametrize("path", OWN, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_record_knows_kinds_by_name(path: Path) -> None:
    assert asked_by_name(path.read_text()) == []


def test_a_question_for_a_kind_is_seen() -> None:
    assert asked_by_name('x = scheme.kind == "aq"') == [1]
    assert asked_by_name('x = scheme.kind in ("usq", "vq")') == [1]
    assert asked_by_name("x = a.kind == b.kind") == []


@pytest.mark.parametrize("text", ["usq4", "usq3g7", "usq2g8"])
def test_weights_that_are_fitted_in_portions_are_those_of_the_whole(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(33, 45, generator=torch.Generator().manual_seed(0))
    [whole] = quantize_weights([weight], Scheme.parse(text))
    monkeypatch.setattr(usq, "CHUNK", 100)
    [parts] = quantize_weights([weight], Scheme.parse(text))
    assert all(torch.equal(a, parts.tensors()[n]) for n, a in whole.tensors().items())
