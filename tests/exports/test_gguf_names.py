"""Published names: what diffusers' own loader makes of them is the model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch

from aquabit.exports.gguf import plan_of, write
from aquabit.exports.gguf_names import ARCHITECTURES, reference_names
from tests.exports import networks
from tests.exports.networks import NETWORKS, loaded, made
from tests.exports.test_gguf import exported


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_takes_the_names_apart(name: str, tmp_path: Path) -> None:
    network = made(name)
    state = network.state_dict()
    found = reference_names(type(network).__name__, list(state))
    assert found is not None
    architecture, places = found
    assert architecture == NETWORKS[name][0]
    assert sorted(p for place in places for p in place.parts) == sorted(state)
    file = {}
    for place in places:
        rows = (
            torch.cat([state[part] for part in place.parts])
            if len(place.parts) > 1
            else state[place.parts[0]]
        )
        file[place.name] = torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows.clone()
    again = loaded(network, file, tmp_path).state_dict()
    assert set(again) == set(state)
    assert [k for k, v in state.items() if not torch.equal(again[k], v)] == []


def test_every_class_is_tried() -> None:
    assert {type(make()).__name__ for _, make in NETWORKS.values()} == set(ARCHITECTURES)


def own_names() -> dict[str, Any]:
    """Networks of classes that diffusers loads from a file, and that have no published names here."""
    lcm = networks.unet(time_cond_proj_dim=8)  # a tensor that the original models did not have
    sana = d.SanaTransformer2DModel(
        **networks.HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
    )
    mochi = d.MochiTransformer3DModel(
        **networks.HEADS, num_layers=2, pooled_projection_dim=32, in_channels=4, text_embed_dim=32
    )
    return {"lcm": lcm, "sana": sana, "mochi": mochi}


@pytest.mark.parametrize("name", ["lcm", "sana", "mochi"])
def test_without_published_names_diffusers_takes_its_own(name: str, tmp_path: Path) -> None:
    network = own_names()[name].eval()
    one = exported(network)
    assert one.weights
    plan = plan_of(network)
    assert plan.architecture == "aquabit" and plan.is_loaded
    said = write(one, tmp_path / "net.gguf")
    assert said[1] == (
        f"architecture aquabit: no other names of {type(network).__name__} are known, so its own are written:"
        " diffusers reads them, ComfyUI-GGUF does not"
    )
    how = d.GGUFQuantizationConfig(compute_dtype=torch.float32)
    again = loaded(network, str(tmp_path / "net.gguf"), tmp_path, quantization_config=how)
    state = again.state_dict()
    assert set(state) == set(network.state_dict())
    coded = {f"{n}.weight" for n in one.weights}
    assert {n for n, t in state.items() if hasattr(t, "quant_type")} == coded
