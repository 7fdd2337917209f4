"""Evaluator: one process that measures configurations of one model."""

from __future__ import annotations

import platform
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import networkx as nx
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from aquabit.kernels import straight_through
from aquabit.kernels.backends.decode import multiplies_integers
from aquabit.kernels.dispatch import using
from aquabit.measuring.output_errors import OutputErrors, StepErrors, stored
from aquabit.measuring.sketches import Numbers, Sketches
from aquabit.memory import layer_bytes
from aquabit.pipelines import (
    Pipeline,
    adapter_of,
    free_text_encoders,
    image_size,
    load,
    noise_statistics,
    own_copy,
    recorder,
    replay_recorder,
    sampler,
    scheduler_of,
    use_scheduler,
)
from aquabit.pipelines.finite import NotFinite, broken, checked_images, finite_images
from aquabit.pipelines.pictures import COLUMNS, spaced, thumbnail
from aquabit.quality import TEMPORAL, NonFiniteImages, NonFiniteValues, Quality, QualityMeter, QualityOptions
from aquabit.quant.bank import Bank
from aquabit.quant.calibration.moments import shared_out
from aquabit.quant.correction.corrector import Corrector, check_correction
from aquabit.quant.correction.noise import Uncorrectable
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.quant.correction.statistics import Statistics
from aquabit.quant.model import QuantizedDenoiser
from aquabit.runtime import out_of_memory, reuse_memory, single_thread
from aquabit.scheme import (
    FP,
    Act,
    AquabitError,
    Calibration,
    Measurement,
    Protocol,
    QuantConfig,
    Rounding,
    Scheme,
    StepGroups,
    act_parts,
    act_text,
    digest,
    output_rounding,
)

INTEGERS: frozenset[Rounding] = frozenset({8, 6, 4, "i8"})  # what activations are rounded to as integers
PROBE_IMAGES, PROBE_SEED = 8, 700_000_001  # seeds that no measurement uses
SKETCH = 256  # numbers that stand for the deviation of a few images
THUMBNAILS = 16  # images of the grid that a measurement keeps
SKETCH_SEED = (
    800_000_001  # seeds of images that gradients pass through: no measurement and no probe uses them
)
HELD_LIMIT = 1 << 30  # bytes of layers' inputs and outputs that are held for a backward pass, else made again
SKETCH_LIMIT = 1 << 30  # bytes of weight errors that stay in memory between backward passes
FULL_LIMIT = 256 << 20  # bytes of full-precision images that stay in memory


def environment(device: str) -> dict[str, str]:
    """What numbers may depend on: versions, processor, device."""
    import diffusers

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": gpu or device,
    }


class Measured(NamedTuple):
    """A measurement, and a PNG grid of its first images; None where it failed, or makes none."""

    measurement: Measurement
    png: bytes | None


class Slopes(TypedDict):
    """See ``Evaluator.slopes``; "slopes" and "overlap" are {layer: {scheme: value}}."""

    value: float
    slopes: dict[str, dict[str, float]]
    overlap: dict[str, dict[str, float]]


class Sketched(TypedDict):
    """See ``Evaluator.sketches``; "untold" is {layer: why it has no numbers}."""

    numbers: Numbers
    untold: dict[str, str]


class _Place(Watcher):
    """Knows the step of the sampler."""

    step = 0

    def before(self, step: int) -> None:
        self.step = step


class Evaluator:
    """Fits schemes and measures configurations; every result is plain data that crosses process borders.

    The pipeline's denoiser is quantized in place: a model given as an object is copied first. ``bank`` also
    keeps the full-precision images of each protocol, which paired metrics compare with. ``quality`` is what
    images are measured with beside the model's own. Images are made, measured and let go by micro batch.
    """

    def __init__(
        self,
        model: str | Pipeline,
        graph: nx.DiGraph,
        bank: Bank,
        fingerprint: str,
        device: str = "cpu",
        dtype: str = "float32",
        quality: QualityOptions | None = None,
    ):
        if device == "cpu":
            reuse_memory()
        pipe = load(model, device, dtype)
        if not isinstance(model, str):
            pipe = own_copy(pipe)
        else:
            free_text_encoders(pipe)
        self.pipe, self.bank, self.fingerprint, self.device = pipe, bank, fingerprint, device
        self.graph = graph
        self.scheduler = scheduler_of(pipe)
        self.adapter = adapter_of(pipe)
        self.quantized = QuantizedDenoiser(
            self.adapter.network.eval(), graph, bank, fingerprint, recorder(pipe), sampler(pipe)
        )
        images = self.adapter.makes_images
        own = self.adapter.reference()
        self.meter = QualityMeter(quality or QualityOptions(), own, bank.folder, device, images)
        self._full: tuple[str, dict[int, Tensor]] = "", {}
        self._probed: tuple[str, Tensor] | None = None
        self._stored: dict[str, OutputErrors] = {}

    def chunks(self, layers: Sequence[str], calibration: Calibration, parts: int = 1) -> list[list[str]]:
        """Layers in portions whose H fit into memory together, each in at most ``parts`` parts of about the
        same work."""
        with single_thread(self.device):
            portions = self.quantized.fitter.portions(layers, calibration)
        own = self.quantized.layers
        shared = [part for portion in portions for part in shared_out(portion, own, parts)]
        return [[layer for group in part for layer in group] for part in shared]

    def fit(
        self,
        schemes: Mapping[str, Sequence[str]],
        calibration: Calibration | None,
        beside: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Fit schemes (layer -> schemes) in the bank; layer -> scheme -> facts: ``error`` is the relative
        squared weight error, ``output`` (with a calibration) the relative output error under H. Schemes of
        ``beside`` are fitted too, as long as H is there."""
        with single_thread(self.device):
            wanted, others = (
                {layer: [Scheme.parse(s) for s in row] for layer, row in rows.items() if row}
                for rows in (schemes, beside or {})
            )
            return self.quantized.fitter.facts(list(wanted), wanted, calibration, others) if wanted else {}

    def probe(
        self,
        layer: str,
        schemes: Sequence[str],
        acts: Sequence[Act],
        protocol: Protocol,
        base: QuantConfig,
        act: Rounding,
        steps: StepGroups | None = None,
    ) -> dict[str, dict[str, Any]]:
        """What fitted schemes of a layer, and activation choices ("a8", "i8", "a6/8" of groups of
        ``steps``), do alone.

        ``damage`` is the mean squared deviation of PROBE_IMAGES images from full precision where it is the
        only change, ``sketch`` a fixed random projection of the deviations, SKETCH numbers: sketches add up
        as deviations do to first order. A scheme that is fitted for rounded activations is probed with
        them, at ``act``, against images with that layer's activations rounded alone. ``base``: how
        schemes are fitted.
        """
        batch = min(PROBE_IMAGES, protocol.micro_batch)
        few = replace(protocol, images=PROBE_IMAGES, micro_batch=batch, seed=PROBE_SEED)
        with single_thread(self.device):
            if self._probed is None or self._probed[0] != protocol.digest:
                self._probed = protocol.digest, self.generate(QuantConfig(self.fingerprint, {}), few)
            full, parsed = self._probed[1], [Scheme.parse(s) for s in schemes]
            needed = {*acts, *(act for s in parsed if s.calibrated)} - {16}
            rounded = {a: self.generate(base.with_layer(layer, "fp", a, steps=steps), few) for a in needed}
            found = {act_text(a): _deviation(rounded[a], full) for a in acts if a != 16}
            for scheme in parsed:
                own = act if scheme.calibrated else 16
                codebook = self.quantized.partners[layer] if scheme.shared else None
                images = self.generate(base.with_layer(layer, scheme, own, codebook), few)
                found[str(scheme)] = _deviation(images, full if own == 16 else rounded[own])
            return found

    def generate(self, config: QuantConfig, protocol: Protocol, packed: bool = False) -> Tensor:
        """All images of a configuration [n, c, h, w] in [0, 1]; see ``batches``."""
        with closing(self.batches(config, protocol, packed)) as made:
            return torch.cat([images for _, images in made])

    def batches(
        self, config: QuantConfig, protocol: Protocol, packed: bool = False
    ) -> Generator[tuple[range, Tensor], None, None]:
        """The images of a configuration [n, c, h, w] in [0, 1], by micro batch; ``packed``: made by the
        kernels from coded weights, chosen in their static order, so that images depend neither on timings nor
        on the number of workers. Close it where you stop early.
        """
        if config.fingerprint != self.fingerprint:
            raise AquabitError(
                f"the configuration is for model {config.fingerprint}, this is model {self.fingerprint}"
            )
        watchers = self._watchers(config, protocol)
        use_scheduler(self.pipe, self.scheduler, protocol.scheduler)
        if packed:
            with self.packed(config), using({}):
                yield from self._images(config, protocol, watchers)
            return
        self.quantized.apply(config)
        yield from self._images(config, protocol, watchers)

    def _images(
        self, config: QuantConfig, protocol: Protocol, watchers: Sequence[Watcher]
    ) -> Generator[tuple[range, Tensor], None, None]:
        """Images of the configuration that is applied; what depends on the step follows the sampler."""
        every = [*self.quantized.watchers(config), *watchers]
        with following(self.adapter.network, scheduler_of(self.pipe), every):
            for batch in self.adapter.batches(protocol):
                if config.layers:
                    yield batch, self.adapter.images(protocol, batch)
                else:
                    yield batch, finite_images(self.adapter, protocol, batch)

    def _watchers(self, config: QuantConfig, protocol: Protocol) -> list[Watcher]:
        """What takes part in sampling with a configuration."""
        if not config.correction or not config.layers:
            return []
        use_scheduler(self.pipe, self.scheduler, protocol.scheduler)
        check_correction(scheduler_of(self.pipe), config.correction, protocol.eta)
        return [Corrector(self.noise(config, Calibration.of(protocol)), config.correction)]

    def noise(self, config: QuantConfig, calibration: Calibration) -> Statistics:
        """The statistics of the noise that a configuration adds, sampled as ``calibration`` says; from the
        bank where they are kept."""
        plain = replace(config, correction=None)
        key = digest([self.fingerprint, plain.digest, calibration.digest])
        path = self.bank.folder / f"noise-{key}.safetensors"
        if path.exists():
            with suppress(AquabitError):  # damaged: measured again
                return Statistics.load(path)
        use_scheduler(self.pipe, self.scheduler)
        found = noise_statistics(self.pipe, self.quantized, plain, calibration)
        self.bank.write(path, *found.stored())
        return found

    def output_errors(self, config: QuantConfig, protocol: Protocol, part: int = 0) -> StepErrors:
        """How far the denoiser's outputs are from full precision on stored inputs (``OutputErrors``),
        without correction."""
        with single_thread(self.device):
            errors = self._errors(protocol, part)
            self.quantized.apply(replace(config, correction=None))
            return errors(self.quantized.watchers(config))

    def slopes(
        self,
        config: QuantConfig,
        protocol: Protocol,
        part: int,
        weights: Sequence[float],
        choices: Mapping[str, Sequence[str]],
    ) -> Slopes:
        """What the weighted output error of a configuration is ("value"), and by how much it changes to
        first order where one layer's weight takes another scheme: "slopes" {layer: {scheme: <gradient,
        W_scheme - W_full>}}, so that differences count; "overlap" has the cosine between the weight errors
        of a scheme and of the configuration's own (0 beside full precision). One backward pass serves all
        of ``choices`` (layer -> schemes). Raises AquabitError where no gradient passes the denoiser."""
        with single_thread(self.device):
            errors = self._errors(protocol, part)
            self.quantized.apply(replace(config, correction=None))
            with self.quantized.gradients() as gradient:
                with _gradients_pass():
                    value = errors.backward(weights, self.quantized.watchers(config))
                found: Slopes = {"value": value, "slopes": {}, "overlap": {}}
                for layer, row in choices.items():
                    full, own = self.quantized.full(layer), self.quantized.layers[layer].weight.detach()
                    coded = {s: self.quantized.decoded(layer, s, config) for s in row if s != "fp"}
                    error = {s: weight.float() - full.float() for s, weight in coded.items()}
                    now, slope = own.float() - full.float(), gradient(layer)
                    none = {"fp": 0.0}
                    found["slopes"][layer] = {s: float((slope * e).sum()) for s, e in error.items()} | none
                    found["overlap"][layer] = {s: _cosine(now, e) for s, e in error.items()} | none
        return found

    def sketches(
        self,
        choices: Mapping[str, Sequence[str]],
        acts: Sequence[Act],
        protocol: Protocol,
        start: int,
        passes: int,
        like: QuantConfig,
        steps: StepGroups | None = None,
    ) -> Sketched:
        """What schemes (layer -> schemes), and activation choices ("a8", of groups of ``steps``), do
        alone to the images from ``start`` on of SKETCH_SEED, a micro-batch of at most PROBE_IMAGES, to first
        order (``Sketches``); schemes are fitted as in ``like``. Layers that no gradient reaches, or one that
        is not finite, have no numbers, and are named with the reason."""
        few = min(PROBE_IMAGES, protocol.micro_batch)
        own = replace(protocol, images=start + few, micro_batch=few, seed=SKETCH_SEED)
        layers, kept = self.quantized.layers, dict[str, Tensor]()
        attention, place = self.quantized.attention, _Place()

        def changes(name: str) -> tuple[tuple[str, ...], Tensor]:
            found, row = kept.get(name), tuple(s for s in choices[name] if s != "fp")
            if found is None:
                full = self.quantized.full(name).float().flatten()
                found = full.new_empty(len(row), len(full))
                for into, scheme in zip(found, row, strict=True):
                    into.copy_(self.quantized.decoded(name, scheme, like).flatten()).sub_(full)
                if sum(t.nbytes for t in kept.values()) + found.nbytes < SKETCH_LIMIT:
                    kept[name] = found
            return row, found

        def gates(name: str, x: Tensor, step: int) -> dict[str, Tensor]:
            layer, found, rounded = layers[name], dict[str, Tensor](), dict[Rounding, Tensor]()
            y = layer.forward(x)
            for act in acts:
                parts = act_parts(act)
                own = parts[0] if steps is None or len(parts) == 1 else parts[steps.of(step)]
                if own not in rounded:
                    after = output_rounding(own) if name in attention else 16
                    out = straight_through(y, after, "token") - y if after != 16 else 0.0
                    rounded[own] = layer.forward(layer.quantized_input(x, own)) - y + out
                found[act_text(act)] = rounded[own]
            return found

        with single_thread(self.device), self.quantized.bank_in_use():
            self.quantized.apply(QuantConfig(self.fingerprint, {}))
            use_scheduler(self.pipe, self.scheduler, protocol.scheduler)
            branches = 2 if protocol.guidance != 1.0 else 1
            held = few * branches * protocol.steps * layer_bytes(self.graph)
            sketches = Sketches(
                self.adapter.network,
                {name: layer for name, layer in layers.items() if name in choices},
                changes,
                gates,
                lambda: place.step,
                recompute=held > HELD_LIMIT,
            )

            few_images = range(start, start + few)

            def images() -> Tensor:
                return checked_images(self.adapter, own, few_images, gradients=True)

            try:
                with following(self.adapter.network, scheduler_of(self.pipe), [place]):
                    found = sketches(images, passes, start)
            except NotFinite:
                raise broken(self.adapter, own, few_images) from None
            except RuntimeError as fault:
                if out_of_memory(fault):
                    raise
                said = f"no gradient passes the pipeline ({str(fault).split('. ')[0]})"
                return Sketched(numbers={}, untold=dict.fromkeys(choices, said))
        untold = dict.fromkeys(choices.keys() - found.keys(), "no gradient reaches it")
        untold |= {k: f"its gradient is not finite in step {step}" for k, step in sketches.bad.items()}
        for layer, row in list(found.items()):
            if not all(map(isfinite, chain(*row.values()))):
                untold[layer] = "its gradient times what it may change is not finite"
                del found[layer]
        return Sketched(numbers=found, untold=untold)

    def _errors(self, protocol: Protocol, part: int) -> OutputErrors:
        """Stored inputs, recorded in full precision when they are first asked for."""
        calibration, batch = stored(protocol, part)
        if calibration.digest not in self._stored:
            self.quantized.apply(QuantConfig(self.fingerprint, {}))
            use_scheduler(self.pipe, self.scheduler)
            recording = replay_recorder(self.pipe)(calibration, batch)
            self._stored[calibration.digest] = OutputErrors(recording, self.adapter.network)
        return self._stored[calibration.digest]

    @contextmanager
    def packed(self, config: QuantConfig) -> Iterator[QuantizedDenoiser]:
        """The denoiser in packed mode; in full precision afterwards, as fitting needs it."""
        try:
            self.quantized.apply_packed(config)
            yield self.quantized
        finally:
            self.quantized.apply(QuantConfig(self.fingerprint, {}))

    def faster_packed(self, config: QuantConfig) -> bool:
        """Whether images come sooner from packed weights: on a CPU that multiplies integers, where all
        quantized layers round their inputs to integers. They are those of decoded weights but for sums'
        last digits, which now and then take a value to the integer beside it."""
        quantized = [c for c in config.layers.values() if c.weight != FP]
        rounded = all(r in INTEGERS for c in quantized for r in act_parts(c.act))
        return self.device == "cpu" and bool(quantized) and rounded and multiplies_integers()

    def measure(self, config: QuantConfig, protocol: Protocol, packed: bool | None = None) -> Measured:
        """A measurement and a PNG of its first images; a failure is a measurement too, with its reason.
        ``packed`` as for ``generate``; None: where that is faster."""
        packed = self.faster_packed(config) if packed is None else packed and bool(config.layers)
        started = time.perf_counter()
        facts = environment(self.device) | {"weights": "packed" if packed else "decoded"}
        try:
            with single_thread(self.device):
                quality = self._quality(protocol)
                if config.layers:
                    self._make_full(protocol)
                # full-precision images are made once per protocol, not per configuration
                started = time.perf_counter()
                first, row = self._take(quality, config, protocol, packed)
                metrics = quality.compute()
        # anything else (a full disk, say) is no property of the configuration
        except (NonFiniteImages, Uncorrectable, NonFiniteValues) as error:
            if isinstance(error, NonFiniteValues) and not config.layers:
                raise  # a metric that fails on full precision will fail on all
            seconds = time.perf_counter() - started
            failed = Measurement(config.digest, protocol.digest, {}, seconds, facts, "failed", str(error))
            return Measured(failed, None)
        seconds = time.perf_counter() - started
        measured = Measurement(config.digest, protocol.digest, metrics, seconds, facts)
        return Measured(measured, thumbnail(first, row) if self.adapter.makes_images else None)

    def _quality(self, protocol: Protocol) -> Quality:
        """An accumulator of what is measured; raises AquabitError where it is not what the protocol names
        (a file was changed, say)."""
        size = image_size(self.pipe, protocol.resolution)
        begun = protocol.measures, protocol.reference
        if self.meter.options and begun != (self.meter.measures, self.meter.reference_digest(size)):
            raise AquabitError(
                "the files that quality is measured with are not those that the study was begun with; use"
                " those or another study"
            )
        return self.meter.quality(size)

    def _take(
        self, quality: Quality, config: QuantConfig, protocol: Protocol, packed: bool
    ) -> tuple[Tensor, int]:
        """Make images and measure them beside those of full precision, which are kept where the
        configuration is it; the first few (of each video a few frames), and how many of them are a video's.
        """
        conditions = None if self.adapter.kind == "batch_size" else self.adapter.conditions(protocol)
        first, missing, row = list[Tensor](), THUMBNAILS, 1
        with closing(self.batches(config, protocol, packed)) as made:
            for batch, images in made:
                if not config.layers:
                    self._keep(protocol, batch, images)
                full = self._full_batch(protocol, batch) if config.layers else images
                frames = self._frames(images, batch, protocol)
                # of a video each frame shows the same
                shown = None if conditions is None else [conditions[i] for i in batch for _ in range(frames)]
                quality.update(images, full, shown, frames)
                row = min(frames, COLUMNS)
                if missing >= row:
                    first.append(spaced(images, frames)[: missing // row * row])
                    missing -= len(first[-1])
        return torch.cat(first), row

    def _frames(self, images: Tensor, batch: range, protocol: Protocol) -> int:
        """How many of the images that were made belong to each sample; raises AquabitError where the
        objective is one of videos, and these are none."""
        frames = len(images) // len(batch)
        if frames < 2 and protocol.objective == TEMPORAL:
            raise AquabitError(
                f"objective {TEMPORAL} compares consecutive frames, and {type(self.pipe).__name__} made 1"
                " frame a sample; ask for more by --frames, or choose psnr"
            )
        return frames

    def _path(self, protocol: Protocol, batch: range) -> Path:
        return self.bank.folder / f"images-{self.fingerprint}-{protocol.digest}-{batch.start}.safetensors"

    def full_precision(self, protocol: Protocol) -> Tensor:
        """The full-precision images of a protocol, from the bank where they are kept."""
        self._make_full(protocol)
        return torch.cat([self._full_batch(protocol, batch) for batch in self.adapter.batches(protocol)])

    def _make_full(self, protocol: Protocol) -> None:
        """Make the full-precision images of a protocol that the bank does not keep."""
        if self._full[0] != protocol.digest:
            self._full = protocol.digest, {}
        if any(self._stored_batch(protocol, b) is None for b in self.adapter.batches(protocol)):
            with closing(self.batches(QuantConfig(self.fingerprint, {}), protocol)) as made:
                for batch, images in made:
                    self._keep(protocol, batch, images)

    def _full_batch(self, protocol: Protocol, batch: range) -> Tensor:
        images = self._stored_batch(protocol, batch)
        if images is None:
            raise AquabitError(
                f"the full-precision images in {self.bank.folder} went away while they were in use; run the"
                " same command again"
            )
        return images

    def _stored_batch(self, protocol: Protocol, batch: range) -> Tensor | None:
        """Full-precision images from memory or the bank; None where they are missing or damaged. Up to
        FULL_LIMIT bytes stay in memory."""
        cached = self._full[1] if self._full[0] == protocol.digest else {}
        if batch.start not in cached:
            try:
                images = load_file(self._path(protocol, batch))["images"].float()
            except (OSError, SafetensorError, KeyError):
                return None
            if not bool(torch.isfinite(images).all()):
                return None  # of a version that kept what was broken
            if sum(t.nbytes for t in cached.values()) + images.nbytes > FULL_LIMIT:
                return images
            cached[batch.start] = images
        return cached[batch.start]

    def _keep(self, protocol: Protocol, batch: range, images: Tensor) -> None:
        self.bank.write(self._path(protocol, batch), {"images": images.contiguous()})


@contextmanager
def _gradients_pass() -> Iterator[None]:
    """Torch's own words for a backward pass that fails as one sentence; what memory lacks is passed on."""
    try:
        yield
    except RuntimeError as fault:
        if out_of_memory(fault):
            raise
        said = str(fault).split(". ")[0]
        raise AquabitError(f"no gradient passes this denoiser ({said}); search with --rounds 0") from fault


def _cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float((a * b).sum()) / length if length > 0 else 0.0


def _deviation(images: Tensor, reference: Tensor) -> dict[str, Any]:
    change = (images - reference).nan_to_num(nan=1.0)  # images lie in [0, 1]: NaN is as bad as can be
    if change.ndim < 4:  # no images, but other numbers
        coarse = adaptive_avg_pool1d(change.flatten(1)[:, None], min(64, change[0].numel())).flatten(1)
    else:
        coarse = adaptive_avg_pool2d(change.flatten(1, -3), min(8, *change.shape[-2:])).flatten(1)
    return {"damage": float(change.square().mean()), "sketch": sketch(coarse)}


def sketch(change: Tensor) -> list[float]:
    """Deviations [images, pixels] as SKETCH numbers: three quarters a random projection of all of them,
    the rest one of their mean over images (what shifts every image alike); squared lengths are those of
    the deviations, in expectation."""
    generator, parts = torch.Generator().manual_seed(0), []
    for vector, size in ((change.flatten(), SKETCH * 3 // 4), (change.mean(0), SKETCH // 4)):
        projection = torch.randn(size, vector.numel(), generator=generator) / size**0.5
        parts.append(projection @ vector.float() / vector.numel() ** 0.5)
    return [round(float(v), 8) for v in torch.cat(parts)]
