"""The example of a model that somebody else trained: its network is the file's, and it can be packed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import aquabit
from aquabit.graph import layers
from aquabit.quant.model import fingerprint
from aquabit.space import make_space

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "terrain"
INSTALLED = importlib.util.find_spec("terrain_diffusion") and importlib.util.find_spec("onnx")
needs_model = pytest.mark.skipif(
    not INSTALLED,
    reason="pip install --no-deps adaptive-terrain-diffusion==0.4.2; pip install onnx onnxruntime",
)


@pytest.fixture
def terrain(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import terrain

    return terrain


@needs_model
def test_the_network_is_that_of_the_file(terrain: Any) -> None:
    """At three noise levels, and at two difficulties, onnxruntime gives the same fields."""
    pytest.importorskip("onnxruntime")
    assert terrain.furthest(terrain.trained()) < 1e-4


@needs_model
def test_it_is_quantized_packed_and_loaded(terrain: Any, tmp_path: Path) -> None:
    """All 255 layers are known by name; 8 bits change its fields little, and come back from a folder."""
    model = terrain.terrain_model()
    graph = aquabit.trace(model)
    operators = {a["operator"] for a in layers(graph).values()}
    assert len(layers(graph)) == 255 and "other" not in operators and graph.graph["weights"] > 10_000_000
    space = make_space(graph, fingerprint(model.denoiser), schemes=["fp", "usq8"], activations=[16])
    packed = aquabit.quantize(model, space.uniform("usq8", 16), bank=str(tmp_path / "bank"))
    full, coded = model([0, 1], steps=1), packed([0, 1], steps=1)
    assert full.shape == (2, 1, 128, 128) and 0 <= full.min() < full.max() <= 1
    psnr = -10 * (coded - full).square().mean().log10()
    assert 35 < psnr < 80
    packed.save(tmp_path / "packed")
    again = aquabit.load(tmp_path / "packed", into=terrain.terrain_model())
    assert torch.equal(again([0, 1], steps=1), coded)


@needs_model
def test_other_steps_are_refused(terrain: Any) -> None:
    with pytest.raises(aquabit.AquabitError, match="steps are 2; the model was distilled to 1"):
        terrain.terrain_model()([0], steps=2)


def test_a_package_that_is_missing_or_another(
    terrain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(aquabit.AquabitError, match="not installed: pip install --no-deps adaptive-terrain"):
        terrain.onnx_file()
    spec = importlib.machinery.ModuleSpec("terrain_diffusion", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(aquabit.AquabitError, match=r"is missing; install version 0\.4\.2"):
        terrain.onnx_file()
    file = tmp_path / terrain.FILE
    file.parent.mkdir()
    file.write_bytes(b"another")
    with pytest.raises(aquabit.AquabitError, match=r"has SHA-256 .*; the file of version 0\.4\.2 has 95be54"):
        terrain.onnx_file()
