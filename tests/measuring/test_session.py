"""Measuring: exact repetition, several workers, kills, failures, and what the fake-quantized model
computes."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from aquabit.graph import layers, to_json
from aquabit.kernels import fake_quantize_reference
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.model import open_model
from aquabit.measuring.pools import ProcessPool, processes
from aquabit.measuring.tasks import Begin, Fit, Measure
from aquabit.pipelines import Adapter, trace
from aquabit.quant.bank import Bank
from aquabit.quant.calibration.fitting import FitRequest
from aquabit.quant.layers import QuantConv2d, QuantLinear
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.scheme import AquabitError, Protocol
from aquabit.sensitivity.designs import shard_of
from aquabit.space import make_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(images=4, steps=2, micro_batch=4)
SPACE = {"schemes": ["usq2", "usq4", "usq8", "vq2"]}
COLUMNS = [
    "config",
    "protocol",
    "kind",
    "status",
    "reason",
    "bits",
    "bytes",
    "bops",
    "fid",
    "sfid",
    "kid",
    "is",
    "accuracy",
    "mse",
    "psnr",
]


def table(path):
    return (
        Study(path)
        .measurements(failed=True)[COLUMNS]
        .sort_values(["protocol", "config"])
        .reset_index(drop=True)
    )


def test_killed_at_twenty_random_instants_the_table_is_the_same(tmp_path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "pipe")
    command = [sys.executable, "-m", "tests.measuring.killed", str(tmp_path / "pipe"), str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 10, done.stdout
    whole, killed = table(tmp_path / "whole/study.db"), table(tmp_path / "killed/study.db")
    assert len(whole) >= 12 and whole.equals(killed)
    assert Study(tmp_path / "whole/study.db").features() == Study(tmp_path / "killed/study.db").features()


def test_workers_give_the_same_numbers_and_shards_join(tmp_path, dit) -> None:
    protocol, bank = replace(PROTOCOL, images=6), str(tmp_path / "bank")
    assert measure(dit, Study(tmp_path / "one.db"), 6, protocol=protocol, space=SPACE, bank=bank) == 11
    before = fingerprint(dit.denoiser)
    measure(
        dit,
        Study(tmp_path / "two.db"),
        6,
        protocol=protocol,
        space=SPACE,
        bank=str(tmp_path / "bank2"),
        workers=2,
    )
    assert table(tmp_path / "one.db").equals(table(tmp_path / "two.db"))
    assert measure(dit, Study(tmp_path / "one.db"), 6, protocol=protocol, space=SPACE, bank=bank) == 0, (
        "measured again, nothing is new"
    )
    assert fingerprint(dit.denoiser) == before and not any(
        isinstance(m, QuantLinear) for m in dit.denoiser.modules()
    ), "the user's model stays"
    parts = [{c.digest for c in shard_of(make_space(trace(dit), "f").sample(6), f"{i}/3")} for i in (1, 2, 3)]
    assert len(set.union(*parts)) == 6 == sum(map(len, parts))
    for bad in ("0/2", "3/2", "x", "1"):
        with pytest.raises(AquabitError, match="shard"):
            shard_of([], bad)


def test_few_images_are_not_padded_and_a_study_begun_with_padding_goes_on(tmp_path, dit, monkeypatch) -> None:
    given = Protocol(images=3, steps=1, objective="mse")
    assert given.micro_batch == 64
    made = partial(measure, dit, space=SPACE, protocol=given, bank=str(tmp_path / "bank"))
    sizes = set[int]()
    dit.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.add(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    study = Study(tmp_path / "new.db")
    assert made(study, 0) > 0 and study.protocol.micro_batch == 3
    assert 64 not in sizes and 3 in sizes
    assert made(study, 0) == 0
    monkeypatch.setattr(Protocol, "evened", lambda self: self)
    before = Study(tmp_path / "old.db")
    count = made(before, 0)
    assert count > 0 and before.protocol.micro_batch == 64
    monkeypatch.undo()
    assert made(before, 0) == 0, "what was measured with padding is known"
    assert made(before, 1) == 1 and list(before.protocols()) == [before.protocol.digest]
    assert 64 in sizes
    new, old = (s.measurements().set_index("config")["mse"] for s in (study, before))
    assert new.to_dict() == pytest.approx(old[new.index].to_dict(), rel=0.02), (
        "the same images, but for rounding"
    )


def test_workers_are_gone_when_the_parent_is_gone_and_replaced_when_they_die(tmp_path, dit) -> None:
    dit.save_pretrained(tmp_path / "pipe")
    model = open_model(str(tmp_path / "pipe"))
    begin = Begin(str(tmp_path / "pipe"), to_json(model.graph), str(tmp_path / "bank"), model.fingerprint)
    workers = ProcessPool(1, begin)
    config = make_space(model.graph, model.fingerprint).uniform("usq4")
    task = Measure(config, PROTOCOL)
    first = next(workers.run([task]))[1]
    assert workers._workers[0] is not None
    process = workers._workers[0].process
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = next(workers.run([task]))[1]
    assert first[0].metrics == again[0].metrics, "the task went to a new worker"
    survivor = workers._workers[0].process
    assert survivor.stdin is not None and survivor.poll() is None
    survivor.stdin.close()  # what a dead parent leaves behind
    for _ in range(100):
        if survivor.poll() is not None:
            break
        time.sleep(0.05)
    assert survivor.poll() == 0
    workers.close()


def test_a_task_that_kills_every_worker_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processes._Worker, "ask", lambda self, task: (_ for _ in ()).throw(EOFError()))
    monkeypatch.setattr(processes._Worker, "__init__", lambda self, begin: None)
    with pytest.raises(AquabitError, match="died twice"):
        list(ProcessPool(2, Begin("m", {}, "b", "f")).run([Fit({})]))


def test_images_do_not_depend_on_their_number_or_order(pipe) -> None:
    adapter = Adapter(pipe)
    many, few = replace(PROTOCOL, images=7), replace(PROTOCOL, images=5)
    a = torch.cat([adapter.images(many, b) for b in adapter.batches(many)])
    b = torch.cat([adapter.images(few, b) for b in adapter.batches(few)])
    assert torch.equal(a[:5], b) and not torch.equal(a[0], a[1])
    shifted = replace(PROTOCOL, seed=2, conditions=(2, 3, 4, 5), images=3)
    assert torch.allclose(
        torch.cat([adapter.images(shifted, b) for b in adapter.batches(shifted)]), a[2:5], atol=1e-5
    )


def test_failed_measurements_are_recorded_with_their_reason(tmp_path, unet, monkeypatch) -> None:
    original = Adapter.images
    monkeypatch.setattr(
        Adapter,
        "images",
        lambda self, p, i, **how: original(self, p, i, **how) * (float("nan") if broken(self) else 1),
    )

    def broken(adapter: Adapter) -> bool:
        return str(getattr(adapter.network.get_submodule("conv_in"), "scheme", "")) == "usq2"

    study = Study(tmp_path / "s.db")
    measure(unet, study, 4, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    failed = study.measurements(failed=True).query("status == 'failed'")
    assert len(failed) >= 1 and failed.reason.str.contains("non-finite").all()
    assert len(study.measurements(failed=True)) == 9 and len(study.measurements()) == 9 - len(failed)


def test_nan_weights_are_named(tmp_path, dit) -> None:
    with torch.no_grad():
        dit.denoiser.transformer_blocks[1].attn1.to_q.weight[0, 0] = float("nan")
    with pytest.raises(AquabitError, match=r"transformer_blocks\.1\.attn1\.to_q\.weight holds NaN"):
        measure(dit, Study(tmp_path / "s.db"), 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))


def test_objectives_and_metrics_without_real_images(tmp_path, dit) -> None:
    dit.register_to_config(real_images="")
    study = Study(tmp_path / "s.db")
    measure(dit, study, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    assert study.protocol.objective == "mse" and set(study.measurements().columns) >= {"mse", "psnr", "ssim"}
    assert "fid" not in study.measurements().columns
    with pytest.raises(AquabitError, match="needs --reference DIR and --features inception=FILE"):
        measure(
            dit,
            Study(tmp_path / "t.db"),
            2,
            protocol=replace(PROTOCOL, objective="sfid"),
            bank=str(tmp_path / "bank"),
        )


def quantized(pipe, tmp_path):
    graph = trace(pipe)
    return QuantizedDenoiser(pipe.denoiser, graph, Bank(tmp_path)), graph


def test_layers_compute_what_they_say(tmp_path, unet) -> None:
    model, graph = quantized(unet, tmp_path)
    space = make_space(graph, "f")
    plain = {n: layer.weight.clone() for n, layer in model.layers.items()}
    model.apply(space.uniform("usq3", 6))
    splits = {n: a["split"] for n, a in layers(graph).items() if a.get("split")}
    assert splits, "a U-Net has layers fed by a concatenated skip"
    g = torch.Generator().manual_seed(0)
    for name, layer in model.layers.items():
        coded = model.fitter.found(FitRequest(name, layer.scheme), None)
        assert (
            coded is not None
            and torch.equal(coded.coded.dequantize(), layer.weight)
            and not torch.equal(layer.weight, plain[name])
        )
        if isinstance(layer, QuantConv2d):
            x = torch.randn(2, layer.in_channels, 4, 4, generator=g)
            expected = torch.nn.functional.conv2d(
                fake_quantize_reference(x, 6, "sample", splits.get(name)),
                layer.weight,
                layer.bias,
                layer.stride,
                layer.padding,
            )
        else:
            x = torch.randn(3, layer.in_features, generator=g)
            expected = torch.nn.functional.linear(
                fake_quantize_reference(x, 6, "token"), layer.weight, layer.bias
            )
            if name.endswith(("to_q", "to_k", "to_v")):
                expected = fake_quantize_reference(expected, 6, "token")
        torch.testing.assert_close(layer(x), expected)
    model.apply(space.full_precision())
    assert all(
        torch.equal(layer.weight, plain[n]) and layer.act == layer.act_output == 16
        for n, layer in model.layers.items()
    )


def test_decoded_weights_are_kept_within_a_limit(tmp_path, dit, monkeypatch) -> None:
    model, graph = quantized(dit, tmp_path)
    space, calls = make_space(graph, "f"), []
    original = model.fitter.coded
    monkeypatch.setattr(
        model.fitter, "coded", lambda need, calibration: calls.append(need) or original(need, calibration)
    )
    for scheme in ("usq4", "usq3", "usq4", "usq3"):
        model.apply(space.uniform(scheme))
    assert len(calls) == 2 * len(model.layers), "the second time nothing is decoded"
    size = sum(layer.weight.nbytes for layer in model.layers.values())
    monkeypatch.setattr("aquabit.quant.model.DECODED_LIMIT", size // 2)
    model.apply(space.uniform("usq2"))
    kept = sum(t.nbytes for t in model._recent.values())
    assert kept == model._recent_bytes <= size // 2
    expected = {
        n: model.fitter.found(FitRequest(n, layer.scheme), None).coded.dequantize()
        for n, layer in model.layers.items()
    }
    assert all(torch.equal(layer.weight, expected[n]) for n, layer in model.layers.items())


def test_softmax_outputs_are_quantized_unless_v_is_not(tmp_path, dit, monkeypatch) -> None:
    model, graph = quantized(dit, tmp_path)
    space, rounded = make_space(graph, "f"), []
    from aquabit.quant import attention

    original = attention.rounded_attention
    monkeypatch.setattr(
        attention,
        "rounded_attention",
        lambda q, k, v, *rest: rounded.append((q, k, v, original(q, k, v, *rest))) or rounded[-1][-1],
    )
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    model.apply(space.full_precision())
    exact = dit.denoiser(**inputs).sample
    assert not rounded
    model.apply(space.uniform("fp", 8))
    near = dit.denoiser(**inputs).sample
    assert len(rounded) == 2
    for q, k, v, y in rounded:
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        step = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).amax(-1, keepdim=True) / 255
        assert (y - plain).abs().max() > 0
        assert ((y - plain).abs() <= step * v.abs().sum(-2, keepdim=True)).all()
    assert 0 < (near - exact).abs().max() < 0.3
    rounded.clear()
    config = space.uniform("fp", 8)
    for name in model.layers:
        if name.endswith("to_v"):
            config = config.with_layer(name, "fp", 16)
    model.apply(config)
    dit.denoiser(**inputs)
    assert not rounded
    for act in ("i8", "f8"):  # what other programs multiply so: nothing of attention
        model.apply(space.uniform("fp", act))
        dit.denoiser(**inputs)
        assert not rounded and {layer.act_output for layer in model.layers.values()} == {16}


def test_the_bank_keeps_full_precision_images(tmp_path, dit) -> None:
    model = open_model(dit)
    evaluator = Evaluator(dit, model.graph, Bank(tmp_path), model.fingerprint)
    first, png = evaluator.measure(make_space(model.graph, model.fingerprint).full_precision(), PROTOCOL)
    assert first.metrics["psnr"] == 100 and png is not None and png.startswith(b"\x89PNG")
    made = os.listdir(tmp_path)
    assert sum(f.startswith("images-") for f in made) == 1
    images = evaluator.full_precision(PROTOCOL)
    evaluator._full = "", {}
    assert torch.equal(evaluator.full_precision(PROTOCOL), images)


def test_a_full_disk_is_no_failed_measurement(tmp_path, dit, monkeypatch) -> None:
    """What cannot be stored is an error that names the bank; nothing false gets into the study, and the
    same command continues."""
    from aquabit.quant import bank

    study, full, save = Study(tmp_path / "s.db"), [], bank.save_file

    def write(kind: str, tensors: dict[str, torch.Tensor], *rest: object) -> None:
        if kind in tensors:
            full.append(kind)
            raise OSError(28, "No space left on device")
        save(tensors, *rest)

    for kind in ("codes", "images"):
        with monkeypatch.context() as patch:
            patch.setattr(bank, "save_file", partial(write, kind))
            with pytest.raises(AquabitError, match=r"bank .* could not be written .*No space left"):
                measure(dit, study, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    assert full == ["codes", "images"]
    assert study.measurements(failed=True).empty and not [
        f for f in os.listdir(tmp_path / "bank") if f.startswith(".")
    ]
    assert measure(dit, study, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank")) >= 6


def other_pipeline(kind: str):
    """Tiny pipelines of diffusers' own classes: unconditional pixels, and classes in a latent space."""
    from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    if kind == "ddim":
        pipe = DDIMPipeline(
            tiny_pipeline("unet").denoiser.from_config(
                {**tiny_pipeline("unet").denoiser.config, "num_class_embeds": None}
            ),
            DDIMScheduler(),
        )
    else:
        vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
        net = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
        )
        pipe = DiTPipeline(net, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["ddim", "dit"])
@pytest.mark.parametrize("workers", [1, 2])
def test_pipelines_of_diffusers_itself(tmp_path, kind: str, workers: int) -> None:
    study, protocol = (
        Study(tmp_path / "s.db"),
        replace(
            PROTOCOL, conditions=None if kind == "ddim" else (1, 2), guidance=1.0 if kind == "ddim" else 2.0
        ),
    )
    made = measure(
        other_pipeline(kind),
        study,
        3,
        protocol=protocol,
        space={"schemes": ["usq2", "usq4", "usq8"]},
        bank=str(tmp_path / "bank"),
        workers=workers,
    )
    found = study.measurements()
    assert made == len(found) >= 7 and study.protocol.objective == "mse"
    by_bits = found[found.kind == "uniform"].sort_values("bits").psnr.tolist()
    assert by_bits[0] < by_bits[-1] < 100 and (found[found.kind == "reference"].psnr == 100).all()


def test_what_a_pipeline_would_ignore_is_refused(dit) -> None:
    from aquabit.pipelines import set_scheduler

    cases = [
        ({"conditions": ("a cat",)}, "'a cat' is no class label"),
        ({"conditions": (3, 10)}, "class label 10 is out of range"),
    ]
    for change, said in cases:
        with pytest.raises(AquabitError, match=said):
            Adapter(dit).images(replace(PROTOCOL, **change), range(2))
    assert Adapter(dit).conditions(replace(PROTOCOL, conditions=("3", 4)))[:2] == [3, 4]
    unconditional = Adapter(other_pipeline("ddim"))
    for change, said in (({"guidance": 2.0}, "has no guidance"), ({"conditions": (1,)}, "is unconditional")):
        with pytest.raises(AquabitError, match=said):
            unconditional.images(replace(PROTOCOL, **change), range(2))
    set_scheduler(dit, "euler")
    with pytest.raises(AquabitError, match="has no eta"):
        Adapter(dit).images(replace(PROTOCOL, eta=1.0), range(2))


def test_a_copied_denoiser_rounds_its_own_softmax(dit) -> None:
    """The copy's attention runs the copy's layers, not those of the model that it was copied from."""
    model = QuantizedDenoiser(dit.denoiser, trace(dit))
    twin = copy.deepcopy(model.denoiser)
    seen = []
    for name, module in twin.named_modules():
        if name.endswith("to_v"):
            module.register_forward_hook(lambda *_: seen.append(1))
    attention = next(m for m in twin.modules() if hasattr(m, "to_v"))
    x = torch.randn(1, 5, attention.to_v.in_features)
    plain = attention(x)
    assert seen
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.act = 4
    assert not torch.equal(attention(x), plain)
