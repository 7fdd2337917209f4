"""Formats of other programs in artifacts, in the bank, and fine-tuned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aquabit import packing
from aquabit.cost import CostModel
from aquabit.kernels.codebook import CodebookWeight
from aquabit.pipelines import load, trace
from aquabit.quant.bank import Bank, Fit
from aquabit.quant.finetuning.finetune import FineTuning
from aquabit.quant.finetuning.store import stored_tensors, stored_weight
from aquabit.quant.finetuning.weight import TrainedWeight
from aquabit.quant.model import fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, Calibration, LayerChoice, QuantConfig, Scheme
from aquabit.scheme_kinds import DEPLOYED
from aquabit.space import make_space

SCHEMES = [kind.examples[0] for kind in DEPLOYED] + ["nf4g64d", "fp8c", "q4_0h", "int8h"]
EVERY = pytest.mark.parametrize("text", SCHEMES)


def fitted(text: str) -> CodebookWeight:
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(2))
    return quantize_weight(weight, text, torch.rand(512) if Scheme.parse(text).calibrated else None)


@EVERY
def test_what_is_stored_of_a_layer_is_read_again(text: str) -> None:
    coded, choice = fitted(text), LayerChoice(Scheme.parse(text))
    config = QuantConfig("f", {"a": choice})
    tensors = stored_tensors({"a": coded}, config)
    again = stored_weight("a", choice, coded.shape, tensors, "file")
    assert torch.equal(again.dequantize(), coded.dequantize())
    for name in tensors:
        with pytest.raises(AquabitError, match=r"file: the .* layer 'a'"):
            stored_weight("a", choice, coded.shape, {k: t for k, t in tensors.items() if k != name}, "file")
        cut = tensors | {name: tensors[name].reshape(-1)[:-1]}
        with pytest.raises(AquabitError, match=r"file: the .* layer 'a'"):
            stored_weight("a", choice, coded.shape, cut, "file")


@EVERY
def test_the_bank_keeps_it(text: str, tmp_path: Path) -> None:
    coded, scheme = fitted(text), Scheme.parse(text)
    Bank(tmp_path).put("key", scheme, "", Fit(coded, 0.5))
    found = Bank(tmp_path).get("key", scheme)
    assert found is not None and torch.equal(found.coded.dequantize(), coded.dequantize())
    assert found.coded.nbytes == coded.nbytes


@EVERY
def test_training_moves_codes_to_other_levels_of_the_format(text: str) -> None:
    """Coded scales stay; what comes out is stored as what went in."""
    coded = fitted(text)
    trained = TrainedWeight(coded, None)
    torch.testing.assert_close(trained.dense(), coded.dequantize())
    assert torch.equal(trained.coded(None).dequantize(), coded.dequantize())
    chosen = torch.arange(0, trained.groups, 3)
    target = trained.decoded.view(-1, 1)[chosen] + 0.5
    index, decoded = trained.nearest(chosen, target, 1)
    before = trained.decoded.view(-1, 1)[chosen]
    assert bool(((decoded - target).abs() <= (before - target).abs() + 1e-6).all())
    assert float((decoded - target).abs().mean()) < 0.45
    trained.set_codes_(chosen, index, decoded)
    after = trained.coded(None)
    torch.testing.assert_close(after.dequantize(), trained.dense())
    assert {n: (t.dtype, t.shape) for n, t in after.tensors().items()} == {
        n: (t.dtype, t.shape) for n, t in coded.tensors().items()
    }


@pytest.mark.parametrize("finetune", [False, FineTuning(steps=2, images=8, batch=4, check_every=1)])
def test_an_artifact_runs_as_it_was_packed(unet, tmp_path: Path, finetune) -> None:  # type: ignore[no-untyped-def]
    graph = trace(unet)
    space = make_space(graph, fingerprint(unet.denoiser), calibration=Calibration(images=4, steps=2))
    config, used = space.uniform("int8", 16), set[str]()
    for i, (name, shape) in enumerate((n, tuple(graph.nodes[n]["shape"])) for n in space.layers):
        order = SCHEMES[i % len(SCHEMES) :] + SCHEMES[: i % len(SCHEMES)]
        text = next(t for t in order if not Scheme.parse(t).refuses(shape))
        used.add(text)
        config = config.with_layer(name, text)
    assert len(used) >= 5
    bank = str(tmp_path / "bank")
    packed = packing.quantize(unet, config, bank=bank, finetune=finetune, accuracy="exact")
    written = packed.save(tmp_path / "packed")
    if not finetune:
        assert written == CostModel(graph, make_space(graph, config.fingerprint))(config).bytes
    loaded = load(str(tmp_path / "packed"))
    mine = {name: layer.coded for name, layer in packed.model.layers.items()}
    for name, layer in loaded.denoiser.named_modules():
        if mine.get(name) is not None:
            assert torch.equal(layer.coded.dequantize(), mine[name].dequantize()), name
