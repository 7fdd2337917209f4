"""Every family on a tiny pipeline of its real class: the whole flow, what prompts become, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from torch import Tensor

import aquabit
from aquabit.pipelines import Adapter, load, trace
from aquabit.scheme import Protocol
from aquabit.study import Study
from tests.tiny_pipelines import PROMPTED, PROMPTS, TINY_PIPELINES, UNGUIDED, tiny

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()


def protocol_for(name: str, **more: Any) -> Protocol:
    given: dict[str, Any] = {
        "images": 4, "steps": 2, "micro_batch": 4, "objective": "psnr", "guidance": 1.0 if name in UNGUIDED else 3.0,
        "conditions": PROMPTS if name in PROMPTED else None, "resolution": 16 if name in ("flux", "generic") else None,
    }  # fmt: skip
    return Protocol(**{**given, **more})


def images(pipe: Any, protocol: Protocol) -> Tensor:
    adapter = Adapter(pipe)
    return torch.cat([adapter.images(protocol, b) for b in adapter.batches(protocol)])


SAMPLES = 24  # some are uniform, and measured as such; a surrogate wants 20 in all
SPACE = {"schemes": ["usq4", "usq2"], "activations": [8]}


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_the_whole_flow(name: str, tmp_path: Path) -> None:
    """inspect, measure, explain, find, quantize, generate, reload: from a folder, as users have it."""
    folder, bank, protocol = str(tmp_path / "model"), str(tmp_path / "bank"), protocol_for(name)
    tiny(name).save_pretrained(folder)
    graph = trace(load(folder))
    study = Study(tmp_path / "S.db")
    aquabit.measure(folder, study, SAMPLES, protocol=protocol, space=SPACE, bank=bank, sample_seed=1)
    table = study.measurements(study.protocol)
    assert (table.kind == "sample").sum() > SAMPLES // 2 and table.psnr.notna().all()
    assert len(set(table.psnr.round(6))) > 3  # configurations differ
    result = aquabit.explain(study, bits=4.2)
    assert {layer["name"] for layer in result.to_dict()["layers"]} <= {n for n, a in graph.nodes(data=True) if a["kind"] != "merge"}
    front = aquabit.find(study, bits=4.2, rounds=1, per_round=1, screen=1, bank=bank)
    packed = aquabit.quantize(folder, front.best, bank=bank)
    packed.save(tmp_path / "packed")
    again = load(tmp_path / "packed")
    made = images(again, protocol)
    assert made.shape == images(packed.pipe, protocol).shape and torch.allclose(made, images(packed.pipe, protocol), atol=1e-4)
    generated = aquabit.generate(str(tmp_path / "packed"), 2, steps=2, conditions=protocol.conditions)
    assert torch.isfinite(generated).all() and generated.shape[0] == 2
