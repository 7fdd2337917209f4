"""A model of the user's own: what its function may look like, what is refused, the steps told from calls,
artifacts, and every verb on it."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu

import aquabit
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.model import open_model
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.pipelines import adapter_of, check_sampler
from aquabit.quant.bank import Bank
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.scheme import AquabitError, LayerChoice, Protocol, QuantConfig, Scheme
from aquabit.sensitivity.plan import SampleOptions, plan
from tests.command_line import fails, run

PROTOCOL = Protocol(images=4, steps=3, micro_batch=4, objective="mse")
SPACE = {"schemes": ["usq2", "usq4", "fp"], "activations": [8]}


class Net(nn.Module):
    """The user's: images [n, 1, 8, 8], noise levels and labels [n]; dropout makes training differ."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.level, self.label = nn.Linear(1, width), nn.Embedding(4, width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout, self.last = nn.Dropout(0.5), nn.Conv2d(width, 1, 3, padding=1)
        self.register_buffer("scale", torch.tensor(0.25))

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1)
        e = self.level(sigma.expand(len(x), 1).log() * self.scale) + self.label(label)
        h = self.dropout(
            silu(self.first(x / (1 + sigma[:, :, None, None] ** 2).sqrt()) + e[:, :, None, None])
        )
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        h = h + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(1, 2).unflatten(2, (8, 8))
        return self.last(h)


def noise(seeds: Sequence[int]) -> Tensor:
    return torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])


# what a user writes of an EDM sampler (Karras et al. 2022, algorithm 1), from here
def heun(net: nn.Module, seeds: list[int], conditions: list[int], steps: int = 3) -> Tensor:
    t = torch.linspace(10 ** (1 / 7), 0.02 ** (1 / 7), steps) ** 7
    t = torch.cat([t, torch.zeros(1)])
    x, labels = noise(seeds) * t[0], torch.tensor(conditions)
    for now, then in pairwise(t):
        slope = (x - net(x, now, labels)) / now
        guess = x + (then - now) * slope
        if then > 0:
            slope = (slope + (guess - net(guess, then, labels)) / then) / 2
        x = x + (then - now) * slope
    return (x / 2 + 0.5).clamp(0, 1)


def own(sample: Any = heun, **given: Any) -> aquabit.Model:
    torch.manual_seed(0)
    return aquabit.Model(
        Net(), sample, **{"conditions": range(4), "layers": {"qk*": "self_attn.qkv"}, **given}
    )


# to here


def simple(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    """One call a step."""
    x = noise(seeds)
    for i in range(steps):
        x = x - 0.3 * net(x, torch.full((len(seeds),), float(steps - i)), torch.tensor(conditions))
    return torch.sigmoid(x)


def coded(model: aquabit.Model, scheme: str = "usq4", act: Any = 8, **more: Any) -> QuantConfig:
    opened = open_model(model)
    names = [n for n, a in opened.graph.nodes(data=True) if a["kind"] != "merge"]
    return QuantConfig(opened.fingerprint, {n: LayerChoice(Scheme.parse(scheme), act) for n in names}, **more)


def test_an_edm_sampler_takes_at_most_25_lines() -> None:
    lines = Path(__file__).read_text().splitlines()
    start, end = (
        next(i for i, line in enumerate(lines) if line == text)
        for text in (
            "# what a user writes of an EDM sampler (Karras et al. 2022, algorithm 1), from here",
            "# to here",
        )
    )
    assert (
        len([line for line in lines[start + 1 : end] if line.strip()])
        + len(inspect.getsource(noise).splitlines())
        <= 25
    )


def test_it_is_measured_in_place_of_a_pipeline_and_left_as_it_was(tmp_path: Path) -> None:
    model, study = own(), aquabit.Study(tmp_path / "s.db")
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    graph = aquabit.trace(model)
    assert graph.nodes["qkv"]["operator"] == "self_attn.qkv" and graph.nodes["first"]["shape"] == (8, 1, 3, 3)
    aquabit.measure(model, study, 1, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    table = study.measurements()
    assert len(table) >= 3 and (table.status == "ok").all()
    assert (table.mse[table.kind == "reference"] == 0).all() and (
        table.mse[table.kind != "reference"] > 0
    ).all()
    found = study.features()
    assert all(found[n, "usq2"]["gradient"] for n in ("first", "qkv", "last"))  # gradients pass
    assert model.denoiser.training and isinstance(model.denoiser.qkv, nn.Linear)
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())


@pytest.mark.parametrize("decorated", [True, False])
def test_without_gradients_there_are_probes_and_it_is_said(tmp_path: Path, decorated: bool) -> None:
    """torch.no_grad as a decorator is left out; inside the function it stays, and damages are probed."""

    def inside(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
        with torch.no_grad():
            return simple(net, seeds, conditions, steps)

    model = own(torch.no_grad()(simple) if decorated else inside)
    study = aquabit.Study(tmp_path / "s.db")
    aquabit.measure(model, study, 0, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    assert all("damage" in study.features()[n, "usq2"] for n in ("first", "qkv", "last"))
    assert ("gradient" in study.features()["first", "usq2"]) == decorated
    assert bool(study.get("untold")) != decorated


class _Steps(Watcher):
    def __init__(self) -> None:
        self.begun, self.seen = list[int](), list[int]()

    def begin(self, scheduler: Any) -> None:
        self.begun.append(len(scheduler.timesteps))

    def before(self, step: int) -> None:
        self.seen.append(step)


@pytest.mark.parametrize(
    ("sample", "steps"), [(simple, [0, 1, 2]), (heun, [0, 0, 1, 1, 2])], ids=["one call", "two calls"]
)
def test_steps_are_told_from_the_calls(sample: Any, steps: list[int]) -> None:
    """From the first run on: an unseen one counts its calls. Nobody else hears of that one."""
    model, seen, layer = own(sample), _Steps(), list[Any]()
    model.denoiser.first.register_forward_hook(lambda *_: layer.append(1))
    with following(model.denoiser, model.scheduler, [seen]):
        adapter_of(model).images(PROTOCOL, range(4))
    assert seen.begun == [3] and seen.seen == steps and len(layer) == len(steps)
    assert not vars(model.scheduler).keys() & {"step", "set_timesteps"}  # nobody follows any more


def test_activations_by_step_and_static_ranges(tmp_path: Path) -> None:
    model = own()
    groups = aquabit.scheme.StepGroups(3, (0, 2))
    calibration = aquabit.scheme.Calibration(images=4, steps=3)
    changing = coded(model, act=(8, 4), steps=groups, calibration=calibration)
    opened = open_model(model)
    evaluator = Evaluator(model, opened.graph, Bank(str(tmp_path / "bank")), opened.fingerprint)
    made = {a: evaluator.generate(coded(model, act=a), PROTOCOL) for a in (8, 4)}
    both = evaluator.generate(changing, PROTOCOL)
    assert all(not torch.equal(both, one) for one in made.values())
    packed = aquabit.quantize(model, changing, bank=str(tmp_path / "bank"))
    assert torch.allclose(packed([0, 1, 2, 3], [0, 1, 2, 3], steps=3), both, atol=1e-4)
    with pytest.raises(AquabitError, match="set for 3 steps, not for 5"):
        packed([0], [0], steps=5)
    packed.save(tmp_path / "packed")
    for back in (aquabit.load(tmp_path / "packed", into=own()), packed.pipe.copied()):
        assert torch.equal(back([0, 1], [0, 1], steps=3), packed([0, 1], [0, 1], steps=3))
    with pytest.raises(AquabitError, match="set for 3 steps, not for 2"):
        back([0], [0], steps=2)


def test_artifacts_hold_what_was_packed_and_refuse_what_was_changed(tmp_path: Path) -> None:
    """Tensors and configuration alone, in files of a given size; another net, a changed tensor, a lost one
    and another folder's files are said."""
    model, folder = own(), tmp_path / "packed"
    packed = aquabit.quantize(model, coded(model), bank=str(tmp_path / "bank"))
    size = packed.save(folder, max_shard_size=500)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        *(p.name for p in files),
    ]
    stored = [t for p in files for t in load_file(p).values()]
    assert size == sum(t.nbytes for t in stored) < 2 * sum(p.numel() for p in model.denoiser.parameters())
    other = own()
    other.denoiser.load_state_dict({k: torch.zeros_like(v) for k, v in other.denoiser.state_dict().items()})
    back = aquabit.load(folder, into=other)  # whatever weights it has
    images = packed([0, 1, 2], steps=3)
    assert torch.equal(back([0, 1, 2], steps=3), images) and isinstance(other.denoiser.qkv, nn.Linear)
    assert torch.equal(aquabit.generate(back, 3, steps=3, deterministic=True), images)
    assert packed.save(folder) == size and len(list(folder.iterdir())) == 2  # instead of the many files
    with pytest.raises(AquabitError, match="into=model"):
        aquabit.load(folder)
    with pytest.raises(AquabitError, match="was made of a Net, and the model's denoiser is a Linear"):
        aquabit.load(folder, into=aquabit.Model(nn.Linear(1, 1), heun))
    with pytest.raises(AquabitError, match="stored as"):
        aquabit.load(folder, into=aquabit.Model(Net(16), heun, range(4)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"full precision")
    with pytest.raises(AquabitError, match="give another folder"):
        packed.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"full precision"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "first.bias": tensors["first.bias"] + 1}, folder / "model.safetensors")
    with pytest.raises(AquabitError, match="is not what was written"):
        aquabit.load(folder, into=model)
    save_file({k: v for k, v in tensors.items() if k != "scale"}, folder / "model.safetensors")
    with pytest.raises(AquabitError, match="lack 'scale'"):
        aquabit.load(folder, into=model)


def test_a_sampler_of_one_step_is_planned(tmp_path: Path) -> None:
    """What is timed is asked for no more steps than the protocol has: a distilled model knows no others."""

    def one(net: nn.Module, seeds: list[int], conditions: list[int], steps: int = 1) -> Tensor:
        assert steps == 1
        return simple(net, seeds, conditions, steps)

    torch.manual_seed(0)
    given = MeasureOptions(replace(PROTOCOL, steps=1), {"schemes": ["usq4", "usq2"], "activations": [8]})
    where = Where(bank=str(tmp_path / "bank"))
    found = plan(aquabit.Model(Net(), one, range(4)), None, SampleOptions(0), given, where)
    assert found.backward_passes == 2 * 4 and found.probing_seconds > 0


def test_tied_tensors_are_stored_and_come_back(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.half()
            self.again = self.label

    torch.manual_seed(0)
    model = aquabit.Model(Tied().float(), heun, range(4))
    packed = aquabit.quantize(model, coded(model), bank=str(tmp_path / "bank"))
    packed.save(tmp_path / "packed")
    assert torch.equal(
        aquabit.load(tmp_path / "packed", into=model)([0, 1], steps=3), packed([0, 1], steps=3)
    )


def _unseeded(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return (simple(net, seeds, conditions, steps) + 0.1 * torch.rand(len(seeds), 1, 8, 8)).clamp(0, 1)


def _one_image(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, [0] * len(seeds), conditions, steps)


def _over_the_batch(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    x = simple(net, seeds, conditions, steps)
    return (x - x.min()) / (x.max() - x.min())


def _by_place(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, [seeds[0] + i for i in range(len(seeds))], conditions, steps)


def _unclamped(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, seeds, conditions, steps) * 2 - 1


def _growing(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, seeds, conditions, steps).repeat(1, 1, 1, len(seeds))


def _fewer(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, seeds, conditions, steps)[:1]


def _a_list(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> list[Tensor]:
    return list(simple(net, seeds, conditions, steps))


def _sparse(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, seeds, conditions, steps).to_sparse()


def _nowhere(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, seeds, conditions, steps).to("meta")


def _objects(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> np.ndarray:
    return simple(net, seeds, conditions, steps).numpy().astype(object)


def _channels_last(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, seeds, conditions, steps).permute(0, 2, 3, 1)


def _leaving(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    sys.exit("no data here")


def _guided_in_vain(
    net: nn.Module, seeds: list[int], conditions: list[int], steps: int, guidance: float
) -> Tensor:
    return simple(net, seeds, conditions, steps)


def _raising(net: nn.Module, seeds: list[int], conditions: list[int], steps: int) -> Tensor:
    return simple(net, seeds, conditions, steps)[:, 5]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (_unseeded, "called twice with the same seeds, makes other images"),
        (_one_image, "ignores its seeds"),
        (_over_the_batch, "where other images stand beside it"),
        (_by_place, "where other images stand beside it"),
        (_unclamped, "images must lie in"),
        (_growing, "all must have one"),
        (_fewer, r"returned shape \[1, 1, 8, 8\] for 2 seeds"),
        (_a_list, "returned list; expected a tensor"),
        (_sparse, "returned a tensor of torch.sparse_coo; expected a dense one"),
        (_nowhere, "on the meta device, which holds no numbers"),
        (_objects, "returned object numbers; expected a tensor"),
        (_channels_last, r"shape \[2, 8, 8, 1\], whose channels seem to be last"),
        (_leaving, "_leaving failed while it made 2 images .*SystemExit: no data here"),
        (_guided_in_vain, "guidance is 3, but _guided_in_vain makes the same images without it"),
        (_raising, "_raising failed while it made 2 images .*IndexError"),
        (lambda net, seeds, steps=2: torch.rand(len(seeds), 1, 8, 8), "never calls the denoiser"),
    ],
)
def test_what_is_found_by_calling_twice(sample: Any, said: str) -> None:
    conditions = range(4) if "conditions" in inspect.signature(sample).parameters else None
    protocol = replace(PROTOCOL, guidance=3.0) if "guidance" in said else PROTOCOL
    with pytest.raises(AquabitError, match=said):
        check_sampler(own(sample, conditions=conditions), protocol)


def test_arrays_of_any_strides_and_byte_order_are_images() -> None:
    for form in (lambda x: x[:, :, ::-1], lambda x: x.astype(">f4"), lambda x: x.astype(np.float16)):

        def sample(net: Any, seeds: Any, conditions: Any, steps: int, form: Any = form) -> np.ndarray:
            return form(simple(net, seeds, conditions, steps).numpy())

        check_sampler(own(sample), PROTOCOL)


def test_good_samplers_pass_the_check_in_training_mode_too() -> None:
    """Dropout is off while aquabit makes images, and on again afterwards."""
    for sample in (heun, simple):
        model = own(sample)
        model.denoiser.train().dropout.eval()
        check_sampler(model, PROTOCOL)
        assert model.denoiser.training and not model.denoiser.dropout.training


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"guidance": 3.0}, "guidance is 3, but heun takes no guidance"),
        ({"eta": 1.0}, "eta is 1, but heun takes no eta"),
        ({"resolution": 16}, "resolution is 16, but heun takes no resolution"),
        ({"scheduler": "ddim"}, "heun@.* is a sampler of its own"),
        ({"conditions": ("a cat",)}, "'a cat' is no whole number"),
        ({"conditions": ("²",)}, "'²' is no whole number"),
    ],
)
def test_what_the_function_does_not_take_is_refused(tmp_path: Path, asked: Any, said: str) -> None:
    with pytest.raises(AquabitError, match=said):
        aquabit.measure(own(), aquabit.Study(tmp_path / "s.db"), 0, protocol=replace(PROTOCOL, **asked))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: aquabit.Model("net", heun), "must be a torch.nn.Module"),
        (lambda: own("heun"), "it must be a function sample"),
        (lambda: own(lambda net: net), "takes 1 arguments by place"),
        (
            lambda: own(lambda net, seeds, temperature: net),
            "needs 'temperature', which aquabit does not give",
        ),
        (lambda: own(conditions="a cat"), "give a list of texts"),
        (lambda: own(conditions=[0, "a"]), "mixed"),
        (lambda: own(conditions=[0.5]), "no text or whole number"),
        (lambda: own(conditions=[]), "empty"),
        (lambda: own(lambda net, seeds: net), "takes none; name conditions among its parameters"),
        (lambda: aquabit.trace(own(layers={"middle.*": "res"})), "'middle.\\*' matches no layer"),
        (
            lambda: aquabit.trace(own(layers={"qkv": "a", "qk*": "b"})),
            "'qk\\*' matches no layer that an earlier",
        ),
        (lambda: own()([0], guidance=2.0), "heun takes no guidance; it takes conditions, steps"),
        (lambda: own(conditions=None)([0]), "makes images from conditions"),
        (lambda: own()([]), r"seeds are \[\]; give a list of whole numbers"),
        (lambda: own()([0.5]), r"seeds are \[0.5\]; give a list of whole numbers"),
    ],
)
def test_bad_models_are_refused(make: Any, said: str) -> None:
    with pytest.raises(AquabitError, match=said):
        make()


def test_a_correction_needs_a_scheduler(tmp_path: Path) -> None:
    model, space = own(), {**SPACE, "correction": "cnc+bc"}
    with pytest.raises(AquabitError, match="no scheduler"):
        aquabit.measure(model, aquabit.Study(tmp_path / "s.db"), 0, protocol=PROTOCOL, space=space)
    with pytest.raises(AquabitError, match="no scheduler"):
        aquabit.quantize(model, coded(model), correct=True, bank=str(tmp_path / "bank"))


def test_a_sampler_without_steps_has_those_of_its_calls(tmp_path: Path) -> None:
    """They are those of the study; others are refused."""

    def fixed(net: nn.Module, seeds: list[int], conditions: list[int]) -> Tensor:
        return simple(net, seeds, conditions, 2)

    study, usual = aquabit.Study(tmp_path / "s.db"), replace(PROTOCOL, steps=Protocol.steps)
    bank = str(tmp_path / "bank")
    with pytest.raises(
        AquabitError, match="steps are 3, but fixed takes none: it calls the denoiser 2 times"
    ):
        aquabit.measure(
            own(fixed), aquabit.Study(tmp_path / "o.db"), 0, protocol=PROTOCOL, space=SPACE, bank=bank
        )
    aquabit.measure(own(fixed), study, 0, protocol=usual, space=SPACE, bank=bank)
    assert study.protocol.steps == 2


def test_guidance_and_resolution_reach_the_function() -> None:
    def sized(
        net: nn.Module,
        seeds: list[int],
        conditions: list[int],
        guidance: float = 1.0,
        resolution: int | None = None,
    ) -> Tensor:
        x = simple(net, seeds, conditions, 2)
        return nn.functional.interpolate(torch.sigmoid(guidance * x), resolution or 8)

    model = own(sized)
    adapter, protocol = adapter_of(model), replace(PROTOCOL, steps=2)
    check_sampler(model, replace(protocol, guidance=3.0))
    assert adapter.images(replace(protocol, resolution=16), range(2)).shape == (2, 1, 16, 16)
    assert model.size(16) == (16, 16) and model.size() == (8, 8)
    plain, guided = (adapter.images(replace(protocol, guidance=g), range(2)) for g in (1.0, 3.0))
    assert not torch.equal(plain, guided)


class Points(nn.Module):
    """Denoises points [n, 2]: no images, no conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = silu(self.first(torch.cat([x, t.expand(len(x), 1)], 1)))
        return self.last(silu(self.second(h)))


def points(net: nn.Module, seeds: list[int], steps: int) -> Any:
    x = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in seeds])
    for i in range(steps):
        x = x - net(x, torch.tensor(float(steps - i))) / steps
    return 10 * x


def test_arrays_are_measured_by_a_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, with no pictures; what is for images is refused."""
    (tmp_path / "norms.py").write_text(
        "def shift(found, full, conditions):\n"
        "    assert found.shape[1:] == (2,) and conditions is None\n"
        "    return (found - full).norm(dim=1)\n"
        "shift.direction = 'min'\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = aquabit.Model(Points(), points, images=False)
    study, bank = aquabit.Study(tmp_path / "s.db"), str(tmp_path / "bank")
    protocol = replace(PROTOCOL, objective="norms:shift")
    quality = aquabit.QualityOptions(metrics=("norms:shift",))
    aquabit.measure(model, study, 2, protocol=protocol, space=SPACE, quality=quality, bank=bank)
    table = study.measurements()
    assert {"norms:shift", "mse", "psnr"} < set(table) and "ssim" not in table and not study.thumbnails()
    assert (table["norms:shift"][table.bits < 6] > 0).all()
    packed = aquabit.quantize(model, coded(model, "usq8", 16), bank=bank)
    assert aquabit.generate(packed.pipe, 3, steps=3).shape == (3, 2)
    with pytest.raises(AquabitError, match=r"shape \[2, 2\] for 2 seeds; expected \[n, c"):
        check_sampler(aquabit.Model(Points(), points), PROTOCOL)
    other = aquabit.QualityOptions(reference=str(tmp_path), features=("clip=.",))
    with pytest.raises(AquabitError, match="--reference is for images"):
        aquabit.measure(
            model, aquabit.Study(tmp_path / "o.db"), 0, protocol=PROTOCOL, quality=other, bank=bank
        )
    front = aquabit.find(study, bits=7, pipe=model, bank=bank)
    assert front.best_member.measured["norms:shift"].value >= 0
    assert aquabit.report(study, tmp_path / "report").exists()


CODE = f"""
import sys
sys.path.append({str(Path(__file__).parents[2])!r})
from tests.pipelines.test_own_model import own

def made(): return own()
def pipeline(): return 5
def broken(): raise KeyError("weights")
"""


BAD_CODE = {  # modules that the command line is told to run, and what is said of them
    "parser": (
        "import argparse\nargparse.ArgumentParser().parse_args(['--data'])",
        "SystemExit: 2.*__main__",
    ),
    "leaver": ("import sys\ndef made(): sys.exit('no data here')", "leaver:made' failed .*no data here"),
    "empty": (
        CODE + "import torch\n" + "def made():\n    with torch.device('meta'): return own()\n",
        "'level.weight' holds no numbers",
    ),
}


@pytest.mark.parametrize("module", BAD_CODE)
def test_code_that_ends_the_program_or_has_no_weights_is_said(module: str, tmp_path: Path) -> None:
    """It never ends in silence: the exit code of the user's own ``sys.exit`` is not ours."""
    code, said = BAD_CODE[module]
    (tmp_path / f"bad_{module}.py").write_text(code)
    words = [sys.executable, "-c", "from aquabit.cli.app import app; app()", "inspect", f"bad_{module}:made"]
    made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 2 and re.search(said, made.stderr.splitlines()[-1]), made.stderr


@pytest.mark.slow
def test_every_verb_takes_the_code_that_it_is_told(tmp_path: Path) -> None:
    """module:function on the command line, with workers; it is said that code runs, and no file makes it
    run."""
    (tmp_path / "mine.py").write_text(CODE)
    space = {"schemes": ["usq2", "usq3", "usq4", "usq8", "vq2", "vq4", "fp"], "activations": [8, 6]}
    (tmp_path / "space.json").write_text(json.dumps(space))
    measuring = ("--images", "4", "--steps", "3", "--micro-batch", "4", "--space", "space.json")
    assert "self_attn.qkv" in run(tmp_path, "inspect", "mine:made")
    assert "one of your own" in fails(tmp_path, "inspect", "mine:made", "--memory", code=True)
    for name, said in {"pipeline": "returned a int", "broken": "KeyError", "other": "no function"}.items():
        assert said in fails(tmp_path, "inspect", f"mine:{name}", code=True)
    assert "cannot be imported" in fails(tmp_path, "inspect", "nobodys:made", code=True)
    plan = json.loads(
        run(tmp_path, "measure", "mine:made", "--study", "S.db", *measuring, "--plan", "--json", "-")
    )
    assert plan["measurements"] > 20
    words = ("measure", "mine:made", "--study", "S.db", "--samples", "18", *measuring)
    assert "running your code: mine:made" in run(tmp_path, *words, "--workers", "2")
    alone = aquabit.Study(tmp_path / "alone.db")
    aquabit.measure(
        own(),
        alone,
        18,
        protocol=Protocol(images=4, steps=3, micro_batch=4),
        space=space,
        bank=str(tmp_path / "bank"),
    )
    found = [
        s.measurements().set_index("config").psnr.to_dict() for s in (alone, aquabit.Study(tmp_path / "S.db"))
    ]
    assert found[0] == found[1] and len(found[0]) > 20
    assert "mine:made" in run(tmp_path, "status", "S.db")
    run(tmp_path, "explain", "S.db")
    for verb in ("validate", "search"):
        assert "mine:made, which runs only where you name it" in fails(tmp_path, verb, "S.db")
    run(tmp_path, "validate", "S.db", "--flips", "2", "--workers", "1", "--model", "mine:made")
    out = ("--bits", "4", "--out", "config.json", "--model", "mine:made")
    run(tmp_path, "search", "S.db", "--workers", "1", "--rounds", "0", *out)
    run(tmp_path, "quantize", "mine:made", "config.json", "--out", "packed")
    assert "--model module:function" in fails(tmp_path, "generate", "packed", "--out", "grid.png")
    run(tmp_path, "generate", "packed", "--model", "mine:made", "--images", "2", "--out", "grid.png")
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    run(tmp_path, "report", "S.db", "--out", "report")


def test_a_model_in_memory_says_what_more_workers_need(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="give the model as 'module:function'"):
        aquabit.measure(own(), aquabit.Study(tmp_path / "s.db"), 0, protocol=PROTOCOL, space=SPACE, workers=2)


def test_a_class_that_bears_a_name_of_diffusers_and_a_config_of_its_own(tmp_path: Path) -> None:
    """Neither is taken for what diffusers has under these names."""

    class UNet2DModel(Net):
        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(width=8)

    torch.manual_seed(0)
    model = aquabit.Model(UNet2DModel(), heun, range(4))
    graph = aquabit.trace(model)
    assert graph.graph["family"] == "generic" and set(graph.graph["inputs"]) == {"x", "sigma", "label"}
    packed = aquabit.quantize(model, coded(model), bank=str(tmp_path / "bank"))
    packed.save(tmp_path / "packed")
    assert torch.equal(aquabit.load(tmp_path / "packed", into=model)([0], steps=3), packed([0], steps=3))


def test_fine_tuning_goes_by_the_calls_of_the_sampler(tmp_path: Path) -> None:
    model, bank = own(), str(tmp_path / "bank")
    calibration = aquabit.scheme.Calibration(images=32, steps=3)
    config = coded(model, "usq2", calibration=calibration)
    tuned = aquabit.quantize(model, config, bank=bank, finetune=aquabit.FineTuning(steps=4))
    assert tuned.config.tuned and tuned([0, 1], steps=3).shape == (2, 1, 8, 8)
    with pytest.raises(AquabitError, match="fine-tune without guidance"):
        aquabit.quantize(model, config, bank=bank, finetune=aquabit.FineTuning(steps=4, guidance=2.0))


EDITED = """
import torch
LEVEL = 1.0
def noise(seeds):
    return torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
def unused():
    return 0
def sample(net, seeds, conditions, steps):
    x = noise(seeds)
    return torch.sigmoid(x - LEVEL * net(x, torch.ones(len(seeds)), torch.tensor(conditions)))
"""


def test_an_edited_sampler_never_continues_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one with other helpers, constants or conditions: images of two functions do not mix."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(name: str, text: str, **given: Any) -> aquabit.Model:
        (tmp_path / f"{name}.py").write_text(text)
        return own(importlib.import_module(name).sample, **{"layers": None, **given})

    def measured(model: aquabit.Model) -> aquabit.Study:
        study = aquabit.Study(tmp_path / "s.db")
        aquabit.measure(model, study, 0, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
        return study

    study = measured(made("edited_0", EDITED))
    assert study.protocol.scheduler.startswith("sample@") and study.protocol.conditions == (0, 1, 2, 3)
    measured(made("edited_1", EDITED.replace("return 0", "return 1")))  # what it does not use
    for i, (old, new) in enumerate(
        {"LEVEL = 1.0": "LEVEL = 2.0", "randn": "rand", "sigmoid(x": "sigmoid(0.5 * x"}.items()
    ):
        with pytest.raises(AquabitError, match=r"another protocol \(scheduler sample@"):
            measured(made(f"edited_{i + 2}", EDITED.replace(old, new)))
        with pytest.raises(AquabitError, match="its code was changed"):
            aquabit.validate(study, 1, pipe=made(f"edited_{i + 5}", EDITED.replace(old, new)))
    with pytest.raises(AquabitError, match=r"another protocol \(conditions"):
        measured(made("edited_9", EDITED, conditions=[3]))
