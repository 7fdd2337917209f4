"""Published names: what diffusers' own loader makes of them is the model again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aquabit.exports.gguf_names import reference_names
from tests.exports.networks import NETWORKS, loaded, made


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
