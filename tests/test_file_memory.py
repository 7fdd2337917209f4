"""Tensors in files, and models whose weights all lie there: the same bits as in memory, and not in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

from aquabit import file_memory, memory, packing
from aquabit.file_memory import CopiesInFiles, in_file
from aquabit.graph import codebook_names
from aquabit.measuring.evaluator import Evaluator
from aquabit.pipelines import calibration_samples, component_names, denoiser_of, load, own_copy, trace
from aquabit.quant.bank import Bank
from aquabit.quant.calibration.moments import WIDEST
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.scheme import AquabitError, Calibration, Protocol, QuantConfig
from aquabit.space import make_space
from tests.conftest import tiny_pipeline
from tests.tiny_pipelines import PROMPTED, PROMPTS, tiny, vae

linux = pytest.mark.skipif(sys.platform != "linux", reason="says which files are mapped")


def file_of(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is, whether it still has a name or not; empty where it is none."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            name = [*line.split(maxsplit=5), ""][5]
            return name if name.startswith("/") else ""  # "[heap]" is memory
    return ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_tensor_in_a_file_is_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    given = torch.arange(60).reshape(3, 4, 5).transpose(0, 1).to(dtype)
    kept = in_file(given, tmp_path)
    assert torch.equal(kept, given) and kept.dtype == dtype and kept.is_contiguous()
    kept[0, 0, 0] = 7
    assert given[0, 0, 0] == 0 and kept[0, 0, 0] == 7
    assert not list(tmp_path.iterdir()), "no file is left, however the process ends"
    with pytest.raises(AquabitError, match=r"could not be kept in a file .* AQUABIT_BANK"):
        in_file(given, tmp_path / "missing")


@linux
def test_large_copies_lie_in_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(file_memory, "LARGE", 4000)
    large, small = torch.arange(1000).short(), torch.arange(900).short()
    with CopiesInFiles(tmp_path):
        made = [large.float(), large.double().clone(), small.float(), large.to(torch.int16)]
    assert [str(tmp_path) in file_of(t) for t in made] == [True, True, False, False]
    assert torch.equal(made[0], large.float()) and not file_of(large.float())


SCHEMES = ("usq4", "vq3c", "usq3h", "aq2x4g4", "usq4g8")


def mixed(pipe: Any, prompts: bool) -> QuantConfig:
    """Kinds of schemes in turn, one layer in full precision, shared codebooks."""
    graph = trace(pipe)
    calibration = Calibration(images=4, steps=2, conditions=PROMPTS if prompts else None)
    space = make_space(graph, fingerprint(denoiser_of(pipe)), calibration=calibration)
    config, partners = space.uniform("usq4", 8), codebook_names(graph)
    for i, name in enumerate(space.layers):
        config = config.with_layer(name, SCHEMES[i % len(SCHEMES)])
        if name in partners and i % 2:
            config = config.with_layer(name, "aq2x3g4s", codebook=partners[name])
    return config.with_layer(space.layers[1], "fp", 16)


def quantized(folder: Path, config: QuantConfig, work: Path) -> dict[str, torch.Tensor]:
    packing.quantize(str(folder), config, bank=str(work / "bank")).save(work / "packed")
    files = sorted(work.glob("packed/*/*.safetensors"))
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize(("name", "stored"), [("dit", "bfloat16"), ("sdxl", "float32"), ("sd3", "float16")])
def test_what_lies_in_files_is_quantized_to_the_same_bits(
    name: str, stored: str, shard: str, tmp_path: Path, monkeypatch
) -> None:
    pipe = tiny(name).to(dtype=getattr(torch, stored))
    pipe.save_pretrained(tmp_path / "model", max_shard_size=shard)
    own = tmp_path / "model" / component_names(pipe)[0]
    assert len(list(own.glob("*.safetensors"))) == (1 if shard == "1GB" else len(list(own.glob("*-of-*"))))
    assert (own / "diffusion_pytorch_model.safetensors.index.json").exists() == (shard != "1GB")
    monkeypatch.setattr(file_memory, "LARGE", 1 << 60)
    config = mixed(load(str(tmp_path / "model")), name in PROMPTED)
    expected = quantized(tmp_path / "model", config, tmp_path / "memory")
    monkeypatch.setattr(file_memory, "LARGE", 1)
    found = quantized(tmp_path / "model", config, tmp_path / "files")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


@linux
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_weight_is_in_memory(tmp_path: Path, monkeypatch, stored: str, dtype: str) -> None:
    """From loading to what is saved: weights, text encoders' too, lie in files, and codes in the bank's."""
    tiny("sd3").to(dtype=getattr(torch, stored)).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    monkeypatch.setattr(file_memory, "LARGE", 1)
    monkeypatch.setenv("AQUABIT_BANK", str(tmp_path / "bank"))
    pipe = load(str(tmp_path / "model"), dtype=dtype)
    for part in (pipe.transformer, pipe.text_encoder_3, pipe.vae):
        assert all(str(tmp_path) in file_of(p) for p in part.parameters()), type(part).__name__
    own = own_copy(pipe)
    assert all(file_of(p) for p in own.transformer.parameters())
    graph, print_ = trace(pipe), fingerprint(pipe.transformer)
    config = make_space(graph, print_).uniform("usq4", 16)
    config = config.with_layer(next(iter(config.layers)), "fp", 16)
    model = QuantizedDenoiser(pipe.transformer, graph, Bank(tmp_path / "bank"), print_)
    assert all(str(tmp_path) in file_of(w) for w in model.weights.values())
    if (
        stored == dtype == "float32"
    ):  # rounding would have drawn the pages of the model's own files into memory
        assert all("/bank/" in file_of(w) for w in model.weights.values())
    model.code(config)
    for name, layer in model.layers.items():
        assert layer.coded is None or str(tmp_path / "bank") in file_of(layer.coded.packed), name
        assert layer.coded is not None or file_of(layer.weight), name
    model.arrange()
    assert not any(file_of(layer.packed.codes) for layer in model.layers.values() if layer.packed is not None)


MEMORY = """
import sys, threading, time
import aquabit.packing
from aquabit.scheme import QuantConfig

def own():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) << 10

def watch():
    while True:
        seen.append(own())
        time.sleep(0.002)

folder, config, work = sys.argv[1:]
aquabit.packing.quantize("digits-dit", QuantConfig.load(work + "/small.json"), bank=work)  # imports the rest
seen = [own()]
threading.Thread(target=watch, daemon=True).start()
aquabit.packing.quantize(folder, QuantConfig.load(config), bank=work).save(work + "/packed")
print(max(seen) - seen[0])
"""


@linux
@pytest.mark.slow
def test_quantizing_takes_less_memory_than_the_model(tmp_path: Path) -> None:
    """Of a process's own, which is what the system cannot take back."""
    folder = tmp_path / "model"
    net = DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=16,
        sample_size=8,
    )
    size = sum(4 * p.numel() for p in net.parameters())
    DiTPipeline(net.bfloat16(), vae(), DDIMScheduler()).save_pretrained(folder, max_shard_size="50MB")
    for name, path in ((str(folder), "config.json"), ("digits-dit", "small.json")):
        pipe = load(name)
        space = make_space(trace(pipe), fingerprint(denoiser_of(pipe)))
        config = space.full_precision()
        small = [n for n in space.layers if ".attn1." in n]  # a large layer's fit takes memory, for a while
        for layer in small[: 30 if name == str(folder) else 1]:
            config = config.with_layer(layer, "usq4", 16)
        (tmp_path / path).write_text(config.to_json())
    words = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "config.json"), str(tmp_path)]
    own = {**os.environ, "AQUABIT_BANK": str(tmp_path / "bank"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout.splitlines()[-1])
    assert taken < 0.4 * size, f"{taken / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def test_a_packed_model_runs_after_it_was_saved(tmp_path: Path) -> None:
    pipe = tiny_pipeline("dit")
    config = make_space(trace(pipe), fingerprint(pipe.denoiser)).uniform("usq4", 16)
    packed = packing.quantize(pipe, config, bank=str(tmp_path / "bank"))
    packed.save(tmp_path / "packed")
    protocol = {"images": 2, "steps": 2, "deterministic": True}
    images = packing.generate(packed.pipe, **protocol)
    assert torch.equal(images, packing.generate(str(tmp_path / "packed"), **protocol))


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_sketches_of_what_lies_in_files_are_the_same_bits(name: str, tmp_path: Path, monkeypatch) -> None:
    tiny(name).to(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    found, conditions = [], PROMPTS if name in PROMPTED else None
    for large in (1 << 60, 1):
        monkeypatch.setattr(file_memory, "LARGE", large)
        pipe = load(str(tmp_path / "model"))
        graph, own = trace(pipe), fingerprint(denoiser_of(pipe))
        evaluator = Evaluator(str(tmp_path / "model"), graph, Bank(tmp_path / f"bank{large}"), own)
        space = make_space(graph, own)
        assert (large == 1) == bool(file_of(evaluator.quantized.full(space.layers[0]))) or sys.platform != (
            "linux"
        )
        choices = dict.fromkeys(space.layers, ("usq4", "usq2"))
        protocol = Protocol(images=2, steps=2, micro_batch=2, conditions=conditions)
        found.append(evaluator.sketches(choices, [8], protocol, 0, 2, space.full_precision())["numbers"])
    assert found[0] == found[1] and any(v != 0 for row in found[0].values() for v in row["usq2"])


def test_a_calibrated_fit_holds_h_of_layers_that_are_not_too_wide() -> None:
    plain, width = memory.fit_bytes((8, 1000), False), 4 * 1000 * 1000
    assert 5 * width < memory.fit_bytes((8, 1000), True) - plain < 6 * width
    assert memory.WIDEST == WIDEST
    assert memory.fit_bytes((8, WIDEST + 1), True) == memory.fit_bytes((8, WIDEST + 1), False)


def test_too_little_memory_for_one_layer_is_said(tmp_path: Path, monkeypatch) -> None:
    pipe = tiny_pipeline("dit")
    space = make_space(trace(pipe), fingerprint(pipe.denoiser), calibration=Calibration(images=4, steps=2))
    plain, aware = space.uniform("usq4", 16), space.uniform("usq4h", 16)
    sizes = {n: a["shape"][0] * a["shape"][1] for n, a in trace(pipe).nodes(data=True) if n in plain.layers}
    largest = max(sizes, key=lambda n: sizes[n])
    fit = memory.LIBRARIES + memory.FIT_BYTES * sizes[largest]
    monkeypatch.setattr(memory, "memory_of", lambda device: fit - 1)
    with pytest.raises(AquabitError, match=rf"'{largest}' to usq4 .*, there are .*; leave it at fp"):
        packing.quantize(pipe, plain, bank=str(tmp_path))
    smaller = plain
    for name in (n for n, size in sizes.items() if size == sizes[largest]):
        smaller = smaller.with_layer(name, "fp", 16)
    memory.check_quantizing(trace(pipe), smaller, 4)
    memory.check_quantizing(trace(pipe), QuantConfig("", {}), 4)
    monkeypatch.setattr(memory, "memory_of", lambda device: fit)
    packing.quantize(pipe, plain, bank=str(tmp_path))
    with pytest.raises(AquabitError, match=rf"'{largest}' to usq4h .*, there are"):
        packing.quantize(pipe, aware, bank=str(tmp_path))  # H of its inputs is held besides
    shapes = {n: tuple(a["shape"]) for n, a in trace(pipe).nodes(data=True) if n in plain.layers}
    fit = memory.LIBRARIES + max(memory.fit_bytes(shape, True) for shape in shapes.values())
    monkeypatch.setattr(memory, "memory_of", lambda device: fit)
    with pytest.raises(AquabitError, match=r"calibrating with \d+ samples .* lower the resolution .* usq4"):
        memory.check_quantizing(trace(pipe), aware, 100_000)
    memory.check_quantizing(trace(pipe), plain, 100_000)
    calibration = Calibration(images=4, steps=2)
    assert calibration_samples(pipe, calibration) == 4
    assert calibration_samples(tiny("sd"), Calibration(images=2, guidance=3.0, resolution=32)) == 2 * 2 * 4
