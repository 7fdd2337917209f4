"""What quality is measured with: the extractors, real images and functions that the user names, and one
process's open copies of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aquabit.jsonio import record
from aquabit.quality.accumulator import ANY_NUMBERS, PAIRED, TEMPORAL, Quality, Source
from aquabit.quality.feature_statistics import KEPT, FeatureStatistics
from aquabit.quality.features import METRICS_OF, WITHOUT_REAL, FeatureExtractor, unit_images
from aquabit.quality.folder import ImageFolder, unreadable_note
from aquabit.quality.real_images import ClassifierFeatures
from aquabit.quality.reference import Reference, real_kinds
from aquabit.quality.user_metrics import UserMetric
from aquabit.scheme import AquabitError, Progress, digest, no_progress

INCEPTION_VARIABLE = "AQUABIT_INCEPTION"
GIVEN = {"inception": "=FILE", "clip": "=DIR", "dinov2": "=DIR", "lpips": "=FILE", "effnet": ""}
OWN = "own"  # stands among the user's extractors for the model's
DEFAULT_OBJECTIVES = ("fid", "fd_dinov2", "cmmd", "effnet_fd", "mse")  # the first that can be measured
NEEDED = {  # metric -> what to give for it
    **dict.fromkeys(METRICS_OF["inception"], "--reference DIR and --features inception=FILE"),
    "is": "--features inception=FILE",
    **dict.fromkeys(METRICS_OF["dinov2"], "--reference DIR and --features dinov2=DIR"),
    "cmmd": "--reference DIR and --features clip=DIR",
    "clip_score": "--features clip=DIR and a pipeline of prompts",
    "lpips": "--features lpips=FILE",
    **dict.fromkeys(METRICS_OF["effnet"], "--reference DIR and --features effnet"),
    "effnet_distance": "--features effnet",
    TEMPORAL: "a pipeline of videos, and more than one frame of each",
    "accuracy": "a bundled model",
    "feature_distance": "a bundled model",
}


@dataclass(frozen=True)
class QualityOptions:
    """``reference``: a folder of real images. ``features``: extractors, as inception=FILE (or FILE@SHA256, or
    alone: the file that the environment variable AQUABIT_INCEPTION names), clip=DIR, dinov2=DIR, lpips=FILE,
    effnet (EfficientNet-Lite0, from a package). ``metrics``: functions as module:function.
    """

    reference: str | None = None
    features: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        own = (
            ()
            if self.reference is None or self.features or not os.environ.get(INCEPTION_VARIABLE)
            else ("inception",)
        )
        object.__setattr__(self, "features", tuple(_absolute(f) for f in (*self.features, *own)))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if self.reference is not None:
            object.__setattr__(self, "reference", str(Path(self.reference).expanduser().absolute()))
        names = [f.partition("=")[0] for f in self.features]
        for name in names:
            if names.count(name) > 1:
                raise AquabitError(f"features {name!r} are given {names.count(name)} times; give each once")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: Any) -> QualityOptions:
        """The inverse of ``to_dict``; None, as older studies have it, is nothing beside the model's own."""
        if isinstance(value, Mapping):  # beside which a study keeps what was said of them
            own = QualityOptions.__dataclass_fields__
            value = {k: v for k, v in value.items() if k in own and v is not None}
        return record(QualityOptions, value or {}, "what images are measured with")

    def __bool__(self) -> bool:
        return bool(self.reference or self.features or self.metrics)


def _absolute(text: str) -> str:
    """``name=PATH`` with an absolute path, so that a study continues from another folder, or a name alone
    that takes none; raises AquabitError for another form."""
    name, equals, path = text.partition("=")
    if name in GIVEN and not GIVEN[name] and not equals:
        return name
    if name == "inception" and not path:
        path = os.environ.get(INCEPTION_VARIABLE, "")
    if not GIVEN.get(name) or not path:
        known = ", ".join(f"{k}{v}" for k, v in GIVEN.items())
        raise AquabitError(
            f"features {text!r} must be one of {known} (inception alone: the file that {INCEPTION_VARIABLE}"
            " names)"
        )
    return f"{name}={Path(path).expanduser().absolute()}"


def _channels(extractor: FeatureExtractor) -> int:
    """In what a folder's pictures are read for it: a model's own takes what the model makes, others take
    colour."""
    return extractor.shape[0] if isinstance(extractor, ClassifierFeatures) else 3


class QualityMeter:
    """Options opened by one process; networks are loaded when they are first needed, statistics of real
    images kept in ``cache``.

    ``own`` is the extractor and reference that belong to the model itself; an extractor of the user's takes
    the place of its metrics. ``images=False``: it makes other numbers. ``measures`` and ``reference_digest``
    identify it all: they are part of the protocol. Raises AquabitError for files, folders and functions that
    are missing or wrong.
    """

    def __init__(
        self,
        options: QualityOptions,
        own: Source | None,
        cache: Path,
        device: str = "cpu",
        images: bool = True,
    ) -> None:
        self.options, self.cache, self.device, self.images = options, cache, device, images
        if not images and (options.reference or options.features):
            given = "--reference" if options.reference else "--features"
            raise AquabitError(
                f"{given} is for images, and this model makes other numbers; measure them by mse, psnr or a"
                " --metric of your own"
            )
        self.own = None if own is None or any(f.startswith("inception=") for f in options.features) else own
        self.metrics = [UserMetric(name, images) for name in options.metrics]
        self._digests: dict[str, str] = {}
        self._opened: dict[str, FeatureExtractor] = {}
        self._openers: dict[str, Callable[[], FeatureExtractor]] = {}
        for text in options.features:
            name, _, path = text.partition("=")
            self._name(name, path)
        comparing = [k for k in self._digests if set(METRICS_OF[k].values()) - set(WITHOUT_REAL)]
        if options.reference is not None and not (comparing or self.own):
            raise AquabitError(
                f"--reference {options.reference} needs features to compare images by; "
                "add --features inception=FILE, dinov2=DIR, clip=DIR or effnet"
            )
        self._references: dict[tuple[str, tuple[int, int]], Reference] = {}
        self._image_digests: dict[tuple[int, int], str] = {}
        self.notes: list[str] = []

    def _name(self, name: str, path: str) -> None:
        """Hash what an extractor is made from, and remember how to open it."""
        from aquabit.quality import pretrained
        from aquabit.quality.effnet import EffnetFeatures
        from aquabit.quality.lpips import Lpips

        if name == "inception":
            stem, at, stated = path.rpartition("@")
            hashed = at and len(stated) == 64 and all(c in "0123456789abcdefABCDEF" for c in stated)
            file = Path(stem if hashed else path)
            data = pretrained.check_inception(file, stated if hashed else None)
            opener: Callable[[], FeatureExtractor] = partial(
                pretrained.InceptionFeatures, data, str(file), self.device
            )
            self._digests[name] = pretrained.bytes_digest(data)
        elif name in ("lpips", "effnet"):
            opened: Lpips | EffnetFeatures = (
                Lpips(Path(path), self.device) if name == "lpips" else EffnetFeatures(self.device)
            )
            opener, self._digests[name] = (lambda: opened), opened.digest
        else:
            found = pretrained.folder_digest(Path(path))
            make = pretrained.ClipFeatures if name == "clip" else pretrained.Dinov2Features
            opener, self._digests[name] = partial(make, Path(path), found, self.device), found
        self._openers[name] = opener

    def extractor(self, name: str) -> FeatureExtractor:
        """The user's extractor of that name, loaded."""
        if name not in self._opened:
            self._opened[name] = self._openers[name]()
        return self._opened[name]

    @property
    def measures(self) -> tuple[str, ...]:
        """What identifies the user's extractors and functions in a protocol."""
        own = (f"{m.name}={m.direction}:{m.digest}" for m in self.metrics)
        return (*(f"{k}={v}" for k, v in sorted(self._digests.items())), *own)

    def reference_digest(self, size: tuple[int, int] | None, progress: Progress = no_progress) -> str:
        """Of the real images, at a size in pixels (height, width); "none" where there are none."""
        if self.options.reference is None:
            return self.own.reference.digest if self.own and self.own.reference else "none"
        self.sources(size, progress)
        assert size is not None  # checked by ``sources``
        return self._image_digests[size]

    def sources(self, size: tuple[int, int] | None, progress: Progress = no_progress) -> list[Source]:
        """Every extractor with its statistics of the real images; those that are not in the cache are
        computed together, in one pass."""
        opened = {k: self.extractor(k) for k in self._openers}
        if self.options.reference is None:
            return [*([self.own] if self.own else []), *(Source(e, None) for e in opened.values())]
        if size is None:
            raise AquabitError(
                "the size of the model's images is not known, so the reference cannot be cropped to it; set"
                " the protocol's resolution"
            )
        every = {**opened, **({OWN: self.own.extractor} if self.own else {})}
        needing = {k: e for k, e in every.items() if real_kinds(e)}
        if any((k, size) not in self._references for k in needing):
            self._read(needing, size, progress)
        return [Source(e, self._references.get((k, size))) for k, e in every.items()]

    def _read(
        self, extractors: Mapping[str, FeatureExtractor], size: tuple[int, int], progress: Progress
    ) -> None:
        folder = ImageFolder(str(self.options.reference))
        paths = {
            k: self.cache / f"reference-{digest([folder.listing, size, e.digest, KEPT])}.safetensors"
            for k, e in extractors.items()
        }
        found = {k: Reference.load(path) for k, path in paths.items()}
        if any(value is None for value in found.values()):
            missing = {k: e for k, e in extractors.items() if found[k] is None}
            for channels in sorted({_channels(e) for e in missing.values()}):
                wanted = {k: e for k, e in missing.items() if _channels(e) == channels}
                self._compute(wanted, paths, folder, size, channels, progress)
            found = {k: value or Reference.load(paths[k]) for k, value in found.items()}
        for name, value in found.items():
            assert value is not None  # just written
            self._references[name, size], facts = value
            self._image_digests[size] = facts["images"]
            if facts["unreadable"]:
                self.notes = [unreadable_note(facts["unreadable"], facts["total"], folder.folder)]

    def _compute(
        self,
        extractors: Mapping[str, FeatureExtractor],
        paths: Mapping[str, Path],
        folder: ImageFolder,
        size: tuple[int, int],
        channels: int,
        progress: Progress,
    ) -> None:
        """Write what extractors of images with so many channels see of a folder."""
        collected = {k: FeatureStatistics(real_kinds(e)) for k, e in extractors.items()}
        for batch in folder.batches(size, channels, progress):
            images = unit_images(batch, "reference images")
            for name, extractor in extractors.items():
                collected[name].update(extractor(images))
        facts = {"images": folder.digest, "unreadable": folder.unreadable, "total": len(folder.paths)}
        for name, extractor in extractors.items():
            made = Reference.of(
                collected[name], digest([folder.digest, extractor.digest]), extractor.digest, size
            )
            made.save(paths[name], facts)

    def available(self, prompts: bool, videos: bool = False) -> list[str]:
        """The metrics that can be measured, the user's functions last; ``prompts``: images are made from
        text; ``videos``: they are frames of videos."""
        rows = {OWN: self.own.extractor.metrics} if self.own else {}
        rows |= {name: METRICS_OF[name] for name in self._digests}
        real = self.options.reference is not None or (self.own is not None and self.own.reference is not None)
        known = [
            m
            for row in rows.values()
            for m, kind in row.items()
            if (kind in WITHOUT_REAL or real) and (m != "clip_score" or prompts)
        ]
        paired = ("mse", "psnr", "ssim", *((TEMPORAL,) if videos else ())) if self.images else ANY_NUMBERS
        return [*known, *(m for m in PAIRED if m in paired), *(m.name for m in self.metrics)]

    def quality(self, size: tuple[int, int] | None) -> Quality:
        """An accumulator of every metric that can be measured."""
        return Quality(self.sources(size), own=self.metrics, images=self.images)


def default_objective(available: Sequence[str]) -> str:
    """The first of DEFAULT_OBJECTIVES that can be measured."""
    return next(m for m in DEFAULT_OBJECTIVES if m in available)


def check_available(metric: str, available: Sequence[str], model: str) -> None:
    """Raise AquabitError, saying what to give, where an objective cannot be measured."""
    if metric in available:
        return
    if ":" in metric:
        raise AquabitError(f"objective {metric!r} is no metric of this study; give --metric {metric} too")
    raise AquabitError(
        f"objective {metric!r} of {model} needs {NEEDED[metric]}; without, use one of"
        f" {', '.join(m for m in available)}"
    )
