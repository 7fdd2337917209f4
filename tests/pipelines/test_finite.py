"""A model whose full precision is broken: every verb that makes its images stops and says where."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.model import open_model
from aquabit.packing import quantize
from aquabit.pipelines import Adapter, trace
from aquabit.pipelines.finite import broken, finite_images
from aquabit.quant.bank import Bank
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Calibration, Protocol, QuantConfig
from aquabit.space import make_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.command_line import fails
from tests.conftest import tiny_pipeline
from tests.tiny_pipelines import tiny

PROTOCOL = Protocol(images=4, steps=3, micro_batch=4)
CALIBRATION = Calibration(images=4, steps=3)
LAYER = "transformer_blocks.1.ff.net.2"


class BreaksAt:
    """A hook that makes the output of a block of ``pipe`` infinite in one of PROTOCOL's steps; it may be
    copied with its model."""

    def __init__(self, pipe: Any, step: int, value: float = float("inf")):
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(PROTOCOL.steps)
        self.time, self.value = int(scheduler.timesteps[step]), value
        pipe.denoiser.transformer_blocks[1].register_forward_hook(self, with_kwargs=True)

    def __call__(self, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output * self.value if int(kwargs["timestep"].flatten()[0]) == self.time else output


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A folder with a pipeline that float32 holds and float16 does not."""
    pipe = tiny_pipeline("dit")
    with torch.no_grad():
        pipe.denoiser.get_submodule(LAYER).weight.fill_(3e4)
        pipe.denoiser.get_submodule(LAYER).bias.fill_(6e4)
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("verb", ["measure", "run"])
@pytest.mark.parametrize("damages", ["gradients", "probes"])
def test_verbs_stop_with_one_sentence_and_record_nothing(overflowing: Path, verb: str, damages: str) -> None:
    place = ("--study", "whole/study.db") if verb == "measure" else ("--out", "whole")
    (overflowing / "whole").mkdir()
    words = ("--images", "4", "--steps", "2", "--samples", "2", "--workers", "1", "--dtype", "float16")
    said = fails(overflowing, verb, "pipe", *place, *words, "--damages", damages)
    assert (
        "full precision is broken: in float16, the output of layer 'transformer_blocks.1.ff.net.2' is not"
        " finite in sampling step 1 of 2; use --dtype bfloat16 or float32" in said
    )
    assert not len(Study(overflowing / "whole" / "study.db").measurements(failed=True))


def test_the_step_is_named_whatever_makes_the_images(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    BreaksAt(pipe, 2)
    with pytest.raises(
        AquabitError, match=r"float32, the output of layer 'transformer_blocks.1' .* step 3 of 3; the"
    ):
        finite_images(Adapter(pipe), PROTOCOL, range(4))
    with pytest.raises(AquabitError, match="step 3 of 3"):
        measure(pipe, Study(tmp_path / "s.db"), 2, protocol=PROTOCOL, bank=str(tmp_path / "bank"))
    model = open_model(pipe)
    evaluator = Evaluator(pipe, model.graph, Bank(tmp_path / "bank"), model.fingerprint)
    full = QuantConfig(model.fingerprint, {})
    with pytest.raises(AquabitError, match="step 3 of 3"):
        evaluator.measure(full, PROTOCOL)
    with pytest.raises(AquabitError, match="step 3 of 3"):
        evaluator.probe(LAYER, ["usq4"], (8,), PROTOCOL, full, 8)


def test_calibration_stops_there_too(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    BreaksAt(pipe, 1, float("nan"))
    space = make_space(trace(pipe), fingerprint(pipe.denoiser), calibration=CALIBRATION)
    with pytest.raises(AquabitError, match="step 2 of 3"):
        quantize(pipe, space.uniform("usq3h", 8), bank=str(tmp_path))


def test_a_decoder_and_an_input_are_named_too() -> None:
    pipe, asked = tiny("sd"), Protocol(images=2, steps=2, micro_batch=2, conditions=("a cat",))
    conv = pipe.vae.decoder.conv_in
    before = conv.weight.clone()
    torch.nn.init.constant_(conv.weight, float("nan"))
    with pytest.raises(AquabitError, match=r"output of layer 'decoder.conv_in' of vae is not finite"):
        finite_images(Adapter(pipe), asked, range(2))
    conv.weight.copy_(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert finite_images(Adapter(pipe), asked, range(2)).isfinite().all()
    torch.nn.init.constant_(pipe.text_encoder.embeddings.position_embedding.weight, float("nan"))
    other = Protocol(images=2, steps=2, micro_batch=2, conditions=("two dogs",))
    with pytest.raises(AquabitError, match="the input encoder_hidden_states of the denoiser is not finite"):
        finite_images(Adapter(pipe), other, range(2))


def test_what_broke_once_only_is_said_to_be_the_machine() -> None:
    said = str(broken(Adapter(tiny_pipeline("dit")), PROTOCOL, range(4)))
    assert "finite when they were made again" in said


def test_a_quantized_model_that_breaks_is_still_a_measurement(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    model = open_model(pipe)
    evaluator = Evaluator(pipe, model.graph, Bank(tmp_path), model.fingerprint)
    evaluator.measure(QuantConfig(model.fingerprint, {}), PROTOCOL)
    config = make_space(model.graph, model.fingerprint).uniform("usq4", 8)
    BreaksAt(evaluator.pipe, 1)
    assert evaluator.measure(config, PROTOCOL).measurement.status == "failed"
