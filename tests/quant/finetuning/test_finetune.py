"""Fine-tuning as a whole on tiny models: the loss falls, runs resume to the bit, tuned tensors are kept,
keyed and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import aquabit
from aquabit.cli.app import app
from aquabit.cost import CostModel
from aquabit.graph import to_json
from aquabit.kernels import fake_quantize
from aquabit.measuring.evaluator import Evaluator
from aquabit.packing import quantize
from aquabit.pipelines import replay_recorder
from aquabit.quant.attention import quantized_attention
from aquabit.quant.bank import Bank
from aquabit.quant.finetuning import finetune as module
from aquabit.quant.finetuning.finetune import FineTuning, Tuned, code_bits, finetune
from aquabit.quant.finetuning.settings import COARSE_RATE, FINE_RATE
from aquabit.quant.layers import quant_layer
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.scheme import (
    AquabitError,
    Calibration,
    LayerChoice,
    Measurement,
    Protocol,
    QuantConfig,
    Scheme,
    StepGroups,
)
from aquabit.sensitivity.surrogate.fit import training_table
from aquabit.space import make_space
from aquabit.study import Study
from tests.conftest import tiny_pipeline

SETTINGS = FineTuning(steps=30, batch=4, images=16, check_every=10, warmup=3, code_rate=0.02)
SAMPLED = Calibration(images=4, steps=4)


def config_for(pipe: DiffusionPipeline, scheme: str = "usq2", act: int = 8) -> QuantConfig:
    graph = aquabit.trace(pipe)
    layers = {
        n: LayerChoice(Scheme.parse(scheme), act)
        for n, node in graph.nodes(data=True)
        if node["kind"] != "merge"
    }
    return QuantConfig(fingerprint(pipe.denoiser), layers, calibration=SAMPLED)


def opened(pipe: DiffusionPipeline, folder: Path) -> QuantizedDenoiser:
    graph, own = aquabit.trace(pipe), fingerprint(pipe.denoiser)
    from aquabit.pipelines import recorder

    return QuantizedDenoiser(pipe.denoiser, graph, Bank(folder), own, recorder(pipe))


def tuned_in(
    folder: Path, kind: str = "dit", settings: FineTuning = SETTINGS, scheme: str = "usq2", **options: Any
) -> Tuned:
    pipe = tiny_pipeline(kind)
    config = config_for(pipe, scheme)
    return finetune(opened(pipe, folder), config, replay_recorder(pipe), settings, **options)


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("dit", "usq2"), ("dit", "vq2"), ("dit", "aq2x4g4"), ("unet", "vq2c"), ("unet", "aq2x4g4")],
)
def test_loss_falls_and_is_that_of_the_stored_weights(kind: str, scheme: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    config, model = config_for(pipe, scheme), opened(pipe, tmp_path)
    tuned = finetune(model, config, replay_recorder(pipe), SETTINGS)
    assert tuned.after < 0.98 * tuned.before and not tuned.notes
    assert [row["step"] for row in tuned.history] == [10, 20, 30] and tuned.changed < 1
    assert min(row["validation"] for row in tuned.history) == tuned.after
    found = []
    for own in (config, tuned.config):  # the same loss by the ordinary way of running a configuration
        model.apply(QuantConfig("", {}))
        buffer = replace(SAMPLED, images=SETTINGS.images, seed=SETTINGS.images_seed)
        replay = module.Replay(replay_recorder(pipe)(buffer, 4), model.denoiser)
        model.apply(own)
        with torch.no_grad():
            total = [
                (replay.batch(b, torch.device("cpu")), len(b))
                for b in replay.validation(4, module.VALIDATION)
            ]
            losses = [
                float((model.denoiser(*a, **k).sample - target).square().mean()) * n
                for ((a, k), target), n in total
            ]
        found.append(sum(losses) / sum(n for _, n in total))
    assert found == pytest.approx([tuned.before, tuned.after], rel=1e-3)


def test_a_run_that_was_interrupted_ends_with_the_same_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "scheme": "aq2x4g4",
        "settings": replace(SETTINGS, code_rate=0.05, semi_discontinuity=True, order="walking"),
    }
    whole = tuned_in(tmp_path / "whole", **options)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    for stop in (7, 13, 24):

        def stopping(what: str, done: int, total: int, stop: int = stop) -> None:
            if what.startswith("fine-tuning: loss") and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tuned_in(tmp_path / "parts", **options, progress=stopping)
        assert list((tmp_path / "parts").glob("tuning-*"))
    steps: list[int] = []
    parts = tuned_in(tmp_path / "parts", **options, progress=lambda what, done, total: steps.append(done))
    assert next(s for s in steps if s) in (24, 25) and parts.config.tuned == whole.config.tuned
    assert parts.history == whole.history and (parts.before, parts.after) == (whole.before, whole.after)
    assert not list((tmp_path / "parts").glob("tuning-*"))


def test_a_finished_run_is_found_again_and_others_are_not(tmp_path: Path) -> None:
    first = tuned_in(tmp_path)
    pipe = tiny_pipeline("dit")
    config, model = config_for(pipe), opened(pipe, tmp_path)

    def never(*_: Any) -> Any:
        raise RuntimeError("asked the teacher")

    assert finetune(model, config, never, SETTINGS) == first
    assert (
        finetune(model, replace(config, correction="bc"), never, SETTINGS).config.tuned == first.config.tuned
    )
    for other in (replace(SETTINGS, seed=1), replace(SETTINGS, tau=0.02)):
        with pytest.raises(RuntimeError):
            finetune(model, config, never, other)
    (tmp_path / f"tuned-{first.config.tuned}.safetensors").unlink()
    with pytest.raises(RuntimeError):
        finetune(model, config, never, SETTINGS)


def test_measurements_are_keyed_by_the_tensors(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    evaluator = Evaluator(pipe, aquabit.trace(pipe), Bank(tmp_path), fingerprint(pipe.denoiser))
    config = config_for(pipe)
    tuned = finetune(evaluator.quantized, config, replay_recorder(evaluator.pipe), SETTINGS)
    other = finetune(evaluator.quantized, config, replay_recorder(evaluator.pipe), replace(SETTINGS, seed=1))
    assert len({config.digest, tuned.config.digest, other.config.digest}) == 3
    assert QuantConfig.from_dict(json.loads(tuned.config.to_json())) == tuned.config
    protocol = Protocol(images=8, steps=4, micro_batch=8)
    first, _ = evaluator.measure(tuned.config, protocol)
    plain, _ = evaluator.measure(config, protocol)
    second, _ = evaluator.measure(other.config, protocol)
    again, _ = evaluator.measure(tuned.config, protocol)
    assert first.metrics == again.metrics and first.config == tuned.config.digest
    assert first.metrics["psnr"] > plain.metrics["psnr"] and second.metrics["mse"] != first.metrics["mse"]
    packed = evaluator.generate(tuned.config, protocol, packed=True)
    torch.testing.assert_close(packed, evaluator.generate(tuned.config, protocol), rtol=0.05, atol=0.05)


def test_an_artifact_carries_tuned_tensors_and_needs_no_bank(tmp_path: Path) -> None:
    pipe, told = tiny_pipeline("unet"), list[Tuned]()
    config = config_for(pipe, "vq2")
    packed = quantize(
        pipe, config, bank=str(tmp_path / "bank"), finetune=replace(SETTINGS, steps=10), told=told.append
    )
    assert told and packed.config == told[0].config and packed.config.tuned
    packed.save(tmp_path / "out")
    again = quantize(
        pipe, packed.config, bank=str(tmp_path / "bank")
    )  # from a configuration alone: the bank has the tensors
    (tmp_path / "bank").rename(tmp_path / "gone")
    images = aquabit.generate(str(tmp_path / "out"), 4, steps=4)
    assert torch.equal(images, _images(packed.pipe)) and torch.equal(images, _images(again.pipe))
    assert not torch.equal(images, _images(quantize(pipe, config, bank=str(tmp_path / "gone")).pipe))
    with pytest.raises(AquabitError, match=rf"bank .*other has no fine-tuned tensors {packed.config.tuned}"):
        quantize(pipe, packed.config, bank=str(tmp_path / "other"))


def _images(pipe: DiffusionPipeline) -> torch.Tensor:
    return aquabit.generate(pipe, 4, steps=4)


def test_shared_codebooks_stay_shared(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    config, partners = config_for(pipe), opened(tiny_pipeline("dit"), tmp_path).partners
    together = {n: LayerChoice(Scheme.parse("aq2x3g4s"), 8, name) for n, name in partners.items()}
    config, model = replace(config, layers={**config.layers, **together}), opened(pipe, tmp_path)
    tuned = finetune(model, config, replay_recorder(pipe), SETTINGS)
    weights = model.coded_weights(tuned.config)
    names = sorted(together)
    assert len({id(weights[n].codebooks) for n in names}) == len(set(partners.values())) < len(names)
    started = model.coded_weights(config)
    assert all(not torch.equal(started[n].codebooks, weights[n].codebooks) for n in names)
    assert tuned.after < tuned.before


def test_tensors_of_the_bank_are_checked_and_never_evicted(tmp_path: Path) -> None:
    tuned = tuned_in(tmp_path, settings=replace(SETTINGS, steps=3))
    path = tmp_path / f"tuned-{tuned.config.tuned}.safetensors"
    Bank(tmp_path, limit=0).trim()
    assert [p.name for p in tmp_path.glob("*.safetensors")] == [path.name]
    pipe = tiny_pipeline("dit")
    name = next(iter(tuned.config.layers))
    with pytest.raises(AquabitError, match=r"codebooks of layer .* are none; vq2 needs \[1, 1, 4, 1\]"):
        opened(pipe, tmp_path).apply(tuned.config.with_layer(name, "vq2"))
    with pytest.raises(AquabitError, match="do not fit usq3"):
        opened(tiny_pipeline("dit"), tmp_path).apply(tuned.config.with_layer(name, "usq3"))
    tensors = load_file(path)
    save_file({k: v + 1 if k.endswith("scale") else v for k, v in tensors.items()}, path)
    with pytest.raises(AquabitError, match=r"holds tensors of digest .* not those that were tuned"):
        opened(tiny_pipeline("dit"), tmp_path).apply(tuned.config)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AquabitError, match=r"cannot be read .* fine-tune again"):
        opened(tiny_pipeline("dit"), tmp_path).apply(tuned.config)


@pytest.mark.parametrize(
    ("rate", "note"), [(1e30, "not finite in step"), (30.0, "above 10 times that of the start")]
)
def test_divergence_stops_keeps_the_best_and_says_so(rate: float, note: str, tmp_path: Path) -> None:
    wild = replace(SETTINGS, steps=200, warmup=60, check_every=4, codebook_rate=rate, scale_rate=rate)
    tuned = tuned_in(tmp_path, settings=wild)
    assert note in tuned.notes[0] and len(tuned.history) < 50
    assert tuned.after <= tuned.before
    pipe = tiny_pipeline("dit")
    opened(pipe, tmp_path).apply(tuned.config)
    assert all(bool(torch.isfinite(p).all()) for p in pipe.denoiser.state_dict().values())


def test_a_start_that_nothing_improves_is_kept_and_said(tmp_path: Path) -> None:
    still = replace(SETTINGS, steps=4, check_every=2, code_rate=0.0, codebook_rate=0.0, scale_rate=0.0)
    tuned = tuned_in(tmp_path, settings=still)
    assert tuned.after == tuned.before and tuned.changed == 0 and "no step was better" in tuned.notes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"order": "walking"},
        {"order": "walking", "semi_discontinuity": True},
        {"semi_groups": False},
        {"method": "straight_through"},
        {"guidance": 2.0},
        {"trust_ratio": 0.01, "delta_decay": 0.1},
        {"weight_decay": 0.01, "code_betas": [0.9, 0.95]},
    ],
)
def test_every_setting_trains(options: dict[str, Any], tmp_path: Path) -> None:
    tuned = tuned_in(tmp_path, settings=replace(SETTINGS, **options), scheme="vq2")
    assert tuned.after < tuned.before


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    model, config, record = opened(pipe, tmp_path), config_for(pipe), replay_recorder(pipe)
    with pytest.raises(AquabitError, match="codes no layer"):
        finetune(model, config_for(pipe, "fp"), record, SETTINGS)
    grouped = replace(
        config,
        layers={n: replace(c, act=(8, 6)) for n, c in config.layers.items()},
        steps=StepGroups(4, (0, 2)),
    )
    with pytest.raises(AquabitError, match="depend on the step"):
        finetune(model, grouped, record, SETTINGS)
    with pytest.raises(AquabitError, match="has static ranges"):
        finetune(model, replace(config, ranges="static"), record, SETTINGS)
    model.pack(config)
    with pytest.raises(AquabitError, match="model is packed"):
        finetune(model, config, record, SETTINGS)
    for wrong, message in (
        ({"tau": 0}, "tau 0 .* above 0"),
        ({"order": "random"}, "order 'random' .* shuffled or walking"),
        ({"images": 4}, "two batches of 4"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"steps": 0}, "steps 0"),
        ({"trust_ratio": -1.0}, "trust_ratio -1"),
    ):
        with pytest.raises(AquabitError, match=message):
            replace(SETTINGS, **wrong)
    for value, message in (
        ([], "is a list"),
        ({"rate": 1}, "'rate', which is none of its fields"),
        ({"steps": "many"}, "steps.*'many'"),
        ({"tau": 2}, "tau 2"),
        ({"steps": 1.5}, "steps"),
        ({"semi_groups": "yes"}, "semi_groups"),
    ):
        with pytest.raises(AquabitError, match=message):
            FineTuning.from_dict(value)
    assert FineTuning.from_dict({"steps": 5, "betas": [0.5, 0.9], "guidance": 2}) == FineTuning(
        steps=5, betas=(0.5, 0.9), guidance=2.0
    )


def test_gradients_pass_rounded_activations_as_if_they_were_not_rounded() -> None:
    torch.manual_seed(0)
    linear, conv = quant_layer(nn.Linear(12, 7)), quant_layer(nn.Conv2d(4, 6, 3, padding=1), split=2)
    cases: list[tuple[Any, torch.Tensor, Callable[..., torch.Tensor]]] = [
        (linear, torch.randn(5, 12), lambda x, w: functional.linear(x, w, linear.bias)),
        (conv, torch.randn(2, 4, 5, 5), lambda x, w: functional.conv2d(x, w, conv.bias, padding=1)),
    ]
    for layer, x, plain in cases:
        weight = layer.weight.clone().requires_grad_()
        layer.set_dense_(weight, Scheme())
        layer.act, layer.act_output = 4, 4 if layer is linear else 16
        with torch.no_grad():
            expected = layer(x)
        asked = x.clone().requires_grad_()
        made = layer(asked)
        assert torch.equal(made, expected)
        gradient = torch.randn_like(made)
        found = torch.autograd.grad(made, [asked, weight], gradient)
        dense = x.clone().requires_grad_()
        (to_input,) = torch.autograd.grad(plain(dense, weight), [dense], gradient)
        (to_weight,) = torch.autograd.grad(plain(layer.quantized_input(x, 4), weight), [weight], gradient)
        torch.testing.assert_close(found, (to_input, to_weight))


def test_gradients_pass_attention() -> None:
    q, k, v = (
        torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i), requires_grad=True)
        for i in range(3)
    )
    made, plain = quantized_attention(q, k, v), functional.scaled_dot_product_attention(q, k, v)
    gradient = torch.randn_like(made)
    ours, theirs = (torch.autograd.grad(y, [q, k, v], gradient) for y in (made, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)  # 8 bits are this close
    with torch.no_grad():
        torch.testing.assert_close(quantized_attention(q, k, v), made, rtol=2e-3, atol=2e-3)
    assert not fake_quantize(q, 8).requires_grad


def test_the_command_line_tunes(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "config.json").write_text(config_for(pipe).to_json())
    settings = {"batch": 4, "images": 16, "check_every": 2, "warmup": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    call = [
        "quantize",
        str(tmp_path / "model"),
        str(tmp_path / "config.json"),
        "--out",
        str(tmp_path / "out"),
        "--bank",
        str(tmp_path / "bank"),
    ]
    done = CliRunner().invoke(
        app, [*call, "--finetune-steps", "4", "--finetune-settings", str(tmp_path / "settings.json")]
    )
    assert done.exit_code == 0, done.output
    assert "difference from the teacher" in done.output and "of codes changed" in done.output
    recipe = json.loads((tmp_path / "out" / "denoiser" / "config.json").read_text())["quantization_config"]
    assert (tmp_path / "bank" / f"tuned-{recipe['tuned']}.safetensors").exists()
    (tmp_path / "settings.json").write_text('{"tau": 7}')
    wrong = CliRunner().invoke(app, [*call, "--finetune-settings", str(tmp_path / "settings.json")])
    assert wrong.exit_code == 2 and "tau 7" in wrong.output


def test_a_surrogate_does_not_learn_from_tuned_configurations(tmp_path: Path) -> None:
    study = Study(tmp_path / "S.db")
    pipe = tiny_pipeline("dit")
    config, protocol = config_for(pipe), Protocol()
    graph = aquabit.trace(pipe)
    space = make_space(graph, config.fingerprint, "tiny")
    study.begin("tiny", config.fingerprint, to_json(graph), space.to_dict(), protocol)
    totals = CostModel(graph, space).totals_of(config)
    names = sorted(config.layers)
    for i in range(25):
        own = config.with_layer(names[i % len(names)], "usq3").with_layer(
            names[(i // len(names) + 3) % len(names)], "usq4"
        )
        for one in (own, replace(own, tuned=f"{i:016x}")):
            study.record(
                one, Measurement(one.digest, protocol.digest, {"fid": 1.0 + i}, 1.0), "sample", totals
            )
    table = training_table(study, "fid")
    assert len(table) >= 20 and table.tuned.isna().all()
    assert study.measurements().tuned.notna().sum() == 25


def test_the_rate_of_codes_suits_their_bits(tmp_path: Path) -> None:
    model = opened(tiny_pipeline("dit"), tmp_path)
    for scheme, rate in (
        ("usq2", COARSE_RATE),
        ("usq3", FINE_RATE),
        ("aq2x4g4", COARSE_RATE),
        ("aq3x4g4", FINE_RATE),
    ):
        config = QuantConfig("f", {name: LayerChoice(Scheme.parse(scheme), 8) for name in model.layers})
        assert FineTuning().resolved(code_bits(model, config)).code_rate == rate
        assert FineTuning(code_rate=0.5).resolved(code_bits(model, config)).code_rate == 0.5, (
            "what is given stays"
        )
