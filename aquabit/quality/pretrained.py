"""Feature extractors from files that the user has: the standard TorchScript Inception, CLIP and DINOv2.
Nothing is downloaded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aquabit.jsonio import read_json
from aquabit.quality.features import METRICS_OF, Features, rgb
from aquabit.quality.paired import Array
from aquabit.scheme import AquabitError

# inception-2015-12-05.pt as NVIDIA publishes it with StyleGAN2-ADA to 3 and EDM; k-diffusion pins the same
# hash
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SFID_CHANNELS = 7  # of mixed_6/conv, 17 x 17 each, as in Nash et al. 2021
CHUNK = 32  # images that a network sees at a time
DINOV2_SIDE = 224  # pixels, as in Stein et al. 2023
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WEIGHTS = ("*.safetensors",)
_TEXTS = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AquabitError(f"cannot read {path}: {error.strerror or error}") from error


def bytes_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def check_inception(path: Path, stated: str | None) -> bytes:
    """The bytes of a TorchScript file whose SHA-256 is the standard file's or the ``stated`` one; else
    AquabitError.

    Such a file is code, which runs when it is loaded: nothing but the hash guards it.
    """
    data = read_file(path)
    found, wanted = hashlib.sha256(data).hexdigest(), (stated or INCEPTION_SHA256).lower()
    if found != wanted:
        what = "the one that was stated" if stated else "that of inception-2015-12-05.pt"
        raise AquabitError(
            f"{path} has SHA-256 {found}, not {wanted}, {what}; it holds code and is not loaded (if you trust"
            f" it, give inception={path}@{found})"
        )
    return data


def _float(array: Tensor) -> Any:
    return array.float().cpu().numpy()


class InceptionFeatures:
    """The standard TorchScript Inception of FID: it takes images in 0..255 and resizes them itself, as
    TensorFlow 1 did, to 299 x 299.

    pooled [n, 2048]; spatial [n, 7 * 17 * 17] of the layer ``mixed_6/conv`` where the file names it; logits
    [n, 1008] without bias, as the inception score's first code has it, where it has an output layer. Raises
    AquabitError for a file that is none.
    """

    def __init__(self, data: bytes, source: str, device: str = "cpu") -> None:
        self.digest, self.device = bytes_digest(data), device
        try:
            self._net = torch.jit.load(io.BytesIO(data), map_location=device).eval()
        except RuntimeError as error:
            raise AquabitError(f"{source} is no TorchScript file ({str(error).splitlines()[0]})") from error
        images = (
            torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(
                device
            )
            * 255
        )
        with torch.inference_mode():
            try:
                own = self._net(images, return_features=True)
            except (RuntimeError, TypeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise AquabitError(
                    f"{source} does not take images and return_features, as the standard Inception does"
                    f" ({reason})"
                ) from error
            if not isinstance(own, Tensor) or own.ndim != 2 or len(own) != 2:
                raise AquabitError(f"{source} returns no features [n, d]; the standard Inception does")
            self._output = getattr(getattr(self._net, "output", None), "weight", None)
            self._layers = (
                [layer for name, layer in self._until_mixed_6()] if self._follows(images, own) else None
            )
        kinds = {"inception_score": self._output is not None, "spatial_frechet": self._layers is not None}
        self.metrics: Mapping[str, str] = {
            m: k for m, k in METRICS_OF["inception"].items() if kinds.get(k, True)
        }

    def _until_mixed_6(self) -> Iterator[tuple[str, Any]]:
        """The layers whose output begins with the channels that sFID sees."""
        for name, layer in self._net.layers.named_children():
            yield name, layer
            if name == "mixed_6":
                return

    def _follows(self, images: Tensor, own: Tensor) -> bool:
        """Whether the file's layers, called one by one on images resized here, give what the file gives:
        spatial features can be had."""
        layers = dict(getattr(self._net, "layers", torch.nn.Module()).named_children())
        if "mixed_6" not in layers:
            return False
        x = tf_resize(images)
        for layer in layers.values():
            x = layer(x)
        return torch.allclose(x.reshape(len(x), -1), own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images [n, 1 or 3, h, w], float32 in [0, 1], rounded to 8 bits first."""
        parts = [self._chunk(part.to(self.device)) for part in rgb(images).split(CHUNK)]
        return Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _chunk(self, images: Tensor) -> tuple[Any, Any, Any]:
        pooled = self._net(images, return_features=True).float()
        spatial = images.new_empty(len(images), 0)
        if self._layers is not None:
            x = tf_resize(images)
            for layer in self._layers:
                x = layer(x)
            spatial = x[:, :SFID_CHANNELS].flatten(1)
        logits = images.new_empty(len(images), 0) if self._output is None else F.linear(pooled, self._output)
        return _float(pooled), _float(spatial), _float(logits)


def tf_resize(images: Tensor, side: int = 299) -> Tensor:
    """Images [n, 3, h, w] in 0..255 as Inception's first layer takes them: bilinear from the corner of
    each pixel, as TensorFlow 1 resizes (pixel i of the result is read at i * h / side), then (x - 128) /
    128."""
    height, width = images.shape[-2:]
    rows = torch.arange(side, device=images.device, dtype=torch.float32) * (height / side)
    columns = torch.arange(side, device=images.device, dtype=torch.float32) * (width / side)
    grid = torch.stack([(2 * columns + 1) / width - 1, torch.zeros_like(columns)], -1)[None, None].repeat(
        len(images), side, 1, 1
    )
    grid[..., 1] = ((2 * rows + 1) / height - 1)[:, None]
    return (
        F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False) - 128
    ) / 128


def folder_digest(folder: Path) -> str:
    """Of what determines a model's features: weights and configuration, not names and times. Raises
    AquabitError for another folder."""
    if not folder.is_dir():
        raise AquabitError(
            f"{folder} is no folder; give the directory of a transformers model (nothing is downloaded)"
        )
    files = [
        *sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern)),
        *(p for p in map(folder.__truediv__, _TEXTS) if p.is_file()),
    ]
    if not any(p.suffix == ".safetensors" for p in files) or not (folder / "config.json").is_file():
        raise AquabitError(
            f"{folder} holds no config.json with *.safetensors; save the model with save_pretrained (pickles"
            " are not read)"
        )
    hashed = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                hashed.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
        except OSError as error:
            raise AquabitError(f"cannot read {path}: {error.strerror or error}") from error
    return hashed.hexdigest()[:16]


def _from_folder(cls: str, folder: Path, device: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise AquabitError(
            "transformers is not installed; CLIP and DINOv2 need it: pip install 'aquabit[text]'"
        ) from error
    logging: Any = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = getattr(transformers, cls).from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AquabitError(f"{folder} could not be read as a {cls} of transformers ({reason})") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval() if hasattr(model, "eval") else model


def _is_a(folder: Path, kind: str) -> None:
    """Raise AquabitError unless ``config.json`` says so: another model would load, with random weights."""
    try:
        found = read_json(folder / "config.json").get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise AquabitError(f"{folder / 'config.json'} is not valid JSON; it may be truncated") from error
    if found != kind:
        raise AquabitError(f"{folder} holds a model of type {found!r}; expected {kind!r}")


def _prepared(images: Tensor, side: int, mean: Sequence[float], std: Sequence[float], device: str) -> Tensor:
    """Images [n, 1 or 3, h, w] in [0, 1] rounded to 8 bits, resized (bicubic, antialiased) and cropped to
    side x side, normalised."""
    x = rgb(images).to(device)
    scale = side / min(x.shape[-2:])
    size = [max(side, round(v * scale)) for v in x.shape[-2:]]
    x = (
        F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
        / 255
    )
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    shift, scaled = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
    return (x[..., top : top + side, left : left + side] - shift) / scaled


class ClipFeatures:
    """A transformers CLIPModel: pooled [n, d] are image embeddings of length 1; ``scores`` compares them with
    prompts.

    Preprocessing is CLIP's: bicubic to the model's own size, the mean and deviation of
    ``preprocessor_config.json`` where it is there.
    """

    metrics = METRICS_OF["clip"]

    def __init__(self, folder: Path, digest: str, device: str = "cpu") -> None:
        _is_a(folder, "clip")
        self.digest, self.device, self.folder = digest, device, folder
        self._net = _from_folder("CLIPModel", folder, device, use_safetensors=True)
        self._side = int(self._net.config.vision_config.image_size)
        self._mean, self._std = _normalisation(folder)
        self._tokenizer: Any = None
        self._texts: dict[str, Array] = {}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        rows = []
        for part in images.split(CHUNK):
            x = _prepared(part, self._side, self._mean, self._std, self.device)
            rows.append(
                _float(
                    F.normalize(
                        self._net.visual_projection(self._net.vision_model(pixel_values=x).pooler_output),
                        dim=-1,
                    )
                )
            )
        pooled = np.concatenate(rows)
        none = np.empty((len(pooled), 0), np.float32)
        return Features(pooled, none, none)

    def scores(self, pooled: Any, prompts: Sequence[str]) -> Array:
        """CLIP score of each image: 100 times the cosine of image and prompt, at least 0 (Hessel et al.
        2021, with their 2.5 as 100)."""
        self._embed(prompts)
        texts = np.stack([self._texts[p] for p in prompts])
        result: Array = 100.0 * (np.asarray(pooled, np.float64) * texts).sum(1).clip(0.0)
        return result

    @torch.inference_mode()
    def _embed(self, prompts: Sequence[str]) -> None:
        """Text embeddings of length 1, made once per prompt; what is longer than the model's context is
        cut off, as CLIP does."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        if missing and self._tokenizer is None:
            self._tokenizer = _from_folder("AutoTokenizer", self.folder, self.device)
        length = int(self._net.config.text_config.max_position_embeddings)
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            tokens = self._tokenizer(
                part, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            inputs = {k: tokens[k].to(self.device) for k in ("input_ids", "attention_mask")}
            found = F.normalize(
                self._net.text_projection(self._net.text_model(**inputs).pooler_output), dim=-1
            )
            self._texts.update(zip(part, _float(found).astype(np.float64), strict=True))


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    try:
        said = read_json(folder / "preprocessor_config.json")
        return said["image_mean"], said["image_std"]
    except (OSError, ValueError, KeyError, TypeError):
        return _CLIP_MEAN, _CLIP_STD


class Dinov2Features:
    """A transformers Dinov2Model, as FD-DINOv2 sees images: 224 x 224, ImageNet's mean and deviation,
    pooled [n, d] the class token after the last norm (Stein et al. 2023)."""

    metrics = METRICS_OF["dinov2"]

    def __init__(self, folder: Path, digest: str, device: str = "cpu") -> None:
        _is_a(folder, "dinov2")
        self.digest, self.device = digest, device
        self._net = _from_folder("Dinov2Model", folder, device, use_safetensors=True)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        rows = []
        for part in images.split(CHUNK):
            x = _prepared(part, DINOV2_SIDE, _IMAGENET_MEAN, _IMAGENET_STD, self.device)
            rows.append(_float(self._net(pixel_values=x).last_hidden_state[:, 0]))
        pooled = np.concatenate(rows)
        none = np.empty((len(pooled), 0), np.float32)
        return Features(pooled, none, none)
