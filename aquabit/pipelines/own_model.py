"""Model: a denoiser of the user's own with the function that makes images with it; no pipeline, no scheduler,
no configuration."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aquabit._operators import attention_role, block_of
from aquabit.file_memory import CopiesInFiles
from aquabit.graph import layers as layer_nodes
from aquabit.graph import trace as trace_denoiser
from aquabit.pipelines.image_maker import first_inputs
from aquabit.quant.bank import weights_folder
from aquabit.quant.calibration.recording import Call
from aquabit.quant.correction.sampling import refollow_
from aquabit.runtime import out_of_memory
from aquabit.scheme import AquabitError, Protocol
from aquabit.user_code import FAILURES, code_digest, named_function

# what a sample function may take beside the denoiser and the seeds, by name
OPTIONS = ("conditions", "steps", "guidance", "eta", "resolution", "frames")
# of those that change images
OFF: Mapping[str, Any] = {"guidance": 1.0, "eta": 0.0, "resolution": None, "frames": None}
# relative difference (of root mean squares) up to which two images of one seed are the same: batches of
# different sizes round differently; with 16-bit weights, and on GPUs, by more
AGREE, AGREE_ROUGHLY = 1e-3, 5e-2
CHANNELS = (1, 2, 3, 4)  # that images have
NO_CONDITIONS = (
    "{} makes images from conditions; give them to aquabit.Model, or by --prompts FILE with one a line"
)


class CallSteps:
    """The steps of a sampler that has no scheduler, told from the denoiser's calls: call k of n belongs to
    step k * steps // n. Followed as a scheduler is (``quant.correction.sampling``). Its ``name`` is that of
    the sample function, with a digest of its code: images of an edited function never mix with those
    before."""

    def __init__(self, name: str) -> None:
        self.name, self.timesteps = name, range(0)

    def check(self, name: str) -> None:
        """Raise AquabitError where a protocol names another sampler ("default" is this one)."""
        if name in ("default", self.name):
            return
        said = f"scheduler is {name}, but {self.name} is a sampler of its own"
        if name.partition("@")[0] == self.name.partition("@")[0]:
            said = (
                f"the sampler was {name}, and is {self.name} now: its code was changed; use what it was, or"
                " another study"
            )
        raise AquabitError(said)

    def set_timesteps(self, steps: int) -> None:
        """An image, or a batch of them, begins."""
        self.timesteps = range(steps)

    def step(self) -> None:
        """A step has ended."""

    @property
    def followed(self) -> bool:
        """Whether somebody wants to know the steps."""
        return "step" in vars(self)

    @contextmanager
    def counting(self, denoiser: nn.Module, steps: int, calls: int) -> Iterator[None]:
        """While it lasts, the denoiser's ``calls`` calls make ``steps`` steps."""
        self.set_timesteps(steps)
        made, ended = 0, 0

        def called(*_: Any) -> None:
            nonlocal made, ended
            made += 1
            while ended < min(steps, made * steps // calls):
                self.step()
                ended += 1

        handle = denoiser.register_forward_hook(called)
        try:
            yield
        finally:
            handle.remove()


class Model:
    """A denoiser and a function that makes images with it, for every verb in the place of a pipeline.

    ``sample(denoiser, seeds, conditions, steps)`` returns images [n, c, h, w], floats in [0, 1], image i of
    ``seeds[i]`` (whole numbers) and ``conditions[i]`` alone: all noise comes from generators of the seeds.
    It gets ``denoiser`` as its first argument, this one or a copy with other weights, and must call that.
    Beside the seeds it takes what it names: ``conditions``, ``steps``, ``guidance``, ``eta``, ``resolution``
    [pixels], ``frames``; what it does not name is refused where it is asked for. A default of its ``steps``
    is what it is traced with. Gradients pass where it allows them (``torch.no_grad`` as its decorator is left
    out).

    ``conditions``: one an image, repeated in order, where no others are given: texts, or whole numbers
    (classes, or places in a list of the user's). ``layers``: operator types by patterns of layer names, the
    first that matches ({"*.qkv": "self_attn.qkv"}); the others are told by common names. ``images=False``:
    what it makes are no images but any numbers [n, ...] (latents, fields), compared with those of full
    precision and by metrics of the user's own.

    Raises AquabitError for a function of another form, and for conditions and patterns that are none.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        sample: Callable[..., Any],
        conditions: Sequence[str | int] | None = None,
        layers: Mapping[str, str] | None = None,
        images: bool = True,
    ):
        if not isinstance(denoiser, nn.Module):
            raise AquabitError(f"the denoiser is a {type(denoiser).__name__}; it must be a torch.nn.Module")
        self.denoiser, self.sample, self.images = denoiser, sample, images
        self.name = getattr(sample, "__name__", type(sample).__name__)
        self.takes, self.usual_steps = _parameters(sample, self.name)
        self.conditions = None if conditions is None else _listed(conditions)
        if self.conditions is not None and "conditions" not in self.takes:
            raise AquabitError(
                f"conditions are given, but {self.name} takes none; name conditions among its parameters"
            )
        self.layers = dict(layers or {})
        self.scheduler = CallSteps(f"{self.name}@{code_digest(below_no_grad(sample))}")
        self._calls: dict[tuple[tuple[str, Any], ...], int] = {}  # of the denoiser, by options
        self._shapes: dict[int | None, tuple[int, ...]] = {}  # of an image, by resolution

    def copied(self) -> Model:
        """The same with a denoiser of its own. Raises AquabitError where that cannot be copied."""
        own = copy.copy(self)
        own.scheduler = CallSteps(self.scheduler.name)
        try:
            with CopiesInFiles(weights_folder()):
                own.denoiser = copy.deepcopy(self.denoiser)
        except (TypeError, RuntimeError) as error:
            raise AquabitError(
                f"the denoiser {type(self.denoiser).__name__} cannot be copied ({error!s:.200}); it must be a"
                " module that copy.deepcopy takes"
            ) from error
        return own

    def __call__(
        self, seeds: Sequence[int], conditions: Sequence[str | int] | None = None, **options: Any
    ) -> Tensor:
        """The images of some seeds; options (``steps``, ...) as the function takes them."""
        every = self.conditions if conditions is None else _listed(conditions)
        seeds = _seeds(seeds)
        here = None if every is None else [every[i % len(every)] for i in range(len(seeds))]
        unknown = [k for k in options if k not in self.takes]
        if unknown:
            raise AquabitError(f"{self.name} takes no {unknown[0]}; it takes {', '.join(sorted(self.takes))}")
        with torch.no_grad(), evaluating(self.denoiser):
            return self.run(seeds, here, self._usual() | options)

    def _usual(self) -> dict[str, Any]:
        """The options that its function is given where nothing is asked for."""
        return {k: v for k, v in {**OFF, "steps": self.usual_steps}.items() if k in self.takes}

    def run(
        self,
        seeds: Sequence[int],
        conditions: Sequence[str | int] | None,
        options: Mapping[str, Any],
        gradients: bool = False,
        chance: int = 0,
    ) -> Tensor:
        """What the function makes, checked for its form; who follows the sampler is told its steps.
        ``chance``: what is drawn from no generator of its seeds is drawn otherwise.

        Raises AquabitError for what the function raises, and where it does not call the denoiser.
        """
        refollow_(self.denoiser, self.scheduler)
        key = tuple(sorted(options.items()))
        if self.scheduler.followed and key not in self._calls:
            # by a run that nobody sees: who follows is to be told the steps from the first call on
            first = None if conditions is None else conditions[:1]
            with _unhooked(self.denoiser), torch.no_grad():
                self._made(seeds[:1], first, options)
        return self._made(seeds, conditions, options, gradients, chance)

    def _made(
        self,
        seeds: Sequence[int],
        conditions: Sequence[str | int] | None,
        options: Mapping[str, Any],
        gradients: bool = False,
        chance: int = 0,
    ) -> Tensor:
        key, made, given = tuple(sorted(options.items())), 0, dict(options)
        calls = self._calls.get(key)  # not known: nobody is told the steps
        steps = self.scheduler.counting(self.denoiser, options.get("steps", calls), calls) if calls else None
        if "conditions" in self.takes:
            if conditions is None:
                raise AquabitError(NO_CONDITIONS.format(self.name))
            given["conditions"] = list(conditions)

        def called(*_: Any) -> None:
            nonlocal made
            made += 1

        counter = self.denoiser.register_forward_hook(called)
        try:
            with self._said(len(seeds), gradients), torch.random.fork_rng():
                torch.manual_seed(seeds[0] + chance)
                with steps or nullcontext():
                    sample = below_no_grad(self.sample) if gradients else self.sample
                    found = sample(self.denoiser, list(seeds), **given)
        finally:
            counter.remove()
        if not made:
            raise AquabitError(
                f"{self.name} never calls the denoiser that it is given as its first argument; it must make"
                " its images with that one, which may be a copy of yours with other weights"
            )
        self._calls[key] = made
        return self._formed(found, len(seeds), options.get("resolution"))

    def _formed(self, found: Any, count: int, resolution: int | None) -> Tensor:
        """What was made as a tensor; raises AquabitError where it has not one row of numbers a seed."""
        wanted = "[n, c, h, w]" if self.images else "[n, ...]"
        found = _from_numpy(found) if isinstance(found, np.ndarray) else found
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = f"{found.dtype} numbers" if hasattr(found, "dtype") else type(found).__name__
            raise AquabitError(f"{self.name} returned {kind}; expected a tensor {wanted} of floats")
        if found.is_meta or found.layout != torch.strided:
            what = "on the meta device, which holds no numbers" if found.is_meta else f"of {found.layout}"
            raise AquabitError(f"{self.name} returned a tensor {what}; expected a dense one {wanted}")
        shape = tuple(found.shape)
        if shape[:1] != (count,) or not found.numel() or (self.images and len(shape) != 4):
            raise AquabitError(
                f"{self.name} returned shape {list(shape)} for {count} seeds; expected {wanted} with n ="
                f" {count}"
            )
        if self.images and shape[3] in CHANNELS and shape[1] not in CHANNELS:
            raise AquabitError(
                f"{self.name} returned shape {list(shape)}, whose channels seem to be last; expected"
                f" {wanted}, as images.permute(0, 3, 1, 2) has it"
            )
        if resolution is not None and shape[-2:] != (resolution, resolution):
            raise AquabitError(
                f"resolution is {resolution}, but {self.name} made {shape[-2]} x {shape[-1]} pixels"
            )
        known = self._shapes.setdefault(resolution, shape[1:])
        if known != shape[1:]:
            raise AquabitError(
                f"{self.name} returned shape {list(shape)}, and {[count, *known]} before; all must have one"
            )
        return found

    @contextmanager
    def _said(self, count: int, gradients: bool) -> Iterator[None]:
        """What the user's function raises as one sentence; where gradients are asked for, torch's own words
        are passed on: they say that none pass."""
        try:
            yield
        except AquabitError:
            raise
        except FAILURES as error:
            if out_of_memory(error):
                raise AquabitError(
                    f"out of memory while {self.name} made {count} images at once; lower --micro-batch"
                ) from error
            if gradients and isinstance(error, RuntimeError):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}, line {frame.lineno}"
            raise AquabitError(
                f"{self.name} failed while it made {count} images ({where}: {type(error).__name__}:"
                f" {error!s:.300})"
            ) from error

    def size(self, resolution: int | None = None) -> tuple[int, int] | None:
        """Height and width of its images; None of what is no image. One is made where none was before."""
        if not self.images:
            return None
        if resolution not in self._shapes:
            options = self._usual() | ({} if resolution is None else {"resolution": resolution})
            first = self.conditions[:1] if self.conditions else ("",)
            with torch.no_grad(), evaluating(self.denoiser):
                made = self.run([0], first, options)
            self._shapes[resolution] = tuple(made.shape[1:])
        height, width = self._shapes[resolution][-2:]
        return height, width

    def settled(self, protocol: Protocol) -> Protocol:
        """A protocol that says all that images depend on: this sampler, its conditions, and its steps where
        it does not take them. Raises AquabitError for another sampler, or other steps."""
        self.scheduler.check(protocol.scheduler)
        conditions = protocol.conditions or self.conditions
        protocol = replace(protocol, scheduler=self.scheduler.name, conditions=conditions)
        if "steps" in self.takes:
            return protocol
        adapter = OwnAdapter(self)
        with torch.no_grad(), evaluating(self.denoiser):
            adapter.images(replace(protocol, images=1, micro_batch=1), range(1))
        own = self._calls[tuple(sorted(adapter.options(protocol).items()))]
        if protocol.steps not in (own, Protocol.steps):
            raise AquabitError(
                f"steps are {protocol.steps}, but {self.name} takes none: it calls the denoiser {own} times;"
                " leave them out, or name steps among its parameters"
            )
        return replace(protocol, steps=own)

    def trace(self) -> nx.DiGraph:
        """The denoiser's layer graph, traced with the inputs of its own first call; operator types as
        ``layers`` says. Raises AquabitError for a pattern that matches no layer."""
        adapter = OwnAdapter(self)
        conditions = ("",) if self.conditions is None and "conditions" in self.takes else None
        asked = Protocol(images=1, micro_batch=1, steps=self.usual_steps, conditions=conditions)
        with evaluating(self.denoiser):
            args, kwargs = adapter.first_inputs(asked)
        names = inspect.signature(self.denoiser.forward).parameters
        graph = trace_denoiser(self.denoiser, {**dict(zip(names, args, strict=False)), **kwargs})
        unused = set(self.layers)
        for name, node in layer_nodes(graph).items():
            pattern = next((p for p in self.layers if fnmatch.fnmatchcase(name, p)), None)
            if pattern is not None:
                unused.discard(pattern)
                kind = self.layers[pattern]
                node |= {"operator": kind, "block": block_of(name, kind), "attention": attention_role(kind)}
        if unused:
            first = next(iter(layer_nodes(graph)))
            raise AquabitError(
                f"layers: {min(unused)!r} matches no layer that an earlier pattern leaves, as {first!r}"
            )
        return graph


def _parameters(sample: Any, name: str) -> tuple[frozenset[str], int]:
    """Which OPTIONS a sample function takes, and its usual steps; raises AquabitError for one of another
    form."""
    form = "sample(denoiser, seeds, conditions, steps)"
    if not callable(sample):
        raise AquabitError(f"sample is a {type(sample).__name__}; it must be a function {form}")
    try:
        every = list(inspect.signature(sample).parameters.values())
    except (TypeError, ValueError) as error:
        raise AquabitError(f"the parameters of {name} cannot be read; give a function {form}") from error
    places = [p for p in every if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 2:
        raise AquabitError(f"{name} takes {len(places)} arguments by place; it must be a function {form}")
    rest = [p for p in every if p not in places[:2] and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for p in rest:
        if p.name not in OPTIONS and p.default is p.empty:
            raise AquabitError(
                f"{name} needs {p.name!r}, which aquabit does not give; beside the denoiser and the seeds it"
                f" gives {', '.join(OPTIONS)}, by name: give {p.name!r} a default"
            )
        if p.name in OPTIONS and p.kind == p.POSITIONAL_ONLY:
            raise AquabitError(f"{name} takes {p.name!r} by place alone; it is given by name")
    usual = next((p.default for p in rest if p.name == "steps"), Protocol.steps)
    taken = frozenset(p.name for p in rest if p.name in OPTIONS)
    return taken, usual if isinstance(usual, int) else Protocol.steps


def _listed(conditions: Any) -> tuple[str | int, ...]:
    """Conditions as texts or whole numbers; raises AquabitError for others, and for none."""
    if isinstance(conditions, str) or not hasattr(conditions, "__iter__"):
        raise AquabitError(f"conditions are {conditions!r:.60}; give a list of texts or of whole numbers")
    found = [c if isinstance(c, str) else _whole(c) for c in conditions]
    if not found or len({type(c) for c in found}) != 1:
        raise AquabitError(
            "conditions are texts and whole numbers mixed; give one kind" if found else "conditions are empty"
        )
    return tuple(found)


def _seeds(given: Any) -> list[int]:
    try:
        found = [operator.index(seed) for seed in given]
    except TypeError:
        found = []
    if not found:
        raise AquabitError(f"seeds are {given!r:.60}; give a list of whole numbers, one an image")
    return found


def _from_numpy(found: np.ndarray) -> Any:
    """An array as a tensor, whatever its strides and its order of bytes; what torch has no floats for as it
    is."""
    native = found.dtype.newbyteorder("=")
    if native not in (np.float16, np.float32, np.float64):
        return found
    return torch.from_numpy(np.ascontiguousarray(found, native))


def _whole(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise AquabitError(
            f"condition {value!r:.60} is no text or whole number; number what you condition on, and look it"
            " up in your function"
        ) from error


@contextmanager
def evaluating(denoiser: nn.Module) -> Iterator[None]:
    """A denoiser in evaluation mode for a while, and each of its modules as it was afterwards."""
    before = [(module, module.training) for module in denoiser.modules()]
    denoiser.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _unhooked(denoiser: nn.Module) -> Iterator[None]:
    """Nothing is told of a denoiser's calls for a while."""
    names, before = ("_forward_hooks", "_forward_pre_hooks"), []
    for module in denoiser.modules():
        before.append((module, {name: getattr(module, name) for name in names}))
        module.__dict__.update({name: type(getattr(module, name))() for name in names})
    try:
        yield
    finally:
        for module, hooks in before:
            module.__dict__.update(hooks)


def below_no_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without the torch.no_grad or torch.inference_mode that decorates it."""
    code = getattr(function, "__code__", None)
    while (
        code is not None and code.co_filename.endswith("_contextlib.py") and code.co_name.startswith("deco")
    ):
        function = cast(Any, function).__wrapped__
        code = getattr(function, "__code__", None)
    return function


def unnamed(graph: nx.DiGraph) -> list[str]:
    """What is to be said of layers whose operator type neither the user's patterns nor common names tell."""
    names = [name for name, node in layer_nodes(graph).items() if node["operator"] == "other"]
    if not names:
        return []
    return [
        f"{len(names)} of {len(layer_nodes(graph))} layers, as {names[0]!r}, are of no known operator type;"
        " give aquabit.Model layers={pattern: type} to tell them apart"
    ]


class OwnAdapter:
    """Makes images with a ``Model`` (see ``image_maker.ImageMaker``)."""

    makes_videos = False

    def __init__(self, model: Model):
        self.pipe, self.makes_images = model, model.images
        if "conditions" not in model.takes:
            self.kind = "batch_size"
        else:
            numbers = model.conditions is not None and isinstance(model.conditions[0], int)
            self.kind = "class_labels" if numbers else "prompt"

    @property
    def network(self) -> nn.Module:
        return self.pipe.denoiser

    def conditions(self, protocol: Protocol) -> list[Any]:
        """One condition an image, repeated in order: the protocol's, else the model's own. Raises
        AquabitError where there are none, and for what is no number where the model's own are."""
        given: Sequence[Any] | None = protocol.conditions or self.pipe.conditions
        if self.kind == "batch_size":
            return [None] * protocol.images
        if given is None:
            raise AquabitError(NO_CONDITIONS.format(self.pipe.name))
        if self.kind == "class_labels":
            given = [self._number(c) for c in given]
        return [given[i % len(given)] for i in range(protocol.images)]

    def _number(self, condition: Any) -> int:
        text = str(condition).strip()
        if not text.removeprefix("-").isdecimal():
            raise AquabitError(f"condition {text!r} is no whole number, as those of {self.pipe.name} are")
        return int(text)

    def check(self, protocol: Protocol) -> None:
        """Raise AquabitError for what the sample function does not take."""
        self.check_taken(protocol)

    def check_taken(self, protocol: Protocol) -> None:
        """The same; nothing is run."""
        name, takes = self.pipe.name, self.pipe.takes
        for option, off in OFF.items():
            value = getattr(protocol, option)
            if value != off and option not in takes:
                raise AquabitError(
                    f"{option} is {value:g}, but {name} takes no {option}; leave it out, or name it among its"
                    " parameters"
                )
        if protocol.conditions is not None and self.kind == "batch_size":
            raise AquabitError(f"{name} takes no conditions; give no prompts or classes")
        for option in ("inputs", "strength"):
            if getattr(protocol, option) is not None:
                raise AquabitError(
                    f"{option} are for pipelines of diffusers that take pictures, and {name} is a function of"
                    " yours; give it what it needs by its conditions"
                )
        self.pipe.scheduler.check(protocol.scheduler)

    def options(self, protocol: Protocol) -> dict[str, Any]:
        """What the sample function is given by name, conditions aside."""
        return {k: getattr(protocol, k) for k in OPTIONS[1:] if k in self.pipe.takes}

    def batches(self, protocol: Protocol) -> list[range]:
        size = protocol.micro_batch
        return [range(i, min(i + size, protocol.images)) for i in range(0, protocol.images, size)]

    def alone(self, protocol: Protocol) -> bool:
        """It makes a micro-batch."""
        return False

    def first_step(self, protocol: Protocol) -> int:
        """All run."""
        return 0

    def calls(self, protocol: Protocol) -> int:
        """Steps of a micro-batch that all images take."""
        return protocol.steps * len(self.batches(protocol))

    def images(self, protocol: Protocol, indices: range, gradients: bool = False) -> Tensor:
        """The images of some indices as one micro-batch, padded to its full size; with ``gradients`` as they
        come. Raises AquabitError for what the model does not take, and for what its function raises."""
        self.check(protocol)
        padded = [*indices, *[indices[-1]] * (protocol.micro_batch - len(indices))]
        conditions = self.conditions(protocol)
        seeds, here = [protocol.seed + i for i in padded], [conditions[i] for i in padded]
        with torch.set_grad_enabled(gradients):
            found = self.pipe.run(seeds, here, self.options(protocol), gradients)[: len(indices)]
        return found if gradients else found.detach().float().cpu()

    def first_inputs(self, protocol: Protocol) -> Call:
        first = self.batches(protocol)[0]
        found = first_inputs(self.network, lambda: self.images(protocol, first))
        assert found is not None  # a run without a call raises
        return found

    def first_call(self, protocol: Protocol) -> Callable[[], object]:
        args, kwargs = self.first_inputs(protocol)
        denoiser = self.network

        def call() -> object:
            with torch.no_grad():
                return denoiser(*args, **kwargs)

        return call

    def step_call(self, protocol: Protocol) -> Callable[[], object]:
        return self.first_call(protocol)

    def reference(self) -> None:
        """It names no real images; --reference does."""


def named_model(name: str, device: str | torch.device, dtype: torch.dtype) -> Model:
    """The Model that ``module:function`` returns, its denoiser on a device and in a dtype; this runs the
    user's code. Raises AquabitError where it returns none."""
    function, _ = named_function(name, "model")
    try:
        found = function()
    except AquabitError:
        raise
    except FAILURES as error:  # whatever the user's function does
        raise AquabitError(f"model {name!r} failed ({type(error).__name__}: {error})") from error
    if not isinstance(found, Model):
        raise AquabitError(
            f"model {name!r} returned a {type(found).__name__}; the function must return an aquabit.Model"
        )
    empty = [n for n, p in found.denoiser.named_parameters() if p.is_meta or is_lazy(p)]
    if empty:
        raise AquabitError(
            f"model {name!r} has a denoiser whose parameter {empty[0]!r} holds no numbers (it is on the meta"
            " device, or of a lazy module that was never called); give it its weights first"
        )
    found.denoiser.to(device)
    if any(p.is_floating_point() and p.dtype != dtype for p in found.denoiser.parameters()):
        found.denoiser.to(dtype)
    return found


def check_sampler(model: Model, protocol: Protocol) -> None:
    """Make a few images again, and again beside others; raises AquabitError where the function returns
    numbers outside [0, 1], ignores its seeds, guidance or eta, is not deterministic, or makes images that
    depend on the batch that they are in."""
    adapter = OwnAdapter(model)
    adapter.check(protocol)
    options, name, seed = adapter.options(protocol), model.name, protocol.seed
    asked = adapter.conditions(replace(protocol, images=2))
    weights = [p for p in model.denoiser.parameters() if p.is_floating_point()]
    exact = not weights or all(p.is_cpu and p.dtype in (torch.float32, torch.float64) for p in weights)
    limit = AGREE if exact else AGREE_ROUGHLY

    def made(seeds: Sequence[int], conditions: Sequence[Any], chance: int = 0, **other: Any) -> Tensor:
        with torch.no_grad(), evaluating(model.denoiser):
            return model.run(seeds, conditions, options | other, chance=chance).detach().float().cpu()

    first = made([seed, seed + 1], asked)
    if not bool(first.isfinite().all()):
        raise AquabitError(f"{name} makes numbers that are NaN or infinite in full precision")
    low, high = float(first.min()), float(first.max())
    if model.images and not -1e-6 <= low <= high <= 1 + 1e-6:
        raise AquabitError(
            f"{name} makes values in [{low:.4g}, {high:.4g}]; images must lie in [0, 1] (clamp them, and map"
            " [-1, 1] by x / 2 + 1 / 2), or give aquabit.Model images=False and a metric of your own"
        )
    if _apart(made([seed, seed + 1], asked, chance=7_919), first) > limit:
        raise AquabitError(
            f"{name}, called twice with the same seeds, makes other images; draw all noise from generators of"
            " the seeds, as torch.Generator().manual_seed(seed)"
        )
    beside = made([seed + 2, seed, seed], [asked[0], *asked])
    if _apart(beside[1], first[0]) > limit:
        raise AquabitError(
            f"{name} makes another image of a seed where other images stand beside it; an image must depend"
            " on its own seed and condition alone (noise of a generator for each seed, no statistics over the"
            " batch)"
        )
    if _apart(beside[0], first[0]) <= limit * 1e-2:
        raise AquabitError(f"{name} ignores its seeds: two of them make the same image")
    for option in ("guidance", "eta"):
        value = options.get(option, OFF[option])
        if value != OFF[option] and torch.equal(
            made([seed, seed + 1], asked, **{option: OFF[option]}), first
        ):
            raise AquabitError(f"{option} is {value:g}, but {name} makes the same images without it")


def _apart(a: Tensor, b: Tensor) -> float:
    """Root mean square difference, relative to how far ``b`` spreads."""
    spread = float((b - b.mean()).square().mean().sqrt())
    return float((a - b).square().mean().sqrt()) / max(spread, 1e-12)
