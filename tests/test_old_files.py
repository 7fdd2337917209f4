"""A study, an artifact and fits in a bank that version 0.1 wrote still open, and say what they said then.

tests/data/old is the work of `aquabit run model --out whole --samples 24 --flips 6 --bits 5 --images 6
--steps 2` on a DiT of one block with random weights (most thumbnails are left out), of `explain` and `status`
with `--json`, and of `generate packed --images 4 --steps 2 --seed 3`. `explained.json` alone is of a later
surrogate (a line in the summed damages with trees on top): what it says of the same measurements.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from typer.testing import CliRunner

from aquabit.cli.app import app
from aquabit.scheme import QuantConfig
from aquabit.study import Study

OLD = Path(__file__).parent / "data" / "old"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old files; the commands run in it."""
    out = tmp_path_factory.mktemp("old") / "old"
    shutil.copytree(OLD, out)
    (out / "study.db").write_bytes(gzip.decompress((out / "study.db.gz").read_bytes()))
    return out


def said(folder: Path, *words: str) -> Any:
    """What a command prints as JSON, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AQUABIT_BANK", str(folder / "bank"))
        result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.output) if "--json" in words else None


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def near(found: Any, old: Any) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(old, dict):
        return set(found) >= set(old) and all(near(found[k], v) for k, v in old.items())
    if isinstance(old, list):
        return len(found) == len(old) and all(map(near, found, old))
    return bool(found == pytest.approx(old, rel=1e-5, abs=1e-7) if isinstance(old, float) else found == old)


def test_the_status_is_what_it_was(folder: Path) -> None:
    found, old = (
        said(folder, "status", "study.db", "--json", "-"),
        json.loads((OLD / "status.json").read_text()),
    )
    waiting = {"idle", "rate"}  # these count the time until now
    assert {k: v for k, v in found.items() if k not in waiting} == {
        k: v for k, v in old.items() if k not in waiting
    }


def test_what_the_study_holds_is_read(folder: Path) -> None:
    study = Study(folder / "study.db", create=False)
    table, configs = study.measurements(failed=True), study.configs()
    assert len(table) == 177 and set(table.config) <= set(configs)
    assert all(key == config.digest for key, config in configs.items()), "digests are keys"
    assert {study.protocol.digest} < set(table.protocol) <= set(study.protocols())
    assert all(key == protocol.digest for key, protocol in study.protocols().items())
    chosen = QuantConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert configs[chosen.digest] == chosen and study.get("front")["winner"] == chosen.digest
    assert len(study.swaps("fid")) == 6 and len(study.features()) == 84


def test_explain_says_the_same_numbers(folder: Path) -> None:
    found = said(folder, "explain", "study.db", "--json", "-")
    old = json.loads((OLD / "explained.json").read_text())
    for key in ("objective", "direction", "protocol", "measurements", "bits", "swap", "ranking"):
        assert found[key] == old[key], key
    for key in ("within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "useful", "baselines"):
        assert near(found["surrogate"][key], old["surrogate"][key]), key
    for part in ("layers", "operators", "blocks"):
        for row, was in zip(found[part], old[part], strict=True):
            for key, value in was.items():
                if key not in ("low", "high", "psnr_low", "psnr_high"):  # the level of intervals is not kept
                    assert near(row[key], value), (row["name"], key, row[key], value)
    assert found["validation"]["sign_agreement"] == old["validation"]["sign_agreement"]
    assert found["validation"]["srcc"] == pytest.approx(old["validation"]["srcc"])


def test_the_artifact_makes_the_same_images(folder: Path) -> None:
    said(
        folder, *("generate", "packed", "--images", "4", "--steps", "2", "--seed", "3", "--out", "again.png")
    )
    again, old = (np.asarray(Image.open(p)).astype(int) for p in (folder / "again.png", OLD / "images.png"))
    assert again.shape == old.shape and np.ptp(old) > 100
    # grey values: the kernels that are fastest here may round otherwise than those of then (.027 at most)
    assert np.abs(again - old).max() <= 7


def test_fits_are_found_in_the_bank_and_give_the_same_artifact(folder: Path) -> None:
    before = files(folder / "bank")
    said(folder, "quantize", "model", "config.json", "--out", "packed-again")
    new = files(folder / "bank").keys() - before.keys()
    # data-free fits have gain 1 now, and calibrated ones a search of their own: both are made again
    assert {n.split("-")[1].removesuffix(".safetensors") for n in new} == {"vq3", "usq4h"}
    assert before.items() <= files(folder / "bank").items()
    again, old = files(folder / "packed-again"), files(OLD / "packed")
    weights = "denoiser/diffusion_pytorch_model.safetensors"
    assert set(again) == set(old)
    (changed, table) = (load(again.pop(weights)), load(old.pop(weights)))
    different = {n.rsplit(".", 1)[1] for n in table if not torch.equal(changed[n], table[n])}
    assert changed.keys() == table.keys() and different <= {"codes", "codebooks", "scale", "offset"}
    assert all(changed[n].shape == table[n].shape for n in table)
    config = json.loads(again["denoiser/config.json"])
    assert len(config["quantization_config"].pop("digest")) == 16
    assert config == json.loads(old["denoiser/config.json"])
