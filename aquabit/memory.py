"""Peak memory of measuring, quantizing and running a model, from its layer graph and one forward on the
meta device."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aquabit.file_memory import LARGE
from aquabit.graph import described_inputs, example_inputs, meta_denoiser, on_meta
from aquabit.graph import layers as graph_layers
from aquabit.scheme import FP, AquabitError, Protocol, QuantConfig, Scheme

NOT_COUNTED = (
    "activations of the VAE, of text encoders and of feature extractors, images, and a GPU's own context"
)
SKETCHED = 8  # images of a backward pass (measuring.evaluator.PROBE_IMAGES)
HELD = 1 << 30  # of layers' inputs and outputs that it holds (measuring.evaluator.HELD_LIMIT)
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# resident in a process that has imported torch, diffusers and what measuring takes (Linux, CPU build: .54
# GB)
LIBRARIES = 550 << 20
DECODED = 256 << 20  # of decoded weights that are kept beside the current ones (quant.model.DECODED_LIMIT)
HEAP = 256 << 20  # of freed activations that the allocator keeps (runtime.reuse_memory)
HESSIANS = 512 << 20  # of all H that are summed up at a time (quant.calibration.calibrator.LIMIT_BYTES)
WIDEST = 18432  # inputs that a full H is kept of (quant.calibration.moments.WIDEST)
H_COPIES = 5.5  # of a layer's H in a calibrated fit, its own too (benchmarks/cost.py memory: 5.0 to 5.2)
FIT_BYTES = 40  # a weight, of the largest layer: its float32 copy and what a scalar fit makes beside it


@dataclass(frozen=True)
class Peak:
    """Bytes of one process at its peak, part by part. ``task`` is "measure", "quantize" or "run packed"."""

    task: str
    dtype: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "dtype": self.dtype, "bytes": self.total, "parts": dict(self.parts)}


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; those of ``known`` storages are not counted."""

    def __init__(self, known: set[int]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _NoScores(TorchFunctionMode):
    """While it lasts torch's attention makes its output alone, as its kernels do, and ours
    (``kernels.attention``: the scores of a block of queries); on the meta device it would hold all scores,
    hundreds of GB for a video."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, _, value = [
                *args,
                *((kwargs or {}).get(k) for k in ("query", "key", "value")[len(args) :]),
            ][:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def memory_of(device: str) -> int:
    """Bytes that there are for all processes: a GPU's memory, or this machine's as far as the container has
    them."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUPS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            found.append(int(Path(path).read_text()))
    return min(found)


def check_measuring(
    graph: nx.DiGraph,
    protocol: Protocol,
    device: str,
    workers: int = 1,
    *,
    gradients: bool = False,
    bound: bool = False,
) -> None:
    """Raise AquabitError where measuring under a protocol takes more than there is, and say what to lower; of
    a protocol that is ``bound`` to a study nothing can be. With ``gradients`` every layer's input and output
    are held too. Nothing is said of a denoiser that does not run on the meta device."""
    try:
        activations = activation_bytes(graph)
    except AquabitError:
        return
    there, gpu = memory_of(device), torch.device(device).type == "cuda"

    def taken(batch: int, workers: int = workers, dtype: str = protocol.dtype) -> int:
        given = replace(protocol, micro_batch=batch, dtype=dtype)
        # on the CPU weights lie in files, whose pages need not stay
        files = 0 if gpu else in_files(graph, BYTES[dtype])
        own = _measuring(graph, given, activations, gradients) - LIBRARIES - files
        return workers * own + (0 if gpu else LIBRARIES * (workers + 1) // 2)  # half of them is shared

    batch = protocol.micro_batch
    if taken(batch) <= there:
        return
    advice = []
    if workers > 1 and taken(batch, 1) <= there:
        fits = next(n for n in range(workers - 1, 0, -1) if taken(batch, n) <= there)
        advice.append(f"lower --workers to {fits}")
    if not bound:
        fitting = [b for b in (2**i for i in range(16)) if b < batch and taken(b) <= there]
        advice += [f"lower --micro-batch to {fitting[-1]}"] if fitting else []
        if protocol.dtype == "float32" and taken(batch, dtype="bfloat16") <= there:
            advice.append("use --dtype bfloat16")
    raise AquabitError(
        f"measuring {batch} images at once takes about {taken(batch) / 1e9:.1f} GB"
        f"{f' in {workers} processes' if workers > 1 else ''}, there are {there / 1e9:.1f} GB;"
        f" {' or '.join(advice) or 'use a machine with more memory'}"
    )


def measuring_bytes(graph: nx.DiGraph, protocol: Protocol, gradients: bool = False) -> int | None:
    """Peak bytes of a process that measures under a protocol, with its libraries; with ``gradients`` every
    layer's input and output are held too. None for a denoiser that does not run on the meta device."""
    try:
        return _measuring(graph, protocol, activation_bytes(graph), gradients)
    except AquabitError:
        return None


def _measuring(graph: nx.DiGraph, protocol: Protocol, activations: int, gradients: bool) -> int:
    branches, dtype = 2 if protocol.guidance != 1.0 else 1, protocol.dtype
    found = {(p.task, p.dtype): p for p in _peaks(graph, protocol.micro_batch * branches, activations)}
    # of gradients: held, or made again step by step
    call = min(protocol.micro_batch, SKETCHED) * branches * layer_bytes(graph)
    held = (call + min(call * protocol.steps, HELD)) * BYTES[dtype] // 4
    # and gradients of weights, of each sample, and weight errors
    weights = 2 * min(HELD, 4 * SKETCHED * int(graph.graph["weights"]))
    return found["measure", dtype].total + (held + weights if gradients else 0)


def check_quantizing(graph: nx.DiGraph, config: QuantConfig, samples: int) -> None:
    """Raise AquabitError where this machine has too little memory for the largest fit, or for a call of the
    denoiser with the ``samples`` that a calibration makes at once, and say what to lower.

    Weights lie in files and need not fit. Nothing is said of a denoiser that does not run on the meta device.
    """
    there, nodes = memory_of("cpu"), graph_layers(graph)
    sizes = {n: prod(nodes[n]["shape"]) for n, c in config.layers.items() if n in nodes and c.weight != FP}
    if not sizes:
        return
    shapes = {n: tuple(nodes[n]["shape"]) for n in sizes}
    taken = {n: fit_bytes(shape, config[n].weight.calibrated) for n, shape in shapes.items()}
    largest = max(taken, key=lambda n: taken[n])
    fit = LIBRARIES + taken[largest]
    if fit > there:
        raise AquabitError(
            f"fitting layer {largest!r} to {config[largest].weight} takes about {fit / 1e9:.1f} GB, there are"
            f" {there / 1e9:.1f} GB; leave it at fp, or use a machine with more memory"
        )
    if not any(config[n].weight.calibrated for n in sizes):
        return
    try:
        call = LIBRARIES + samples * activation_bytes(graph)
    except AquabitError:
        return
    if call > there:
        raise AquabitError(
            f"calibrating with {samples} samples at once takes about {call / 1e9:.1f} GB, there are"
            f" {there / 1e9:.1f} GB; lower the resolution of the configuration's calibration, or use schemes"
            " that are fitted without images, as usq4"
        )


def fit_bytes(shape: tuple[int, ...], calibrated: bool) -> int:
    """Bytes that a fit of a weight [out, in] or [out, in, kh, kw] takes at its peak."""
    width = prod(shape[1:])
    full = calibrated and width <= WIDEST
    return FIT_BYTES * prod(shape) + (int(4 * H_COPIES * width**2) if full else 0)


def in_files(graph: nx.DiGraph, size: int) -> int:
    """Bytes of the weights, ``size`` bytes each, that lie in files while a model is on the CPU."""
    each = (size * prod(node["shape"]) for node in graph_layers(graph).values())
    return sum(found for found in each if found >= LARGE)


def layer_bytes(graph: nx.DiGraph) -> int:
    """Bytes of the float32 inputs and outputs of all layers in one denoiser call with one sample."""
    nodes = graph_layers(graph).values()
    widths = ((int(n["tokens"]), tuple(n["shape"])) for n in nodes)
    return sum(4 * tokens * (shape[0] + shape[1]) for tokens, shape in widths)


def check_images(images: int, size: tuple[int, int] | None) -> None:
    """Raise AquabitError where so many images of a size (pixels) are more than this machine holds."""
    height, width = size or (1, 1)
    taken, there = 2 * images * 3 * height * width * BYTES["float32"], memory_of("cpu")
    if taken > there:
        raise AquabitError(
            f"{images} images of {height} x {width} pixels take about {taken / 1e9:.1f} GB, there are"
            f" {there / 1e9:.1f} GB; lower --images, and make the others with another --seed"
        )


def elements(parts: Iterable[object]) -> int:
    """Elements of the parameters of those parts that are networks."""
    return sum(p.numel() for part in parts if isinstance(part, nn.Module) for p in part.parameters())


def activation_bytes(graph: nx.DiGraph) -> int:
    """Bytes of the float32 activations that are alive together at the worst moment of one denoiser call
    with one sample; of several networks those of the largest."""
    about = graph.graph
    if "parts" not in about:
        return _activation_bytes(about["model_class"], about["config"], about.get("inputs"))
    classes, inputs = about["model_class"].split("+"), about.get("inputs", {})
    rows = zip(classes, about["config"].items(), strict=True)
    return max(_activation_bytes(kind, config, inputs.get(part)) for kind, (part, config) in rows)


def _activation_bytes(model_class: str, config: Mapping[str, Any], described: Any) -> int:
    model = meta_denoiser(model_class, config).eval()
    inputs = described_inputs(described) if described else example_inputs(model)
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def run(inputs: dict[str, Any]) -> int:
        live = _Live(known | {t.untyped_storage()._cdata for t in _tensors(inputs)})
        with torch.no_grad(), torch.device("meta"), live, _NoScores():
            model(**inputs)
        return live.peak

    try:
        return on_meta(inputs, run)
    except Exception as error:  # any exception of the model's own code
        raise AquabitError(f"{model_class} does not run on the meta device: {error}") from error


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def peaks(
    graph: nx.DiGraph, micro_batch: int = 64, guided: bool = False, scheme: str = "usq4h", others: int = 0
) -> list[Peak]:
    """Peaks of each task in each dtype. ``micro_batch`` samples in a denoiser call, twice as many where they
    are ``guided``; ``scheme`` is what all layers are packed to; ``others`` the elements of the pipeline's
    other networks (VAE, text encoders), all of them loaded.

    Counted: libraries, weights (full precision and, while measuring, the current configuration's decoded
    ones), activations, the bank's working set. Not counted: NOT_COUNTED, and of quantizing what lies in files
    (``file_memory``).
    """
    samples = micro_batch * (2 if guided else 1)
    return _peaks(graph, samples, activation_bytes(graph), scheme, others)


def _peaks(
    graph: nx.DiGraph, samples: int, activations: int, scheme: str = "usq4h", others: int = 0
) -> list[Peak]:
    """``peaks`` for ``samples`` in a denoiser call, whose ``activations`` are bytes of one."""
    nodes, parsed = graph_layers(graph).values(), Scheme.parse(scheme)
    weights, rest = int(graph.graph["weights"]), int(graph.graph["other_elements"])
    shapes = [tuple(node["shape"]) for node in nodes]
    coded = sum(sum(parsed.stored_bytes(s)) for s in shapes)
    largest = max(fit_bytes(s, parsed.calibrated) for s in shapes)
    aware = max(fit_bytes(s, True) for s in shapes)
    hessians = [4 * prod(s[1:]) ** 2 for s in shapes if prod(s[1:]) <= WIDEST]
    inputs = max(
        int(node["tokens"]) * prod(s[1:]) // max(1, prod(s[2:]))
        for node, s in zip(nodes, shapes, strict=True)
    )
    activations = samples * (activations + 4 * inputs)  # a layer's rounded input stands beside it
    codes = {f"codes ({scheme}), as stored and as kernels read them": 2 * coded}
    found = []
    for dtype, size in BYTES.items():
        own = {
            "libraries": LIBRARIES,
            "full-precision weights": size * (weights + rest),
            "other networks": size * others,
        }
        # what lies in files, stored codes too, is read as it is needed
        small = {"libraries": LIBRARIES, "small weights": size * (weights + rest) - in_files(graph, size)}
        alive = {"activations": activations * size // 4}
        decoded = {"decoded weights": size * weights, "decoded weights kept": min(DECODED, size * weights)}
        # fits come before, when neither activations nor decoded weights are there
        beyond = aware - sum((*alive.values(), *decoded.values()))
        kept = max(min(HESSIANS, sum(hessians)), beyond, min(HEAP, alive["activations"]))
        resident = {
            "libraries": LIBRARIES,
            "other networks": size * others,
            **codes,
            "other tensors": size * rest,
        }
        found += [
            Peak("measure", dtype, {**own, **alive, **decoded, "H or freed activations kept": kept}),
            Peak("quantize", dtype, {**small, "largest fit": largest}),
            Peak(
                "run packed",
                dtype,
                {**resident, **alive, "freed activations kept": min(HEAP, alive["activations"])},
            ),
        ]
    return found
