"""Every metric of real pipelines, on tiny random networks of the real classes; references from folders;
what a user sees when files are wrong."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import linalg
from torch import nn

from aquabit.quality import Features, Quality, QualityOptions, Reference, Source, UserMetric
from aquabit.quality import distances as dist
from aquabit.quality import feature_statistics as collected_module
from aquabit.quality.feature_statistics import FeatureStatistics, Reservoir
from aquabit.quality.features import METRICS_OF, rgb
from aquabit.quality.folder import ImageFolder
from aquabit.quality.lpips import Lpips
from aquabit.quality.meter import QualityMeter, check_available, default_objective
from aquabit.quality.moments import Moments
from aquabit.quality.pretrained import (
    ClipFeatures,
    Dinov2Features,
    InceptionFeatures,
    folder_digest,
    tf_resize,
)
from aquabit.quality.real_images import ClassifierFeatures, real_images
from aquabit.scheme import LOWER_IS_BETTER, AquabitError, Protocol
from tests.conftest import tiny_pipeline
from tests.quality import whole_sets

PROMPTS = ["a cat", "the dog", "a dog", "the cat"]


def pictures(n: int, seed: int = 0, side: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


# Networks of the real classes


class Tower(nn.Module):
    """Like a block of Inception: branches side by side, the first is called conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tower = nn.Conv2d(8, 9, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x).relu(), self.tower(x).relu()], 1)


class TinyInception(nn.Module):
    """The call signature, the resizing and the names of inception-2015-12-05.pt; 12 features, 5 classes."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers, self.output = layers, nn.Linear(12, 5)

    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> torch.Tensor:
        n, _, height, width = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = nn.functional.affine_grid(
            theta.unsqueeze(0).repeat(n, 1, 1), [n, 3, 299, 299], align_corners=False
        )
        x = nn.functional.grid_sample(img, grid, mode="bilinear", padding_mode="border", align_corners=False)
        x = (x - 128) / 128
        features = self.layers(x).reshape(n, 12)
        if return_features:
            return features
        logits = (
            nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        )
        return logits.softmax(1)


def inception_layers() -> nn.Sequential:
    parts = {
        "conv": nn.Conv2d(3, 8, 16, stride=16),
        "mixed_6": Tower(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
    }
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    return net


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """--features for each extractor, networks with random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    torch.jit.script(TinyInception(inception_layers())).save(str(folder / "inception.pt"))
    hashed = hashlib.sha256((folder / "inception.pt").read_bytes()).hexdigest()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["a", "the", "cat", "dog", *"acdeghot"]
    vocab = {
        w: i
        for i, w in enumerate(
            dict.fromkeys([*(f"{w}</w>" for w in words), *words, "<|startoftext|>", "<|endoftext|>"])
        )
    }
    merges = ["#version: 0.2", "c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]
    vocab |= {w: len(vocab) + i for i, w in enumerate(["ca", "do", "th"])}
    (folder / "clip").mkdir()
    (folder / "clip/vocab.json").write_text(json.dumps(vocab))
    (folder / "clip/merges.txt").write_text("\n".join(merges))
    CLIPTokenizer.from_pretrained(str(folder / "clip")).save_pretrained(folder / "clip")
    ends = {
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
        "pad_token_id": vocab["<|endoftext|>"],
    }
    config = CLIPConfig(
        text_config={
            **small,
            **ends,
            "vocab_size": len(vocab),
            "max_position_embeddings": 8,
            "projection_dim": 12,
        },
        vision_config={**small, "image_size": 16, "patch_size": 8, "projection_dim": 12},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    Dinov2Model(
        Dinov2Config(
            **{**small, "intermediate_size": None} | {"intermediate_size": 16}, image_size=28, patch_size=14
        )
    ).save_pretrained(folder / "dinov2")
    save_file(alex(), folder / "lpips.safetensors")
    return {
        "inception": f"inception={folder}/inception.pt@{hashed}",
        "clip": f"clip={folder}/clip",
        "dinov2": f"dinov2={folder}/dinov2",
        "lpips": f"lpips={folder}/lpips.safetensors",
    }


def alex(widths: tuple[int, ...] = (4, 6, 5, 5, 3)) -> dict[str, torch.Tensor]:
    """A state of lpips.LPIPS(net="alex"), with fewer channels."""
    generator, shapes = torch.Generator().manual_seed(1), [(11, 0), (5, 3), (3, 6), (3, 8), (3, 10)]
    state, before = {}, 3
    for i, ((kernel, index), width) in enumerate(zip(shapes, widths, strict=True)):
        state[f"net.slice{i + 1}.{index}.weight"] = 0.2 * torch.randn(
            width, before, kernel, kernel, generator=generator
        )
        state[f"net.slice{i + 1}.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
        before = width
    return state


def path_of(text: str) -> Path:
    return Path(text.partition("=")[2].partition("@")[0])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of several sizes and kinds, in subfolders."""
    folder = tmp_path_factory.mktemp("real")
    for i in range(12):
        (folder / f"class{i % 3}").mkdir(exist_ok=True)
        array = (pictures(1, 50 + i)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(array).resize((40, 32) if i % 2 else (32, 32)).save(
            folder / f"class{i % 3}" / f"{i}.{'png' if i % 4 else 'jpg'}"
        )
    return folder


# Extractors


def test_inception_gives_what_the_file_gives_and_its_layers(files) -> None:
    path = path_of(files["inception"])
    extractor, net = InceptionFeatures(path.read_bytes(), str(path)), torch.jit.load(str(path))
    images = pictures(5, side=20)
    found, x = extractor(images), (images * 255).round()
    with torch.no_grad():
        assert np.allclose(found.pooled, net(x, return_features=True).numpy(), rtol=1e-5, atol=1e-5)
        probabilities = np.exp(found.logits - np.logaddexp.reduce(found.logits, axis=1, keepdims=True))
        assert np.allclose(probabilities, net(x, no_output_bias=True).numpy(), rtol=1e-4)
        grid = net.layers.conv(tf_resize(x))
        assert np.allclose(
            found.spatial,
            net.layers.mixed_6.conv(grid).relu()[:, :7].flatten(1).numpy(),
            rtol=1e-4,
            atol=1e-5,
        )
    assert found.spatial.shape == (5, 7 * 18 * 18) and extractor.metrics == METRICS_OF["inception"]
    assert np.allclose(
        extractor(images[:, :1]).pooled,
        extractor(images[:, :1].expand(-1, 3, -1, -1)).pooled,
        rtol=1e-5,
        atol=1e-5,
    )
    with pytest.raises(AquabitError, match="images have 4 channels"):
        extractor(pictures(2, channels=4))


def test_a_file_without_the_names_or_the_resizing_gives_no_spatial_features(tmp_path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = inception_layers()

        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return self.layers(nn.functional.interpolate(img, (299, 299), mode="bilinear")).reshape(
                img.shape[0], 12
            )

    torch.manual_seed(0)
    torch.jit.script(Plain()).save(str(tmp_path / "plain.pt"))
    extractor = InceptionFeatures((tmp_path / "plain.pt").read_bytes(), "plain.pt")
    assert set(extractor.metrics) == {"fid", "kid", "precision", "recall"}
    torch.jit.script(nn.Conv2d(3, 3, 1)).save(str(tmp_path / "other.pt"))
    with pytest.raises(AquabitError, match="does not take images and return_features"):
        InceptionFeatures((tmp_path / "other.pt").read_bytes(), "other.pt")
    with pytest.raises(AquabitError, match=r"x\.pt is no TorchScript file"):
        InceptionFeatures(b"nothing", "x.pt")


def test_clip_features_and_scores_are_those_of_transformers(files) -> None:
    from transformers import AutoTokenizer, CLIPModel

    folder = path_of(files["clip"])
    extractor, net, images = (
        ClipFeatures(folder, folder_digest(folder)),
        CLIPModel.from_pretrained(folder),
        pictures(4, side=16),
    )
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == 4, "words are single tokens"
    with torch.no_grad():
        out = net(pixel_values=((images * 255).round() / 255 - mean) / std, **tokens)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0)
    found = extractor(images)
    assert np.allclose(found.pooled, out.image_embeds.numpy(), atol=1e-5)
    assert extractor.scores(found.pooled, PROMPTS) == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-3)
    texts, flipped = out.text_embeds.numpy(), extractor.scores(-found.pooled, PROMPTS)
    assert (
        flipped
        == pytest.approx(
            np.clip(-100 * (out.image_embeds.numpy() * texts).sum(1), 0, None), rel=1e-4, abs=1e-3
        )
        and flipped.max() > 1
    )
    assert len(extractor.scores(found.pooled[:1], ["a cat " * 50])) == 1, "what is too long is cut off"


def test_dinov2_features_are_the_class_token(files) -> None:
    from transformers import Dinov2Model

    folder = path_of(files["dinov2"])
    images, net = pictures(3, side=224), Dinov2Model.from_pretrained(folder)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = net(((images * 255).round() / 255 - mean) / std).pooler_output
    assert np.allclose(Dinov2Features(folder, "d")(images).pooled, expected.numpy(), atol=1e-4)


def test_lpips_equals_a_plain_network(files, tmp_path) -> None:
    state, x, y = alex(), pictures(3, 1, 48), pictures(3, 2, 48)
    convolutions = [
        nn.Conv2d(*state[f"net.slice{i + 1}.{j}.weight"].shape[1::-1], k, s, p)
        for i, (j, k, s, p) in enumerate(
            [(0, 11, 4, 2), (3, 5, 1, 2), (6, 3, 1, 1), (8, 3, 1, 1), (10, 3, 1, 1)]
        )
    ]
    for i, (conv, j) in enumerate(zip(convolutions, (0, 3, 6, 8, 10), strict=True)):
        conv.load_state_dict({k: state[f"net.slice{i + 1}.{j}.{k}"] for k in ("weight", "bias")})

    def activations(v: torch.Tensor) -> list[torch.Tensor]:
        v = (2 * v - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        found = []
        for i, conv in enumerate(convolutions):
            v = conv(nn.functional.max_pool2d(v, 3, 2) if i in (1, 2) else v).relu()
            found.append(v / v.norm(dim=1, keepdim=True).clamp(min=1e-10))
        return found

    with torch.no_grad():
        expected = sum(
            ((a - b) ** 2 * state[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
            for i, (a, b) in enumerate(zip(activations(x), activations(y), strict=True))
        )
    metric = Lpips(path_of(files["lpips"]))
    assert metric.distances(x, y) == pytest.approx(expected.numpy(), rel=1e-5) and metric.distances(
        x, x
    ) == pytest.approx(0)
    with pytest.raises(AquabitError, match="images are 8 x 8 pixels; this LPIPS needs at least 32 x 32"):
        metric.distances(x[..., :8, :8], y[..., :8, :8])
    save_file({k: v for k, v in state.items() if k != "lin3.model.1.weight"}, tmp_path / "cut.safetensors")
    with pytest.raises(AquabitError, match=r"lacks 1 tensors of LPIPS, the first is lin3\.model\.1\.weight"):
        Lpips(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(AquabitError, match="is no LPIPS"):
        Lpips(tmp_path / "other.safetensors")


def test_lpips_of_vgg_has_five_slices_and_sees_differences(tmp_path) -> None:
    state, before, generator = {}, 3, torch.Generator().manual_seed(0)
    for i, row in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        for j in row:
            state |= {
                f"net.slice{i + 1}.{j}.weight": torch.randn(4, before, 3, 3, generator=generator),
                f"net.slice{i + 1}.{j}.bias": torch.zeros(4),
            }
            before = 4
        state[f"lin{i}.model.1.weight"] = torch.ones(1, 4, 1, 1)
    save_file(state, tmp_path / "vgg.safetensors")
    metric, x = Lpips(tmp_path / "vgg.safetensors"), pictures(2)
    near, far = metric.distances(x, (x + 0.02).clamp(0, 1)), metric.distances(x, pictures(2, 9))
    assert (near > 0).all() and (near < far).all()


# Distances and streams


def test_cmmd_equals_its_double_sum_and_published_form(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        v / np.linalg.norm(v, axis=1, keepdims=True)
        for v in (rng.normal(size=(13, 6)), rng.normal(size=(9, 6)) + 0.5)
    )
    mean = lambda x, y: np.mean([[math.exp(-(((p - q) ** 2).sum()) / 200) for q in y] for p in x])  # noqa: E731
    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert whole_sets.cmmd(a, b) == pytest.approx(expected, rel=1e-6) and expected > 0.1
    monkeypatch.setattr(dist, "_BLOCK", 4)
    assert whole_sets.cmmd(a, b) == pytest.approx(expected, rel=1e-6)
    assert whole_sets.cmmd(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [3, 9, 10, 11, 40])
def test_few_rows_are_kept_as_they_are_and_give_the_same_distance(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(30, 10)), rng.normal(size=(n, 10)) + 0.3
    moments = Moments()
    for part in np.array_split(b, 3):
        moments.update(part)
    assert np.allclose(moments.factor.T @ moments.factor, np.cov(b, rowvar=False), atol=1e-12) and len(
        moments.factor
    ) == min(n, 10)
    value = dist.frechet_from_factors(
        a.mean(0), dist.covariance_root(np.cov(a, rowvar=False)), moments.mean, moments.factor
    )
    roots = linalg.sqrtm(
        np.cov(a, rowvar=False) @ np.cov(b, rowvar=False) + (0 if n > 10 else 1e-14) * np.eye(10)
    ).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * roots
    )
    assert value == pytest.approx(expected, rel=1e-6)


def test_kept_rows_are_a_sample_that_does_not_depend_on_batches() -> None:
    rows = np.arange(1000.0)[:, None]
    whole, parts = Reservoir(100), Reservoir(100)
    whole.update(rows)
    for part in np.split(rows, [3, 7, 150, 151, 600]):
        parts.update(part)
        assert sum(map(len, parts._rows)) < 200
    assert np.array_equal(whole.rows, parts.rows) and whole.rows.shape == (100, 1) and parts.seen == 1000
    assert (
        len(set(whole.rows[:, 0])) == 100
        and abs(whole.rows.mean() - 500) < 100
        and (np.diff(whole.rows[:, 0]) > 0).all()
    )
    few = Reservoir(100)
    few.update(rows[:100])
    assert np.array_equal(few.rows, rows[:100]), "up to the limit all of them stay, in order"


def state_size(value: object) -> int:
    """Bytes of arrays below an object."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, list | tuple | dict):
        return sum(map(state_size, value.values() if isinstance(value, dict) else value))
    return state_size(vars(value)) if type(value).__module__.startswith("aquabit") else 0


def test_what_is_kept_of_a_stream_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 500 images as large as after 100, of every metric; KID, CMMD, precision and recall beyond
    their limit."""
    monkeypatch.setattr(collected_module.Reservoir.__init__, "__defaults__", (40,))
    kinds = {k for row in METRICS_OF.values() for k in row.values()}
    rng, sizes = np.random.default_rng(0), {}
    for moving in (kinds - {"kernel", "gaussian", "precision", "recall"}, kinds):
        collected = FeatureStatistics(moving)
        for step in range(1, 51):
            collected.update(
                Features(*(rng.normal(size=(10, d)).astype(np.float32) for d in (6, 8, 5))), np.arange(10) % 5
            )
            sizes[len(moving), step] = state_size(vars(collected))
    assert sizes[len(kinds) - 4, 1] == sizes[len(kinds) - 4, 50] < 3000
    assert max(sizes.values()) < sizes[len(kinds) - 4, 1] + 80 * (6 * 4 + 8)


def test_every_metric_of_every_extractor_in_chunks_and_at_once(files, real, tmp_path) -> None:
    """Over real files: a stream of chunks, one chunk, and independent computations from the features
    themselves."""
    gauge = QualityMeter(
        QualityOptions(str(real), tuple(files.values()), (f"{__name__}:brightness",)), None, tmp_path
    )
    x, y = pictures(9, 1), pictures(9, 2)
    prompts = [PROMPTS[i % 4] for i in range(9)]
    whole, parts = gauge.quality((32, 32)), gauge.quality((32, 32))
    whole.update(x, y, prompts)
    for i in (0, 4, 5):
        end = {0: 4, 4: 5, 5: 9}[i]
        parts.update(x[i:end], y[i:end], prompts[i:end])
    found = whole.compute()
    assert parts.compute() == pytest.approx(found, rel=1e-5, abs=1e-6)
    other = {"accuracy", "feature_distance", "temporal_psnr", *METRICS_OF["effnet"]}  # test_effnet.py
    names = [m for m in LOWER_IS_BETTER if m not in other]
    assert list(found) == [*names, f"{__name__}:brightness"] and all(map(math.isfinite, found.values()))
    assert set(found) == set(gauge.available(prompts=True))
    loaded = torch.cat([b.float() / 255 for b in ImageFolder(real).batches((32, 32), 3)])
    inception, dinov2, clip = (gauge.extractor(k) for k in ("inception", "dinov2", "clip"))
    expected = {
        "fid": whole_sets.fid(inception(loaded).pooled, inception(x).pooled),
        "sfid": whole_sets.sfid(inception(loaded).spatial, inception(x).spatial),
        "fd_dinov2": whole_sets.fid(dinov2(loaded).pooled, dinov2(x).pooled),
        "kd_dinov2": whole_sets.kid(dinov2(loaded).pooled, dinov2(x).pooled),
        "cmmd": whole_sets.cmmd(clip(loaded).pooled, clip(x).pooled),
        "kid": whole_sets.kid(inception(loaded).pooled, inception(x).pooled),
        f"{__name__}:brightness": (
            float((x.mean() - y.mean()).abs()) * 0 + float((x - y).mean((1, 2, 3)).mean())
        ),
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)


def brightness(images: torch.Tensor, full: torch.Tensor, conditions: list[str] | None) -> torch.Tensor:
    assert conditions is None or len(conditions) == len(images)
    return (images - full).mean((1, 2, 3))


brightness.direction = "min"  # type: ignore[attr-defined]


# References


class Means:
    """An extractor of three numbers that counts its calls."""

    digest, metrics, calls = "means", METRICS_OF["classifier"], 0

    def __call__(self, images: torch.Tensor) -> Features:
        type(self).calls += 1
        x = images.mean((2, 3)).expand(-1, 3).numpy()
        return Features(x, x, x)


def test_reference_statistics_are_computed_once_and_follow_the_folder(real, tmp_path) -> None:
    own, options = Source(Means(), None), QualityOptions(str(real))
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(6):
        Image.fromarray((pictures(1, i, 24, 1)[0, 0].numpy() * 255).astype(np.uint8)).save(
            folder / f"{i}.png"
        )
    options = QualityOptions(str(folder))
    first = QualityMeter(options, own, tmp_path)
    digest = first.reference_digest((16, 16))
    calls = Means.calls
    again = QualityMeter(options, own, tmp_path)
    assert again.reference_digest((16, 16)) == digest and Means.calls == calls, (
        "the second time nothing is computed"
    )
    one, two = (g.sources((16, 16))[0].reference for g in (first, again))
    assert one is not None and two is not None and one.size == (16, 16) and one.count == 6
    assert all(
        np.array_equal(getattr(one, k), getattr(two, k))
        for k in ("pooled", "pooled_mean", "pooled_factor", "pooled_radii")
    )
    assert one.kernel_sum == two.kernel_sum
    assert QualityMeter(options, own, tmp_path).reference_digest((8, 8)) != digest, (
        "another size is another set of images"
    )
    copied = tmp_path / "copy"
    copied.mkdir()
    for p in folder.iterdir():
        (copied / p.name).write_bytes(p.read_bytes())
    assert QualityMeter(QualityOptions(str(copied)), own, tmp_path).reference_digest((16, 16)) == digest, (
        "the images count, not where and when"
    )
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(folder / "3.png")
    assert QualityMeter(options, own, tmp_path).reference_digest((16, 16)) != digest and Means.calls > calls
    damaged = next(tmp_path.glob("reference-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert Reference.load(damaged) is None


@pytest.mark.parametrize(("name", "channels"), [("digits", 1), ("emoji", 3)])
def test_a_model_sees_pictures_in_the_channels_of_its_own(tmp_path, name: str, channels: int) -> None:
    own = real_images(name).source()
    assert isinstance(own.extractor, ClassifierFeatures)
    side = own.extractor.shape[-1]
    for i in range(5):
        array = (pictures(1, i, 40)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    found = QualityMeter(QualityOptions(str(tmp_path)), own, tmp_path).sources((side, side))[0].reference
    batch = next(ImageFolder(tmp_path).batches((side, side), channels))
    assert found is not None and np.array_equal(found.pooled, own.extractor(batch.float() / 255).pooled)


def test_pictures_are_cropped_at_the_centre_and_resized(tmp_path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # what a centre crop leaves
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (next(ImageFolder(tmp_path).batches((8, 8), 3)) == 200).all()
    assert (next(ImageFolder(tmp_path).batches((4, 4), 1)) == 200).all()
    assert next(ImageFolder(tmp_path).batches((4, 4), 1)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("bad", [1, 3])
def test_unreadable_images_are_named_and_fatal_only_when_many(tmp_path, bad: int) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(25):
        Image.fromarray((pictures(1, i, 8, 1)[0, 0].numpy() * 255).astype(np.uint8)).save(
            folder / f"{i:02}.png"
        )
    for i, damage in zip((3, 7, 9)[:bad], (b"", None, b"\x89PNG\r\n\x1a\n" + b"x" * 40), strict=False):
        path = folder / f"{i:02}.png"
        path.write_bytes(path.read_bytes()[:60] if damage is None else damage)
    (folder / "notes.txt").write_text("no image")
    gauge = QualityMeter(QualityOptions(str(folder)), Source(Means(), None), tmp_path)
    if bad == 3:
        with pytest.raises(
            AquabitError,
            match=(
                r"3 of 25 images of the reference .* are unreadable \(03\.png, 07\.png, 09\.png\), more"
                r" than 5 %"
            ),
        ):
            gauge.sources((8, 8))
        return
    for opened in (
        gauge,
        QualityMeter(QualityOptions(str(folder)), Source(Means(), None), tmp_path),
    ):  # said again where it is read from the cache
        reference = opened.sources((8, 8))[0].reference
        assert reference is not None and reference.count == 24
        assert (
            len(opened.notes) == 1 and "1 of 25 images" in opened.notes[0] and "(03.png)" in opened.notes[0]
        )


def test_wrong_options_say_what_is_wrong(files, real, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("AQUABIT_INCEPTION", raising=False)
    (tmp_path / "empty").mkdir()
    inception = files["inception"].partition("@")[0]
    cases = {
        "has SHA-256 .*, that of inception-2015-12-05.pt; it holds code": {"features": (inception,)},
        "has SHA-256 .*, the one that was stated": {"features": (f"{inception}@{'0' * 64}",)},
        r"cannot read .*no\.pt": {"features": (f"inception={tmp_path}/no.pt",)},
        "features 'inception' must be one of": {"features": ("inception",)},
        "'vgg=x' must be one of inception=FILE, clip=DIR": {"features": ("vgg=x",)},
        "'clip' are given 2 times": {"features": (files["clip"], files["clip"])},
        "is no folder; give the directory of a transformers model": {
            "features": ("clip=openai/clip-vit-base-patch32",)
        },
        r"holds no config\.json": {"features": (f"dinov2={tmp_path}/empty",)},
        "needs features to compare images by": {"reference": str(real)},
        "holds no images": {"reference": str(tmp_path / "empty"), "features": (files["dinov2"],)},
        r"reference .*nowhere is no folder": {
            "reference": str(tmp_path / "nowhere"),
            "features": (files["dinov2"],),
        },
        "must be module:function": {"metrics": ("brightness",)},
        "module 'no_such' .* cannot be imported": {"metrics": ("no_such:f",)},
        "has no function 'darkness'": {"metrics": ("tests.quality.test_meter:darkness",)},
        "has direction None; set pictures.direction": {"metrics": ("tests.quality.test_meter:pictures",)},
    }
    for message, options in cases.items():
        with pytest.raises(AquabitError, match=message):
            QualityMeter(QualityOptions(**options), None, tmp_path).sources((16, 16))
    swapped = QualityMeter(
        QualityOptions(features=(files["clip"].replace("clip=", "dinov2="),)), None, tmp_path
    )
    with pytest.raises(AquabitError, match="holds a model of type 'clip'; expected 'dinov2'"):
        swapped.sources((16, 16))
    monkeypatch.setenv("AQUABIT_INCEPTION", files["inception"].partition("=")[2])
    assert (
        QualityOptions(features=("inception",)).features
        == QualityOptions(str(real)).features
        == (files["inception"],)
    )
    assert QualityOptions(str(real), (files["dinov2"],)).features == (files["dinov2"],)


def test_what_own_functions_return_is_checked(monkeypatch) -> None:
    import tests.quality.test_meter as here

    metric, x = UserMetric(f"{__name__}:brightness"), pictures(3, channels=1)
    assert metric(x, x * 0, None) == pytest.approx(x.mean((1, 2, 3)).numpy(), rel=1e-5)
    for value, message in (
        (torch.zeros(2), r"returned shape \[2\]; expected .* \[3\]"),
        (torch.tensor([0, math.nan, 1]), "NaN or infinite for 1 of 3"),
    ):
        metric._function = lambda *_, value=value: value
        with pytest.raises(AquabitError, match=message):
            metric(x, x, None)
    monkeypatch.setattr(metric, "_function", lambda *_: 1 / 0)
    with pytest.raises(AquabitError, match=r"failed \(ZeroDivisionError"):
        metric(x, x, None)
    assert here.brightness.direction == "min"  # type: ignore[attr-defined]


# Protocols and studies


def test_files_functions_and_real_images_are_part_of_the_protocol(files, real, tmp_path) -> None:
    options = QualityOptions(str(real), (files["inception"], files["lpips"]), (f"{__name__}:brightness",))
    gauge = QualityMeter(options, None, tmp_path)
    protocol = Protocol(measures=gauge.measures, objective=f"{__name__}:brightness")
    assert [m.partition("=")[0] for m in gauge.measures] == ["inception", "lpips", f"{__name__}:brightness"]
    assert (
        protocol.digest != Protocol().digest
        and Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    )
    assert protocol.direction() == "min" and protocol.direction("clip_score") == "max"
    assert Protocol(measures=("m:f=max:ab",), objective="m:f").direction() == "max"
    with pytest.raises(AquabitError, match="unknown metric 'm:f'"):
        Protocol(objective="m:f").direction()
    assert (
        QualityOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
        and not QualityOptions()
    )
    assert default_objective(gauge.available(False)) == "fid" and "clip_score" not in gauge.available(True)
    only = QualityMeter(QualityOptions(None, (files["clip"],)), None, tmp_path)
    assert (
        default_objective(only.available(True)) == "mse"
        and "clip_score" in only.available(True)
        and "clip_score" not in only.available(False)
    )
    with pytest.raises(
        AquabitError, match="objective 'cmmd' of m needs --reference DIR and --features clip=DIR"
    ):
        check_available("cmmd", only.available(True), "m")
    with pytest.raises(AquabitError, match="give --metric a:b too"):
        check_available("a:b", only.available(True), "m")


def test_images_of_another_size_than_the_reference_are_refused() -> None:
    reference = Reference.from_images(pictures(5, side=8), Means())
    with pytest.raises(AquabitError, match="images are 16 x 16 pixels and those of the reference 8 x 8"):
        Quality([Source(Means(), reference)]).update(pictures(2, side=16))
    assert rgb(torch.full((1, 1, 1, 1), 0.5)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_with_all_of_them(files, real, tmp_path, workers: int) -> None:
    """measure, with workers too; the same again adds nothing; other images are another protocol; nothing
    given continues."""
    import aquabit
    from aquabit.workflows import measure

    pipe = tiny_pipeline("dit")
    pipe.register_to_config(real_images="")
    protocol = Protocol(images=5, steps=1, micro_batch=4, objective=f"{__name__}:brightness")
    options = QualityOptions(str(real), (files["inception"], files["clip"]), (f"{__name__}:brightness",))
    common = {"space": {"schemes": ["usq2", "usq8"]}, "bank": str(tmp_path / "bank"), "workers": workers}
    study = aquabit.Study(tmp_path / "s.db")
    made = measure(pipe, study, 1, protocol=protocol, quality=options, **common)
    table = study.measurements()
    assert made == len(table) >= 3 and {
        "fid",
        "sfid",
        "kid",
        "is",
        "cmmd",
        "mse",
        f"{__name__}:brightness",
    } <= set(table.columns)
    assert "clip_score" not in table and table.fid.notna().all() and table.fid.nunique() > 1
    assert study.protocol.objective == f"{__name__}:brightness" and study.protocol.reference not in (
        "none",
        "bundled",
    )
    if workers == 2:
        return
    for given in (options, None):
        assert measure(pipe, study, 1, protocol=protocol, quality=given, **common) == 0
    with pytest.raises(AquabitError, match=r"was measured under another protocol \(measures"):
        measure(
            pipe,
            study,
            1,
            protocol=protocol,
            quality=QualityOptions(str(real), (files["inception"],), options.metrics),
            **common,
        )
    other = tmp_path / "other"
    other.mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(other / f"{i}.png")
    with pytest.raises(AquabitError, match=r"was measured under another protocol \(reference"):
        measure(
            pipe,
            study,
            1,
            protocol=protocol,
            quality=QualityOptions(str(other), options.features, options.metrics),
            **common,
        )


def test_full_precision_images_are_kept_by_micro_batch(tmp_path, monkeypatch) -> None:
    """Never more than a micro batch at a time, in memory up to a limit, and the same images either way."""
    from aquabit.measuring import evaluator as module
    from aquabit.pipelines import Adapter, trace
    from aquabit.quant.bank import Bank
    from aquabit.quant.model import fingerprint
    from aquabit.space import make_space

    pipe, seen = tiny_pipeline("unet"), []
    original = Quality.update
    monkeypatch.setattr(
        Quality, "update", lambda self, x, *rest: seen.append(len(x)) or original(self, x, *rest)
    )
    monkeypatch.setattr(module, "FULL_LIMIT", 0)
    name = fingerprint(pipe.denoiser)
    one = module.Evaluator(pipe, trace(pipe), Bank(tmp_path), name)
    protocol, space = Protocol(images=7, steps=1, micro_batch=3), make_space(trace(pipe), name)
    held, _ = one.measure(space.uniform("usq4"), protocol, packed=False)  # stays as it is, quantized
    assert seen == [3, 3, 1] and not one._full[1] and len(list(tmp_path.glob("images-*"))) == 3
    images = one.full_precision(protocol)
    assert (
        torch.equal(
            images,
            torch.cat([Adapter(one.pipe).images(protocol, b) for b in Adapter(one.pipe).batches(protocol)]),
        )
        is False
    )
    monkeypatch.undo()
    again = module.Evaluator(pipe, trace(pipe), Bank(tmp_path), name)
    known, _ = again.measure(space.uniform("usq4"), protocol, packed=False)
    assert known.metrics == held.metrics and len(again._full[1]) == 3
    assert torch.equal(again.full_precision(protocol), images)
