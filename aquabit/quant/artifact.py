"""Packed artifacts: a model directory as diffusers saves it, whose weights are codes and whose config.json
says how they are to be read.

``config.json`` holds under ``quantization_config`` the quantization configuration, its layers grouped by
scheme; the weights hold ``LAYER.weight.codes``, ``.codebooks``, ``.scale`` and ``.offset`` of every coded
layer, ``codebooks/NAME`` where layers share them, ``ranges/LAYER`` of static activations, ``noise/...`` of a
noise correction, and every other tensor of the model at 16 bits. What is no part of the model keeps its type
on loading, whatever the dtype asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from safetensors import safe_open
from torch import Tensor, nn

from aquabit.file_memory import CopiesInFiles
from aquabit.graph import fixed_layers, is_quantizable, rebuilt, repeated_names, tied_places
from aquabit.graph import layers as layer_nodes
from aquabit.jsonio import digest, read_json, read_object
from aquabit.parts import Parts, own_names, prefixed
from aquabit.quant.bank import owned, weight_hash, weights_folder
from aquabit.quant.correction.sampling import follow_
from aquabit.quant.correction.statistics import Statistics
from aquabit.quant.finetuning.store import PARTS, SHARED, shared_name
from aquabit.quant.layer_facts import facts_of_part
from aquabit.quant.layers import QuantConv2d, QuantLinear, replace_layer_
from aquabit.quant.model import storage_dtype
from aquabit.quant.step_switch import input_parts, settings_of, share_out_, switches
from aquabit.runtime import out_of_memory
from aquabit.scheme import FP, METHOD, AquabitError, QuantConfig

SCHEMA = 2  # of quantization_config; 1 was a file of its own, quantization.json
RANGES = "ranges/"  # before the names of layers whose static ranges are stored
NOISE = "noise/"  # before the names of noise statistics
# beside the configuration: what noise statistics belong to, what an example call takes, which places use
# another layer's weight, and what the layers are
FACTS = ("noise", "inputs", "tied", "layers")
DIGEST = "digest"  # of an artifact, in its quantization_config
OLD = "quantization.json"
# of config.json: what is said elsewhere, or follows from where and by what it was written
NOT_DIGESTED = ("quantization_config", "_name_or_path", "_diffusers_version")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", OLD)  # what a new artifact takes the place of
LARGEST = 1 << 24  # of a number in the config.json of a model: diffusers would build what it says

Layers = dict[str, QuantLinear | QuantConv2d]


@dataclass
class Contents:
    """What a packed denoiser is made of besides the tensors that diffusers knows."""

    config: QuantConfig
    layers: Layers
    ranges: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Statistics | None = None
    inputs: Mapping[str, Any] | None = None  # of an example call, where the class does not tell them
    tied: Mapping[str, str] = field(default_factory=dict)  # places that use another layer's weight
    repeated: Set[str] = frozenset()  # names of the state dict that stand for what another stores
    about: Mapping[str, Any] | None = None  # ``layer_facts``, where the class does not tell an example call

    def of_part(self, part: str) -> Contents:
        """What belongs to one part of a network of several (``Parts``), by the names that it has there."""

        def own(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: values[whole] for whole, name in own_names(part, values).items()}

        return Contents(
            replace(self.config, layers=own(self.config.layers)),
            own(self.layers),
            own(self.ranges),
            None,
            (self.inputs or {}).get(part),
            {name: first.removeprefix(prefixed(part, "")) for name, first in own(self.tied).items()},
            set(own_names(part, self.repeated).values()),
            None if part not in (self.inputs or {}) else facts_of_part(self.about, part),
        )

    @staticmethod
    def joined(parts: Mapping[str, Contents]) -> Contents:
        """The inverse of ``of_part``, as far as running needs it."""

        def every(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
            return {prefixed(part, name): v for part, own in values.items() for name, v in own.items()}

        configs = [found.config for found in parts.values()]
        config = replace(
            configs[0],
            layers=every({part: found.config.layers for part, found in parts.items()}),
            steps=next((config.steps for config in configs if config.steps is not None), None),
        )
        return Contents(
            config,
            every({part: found.layers for part, found in parts.items()}),
            every({part: found.ranges for part, found in parts.items()}),
        )

    def facts(self) -> dict[str, Any]:
        """What ``quantization_config`` holds besides the configuration (FACTS)."""
        return parsed(described(self.config, self.statistics, self.inputs, self.tied, self.about))[1]

    def known(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the denoiser's ``state`` what its class has too: of quantized layers weight and bias."""
        quantized = self.layers.keys() | {n.removesuffix(".weight") for n in self.repeated}
        rows = ((name, name.rpartition("."), tensor) for name, tensor in state.items())
        return {
            n: t for n, (owner, _, leaf), t in rows if owner not in quantized or leaf in ("weight", "bias")
        }

    def tensors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors to store: those of the denoiser's ``state`` at 16 bits, except where layers are
        coded."""
        tensors: dict[str, Tensor] = {}
        coded = {n: weight for n, layer in self.layers.items() if (weight := layer.coded) is not None}
        with CopiesInFiles(weights_folder()):
            for name, tensor in self.known(state).items():
                if name.removesuffix(".weight") not in coded and name not in self.repeated:
                    tensors[name] = tensor.detach().to(storage_dtype(tensor)).contiguous().cpu()
        for name, weight in coded.items():
            shared = shared_name(self.config[name])
            for part, tensor in weight.tensors().items():
                key = shared if shared is not None and part == "codebooks" else f"{name}.weight.{part}"
                tensors[key] = tensor.contiguous().cpu()
        tensors |= {f"{RANGES}{name}": ends.contiguous().cpu() for name, ends in self.ranges.items()}
        if self.statistics is not None:
            tensors |= {f"{NOISE}{k}": v for k, v in self.statistics.tensors()[0].items()}
        return owned(tensors)


def contents_of(denoiser: nn.Module) -> Contents | None:
    """What a packed denoiser is made of; None where it, or one of several, is not packed."""
    if isinstance(denoiser, Parts):
        parts = {name: contents_of(part) for name, part in denoiser.named_children()}
        packed = {name: found for name, found in parts.items() if found is not None}
        return Contents.joined(packed) if len(packed) == len(parts) else None
    found: Contents | None = getattr(getattr(denoiser, "hf_quantizer", None), "contents", None)
    return found


def config_of(denoiser: nn.Module) -> QuantConfig | None:
    """The configuration that a denoiser was packed by; None where it is not packed."""
    found = contents_of(denoiser)
    return None if found is None else found.config


# ---- files


def is_packed(folder: Path) -> bool:
    """Whether a model directory is an artifact; raises AquabitError for one of an earlier version."""
    if (folder / OLD).is_file():
        raise AquabitError(
            f"{folder / OLD} was written by an earlier version of aquabit; run `aquabit quantize` again"
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    described = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(described, dict) or described.get("quant_method") != METHOD:
        return False
    for name, value in config.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise AquabitError(
                f"{folder / 'config.json'}: {name} is out of range; the file may have been changed"
            )
    return True


def was_packed(folder: Path) -> bool:
    """Whether a pipeline's folder was written by this version of aquabit or an earlier one, in whatever state
    its files are now."""
    for part in folder.iterdir():
        if (part / OLD).is_file():
            return True
        with suppress(AquabitError):
            described = read_object(part / "config.json").get("quantization_config")
            if isinstance(described, dict) and described.get("quant_method") == METHOD:
                return True
    return False


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """What diffusers says while it builds a model from files as one sentence that names the folder: its
    classes take what a ``config.json`` holds on trust."""
    try:
        yield
    except AquabitError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise AquabitError(f"{folder} does not fit into memory ({error!s:.200})") from error
        raise AquabitError(
            f"{folder} cannot be read ({type(error).__name__}: {error!s:.200}); a file may be truncated or"
            " changed: copy, download or quantize it again"
        ) from error


def load_packed_denoiser(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A denoiser that runs from its codes, loaded by diffusers; raises AquabitError for missing, truncated
    or inconsistent files."""
    import diffusers

    if not is_packed(folder):
        raise AquabitError(f"{folder} holds no packed denoiser; `aquabit quantize` makes one")
    name = str(read_json(folder / "config.json").get("_class_name"))
    cls: Any = getattr(diffusers, name, None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
    if not known:
        raise AquabitError(f"{folder / 'config.json'}: {name!r} is no model class of diffusers")
    with building(folder):
        denoiser: nn.Module = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return denoiser


def save_packed_denoiser(denoiser: Any, folder: Path, max_shard_size: int | str = "10GB") -> int:
    """Write a packed denoiser into a new component folder; the bytes of its tensors, which are the files'
    size without headers and noise statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    found = contents_of(denoiser)
    assert found is not None
    check_rebuilt(denoiser, found)
    tensors, plain = found.tensors(denoiser.state_dict()), denoiser.config.quantization_config
    hashes = {name: weight_hash(tensor) for name, tensor in tensors.items()}
    model = json.loads(denoiser.to_json_string())  # what diffusers writes
    denoiser.register_to_config(quantization_config={**plain, DIGEST: digest_of(plain, hashes, model)})
    try:
        denoiser.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        denoiser.register_to_config(quantization_config=plain)
    return sum(t.numel() * t.element_size() for k, t in tensors.items() if not k.startswith(NOISE))


def check_rebuilt(denoiser: nn.Module, contents: Contents) -> None:
    """Raise AquabitError where the model that loading will build from the configuration is not the one that
    was packed: layers were replaced, fused, added or put into two places after it was built."""
    model = rebuilt(denoiser)
    if model is None:
        return
    sizes = {name: tuple(t.shape) for name, t in contents.known(denoiser.state_dict()).items()}
    sizes |= {f"{name}.weight": tuple(layer.shape) for name, layer in contents.layers.items()}
    tied = {name: first for name, first in contents.tied.items() if first in contents.layers}
    sizes |= {f"{name}.weight": tuple(contents.layers[first].shape) for name, first in tied.items()}
    built = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    wrong = [name for name in {**sizes, **built} if sizes.get(name) != built.get(name)]
    wrong += sorted(set(contents.repeated) ^ repeated_names(model))
    if wrong:
        raise AquabitError(
            f"{type(denoiser).__name__} was changed after it was built ({wrong[0]}), and its config.json does"
            " not say so: it runs packed, but would not load again; undo that before quantizing, as with"
            " unfuse_qkv_projections()"
        )


# ---- quantization_config


def described(
    config: QuantConfig,
    statistics: Statistics | None = None,
    inputs: Mapping[str, Any] | None = None,
    tied: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A configuration and what goes with it (FACTS) as ``quantization_config`` holds it: layers of equal
    choices are listed together."""
    value = config.to_dict()
    groups: dict[str, dict[str, Any]] = {}
    for name, choice in value.pop("layers").items():
        groups.setdefault(json.dumps(choice), {**choice, "layers": []})["layers"].append(name)
    value |= {"schema": SCHEMA, "groups": list(groups.values())}
    if statistics is not None:
        value["noise"] = json.loads(statistics.tensors()[1]["about"])
    if inputs is not None:
        value["inputs"] = inputs
    if tied:
        value["tied"] = dict(tied)
    if about is not None:
        value["layers"] = dict(about)
    return {"quant_method": METHOD, **value}


def parsed(value: Any) -> tuple[QuantConfig, dict[str, Any]]:
    """The configuration that ``described`` wrote, and those of FACTS that it has; raises AquabitError
    where it is not one."""
    source = "quantization_config"
    if not isinstance(value, Mapping):
        raise AquabitError(f"{source} is {value!r:.60}; it must be an object")
    given = dict(value)
    if given.get("schema") != SCHEMA:
        raise AquabitError(
            f"{source} has schema {given.get('schema')!r}, this version of aquabit reads {SCHEMA}; quantize"
            " again"
        )
    for name in ("quant_method", DIGEST):
        given.pop(name, None)
    facts, groups = {k: given.pop(k) for k in FACTS if k in given}, given.pop("groups", None)
    if not isinstance(groups, list):
        raise AquabitError(f"{source} needs a list of groups of layers, not {groups!s:.60}")
    layers: dict[str, Any] = {}
    for group in groups:
        names = group.get("layers") if isinstance(group, dict) else None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise AquabitError(f"{source} has a group without a list of layers: {group!s:.60}")
        twice = [n for n in names if n in layers]
        if twice:
            raise AquabitError(f"{source} has layer {twice[0]!r} in two groups")
        layers |= {n: {k: v for k, v in group.items() if k != "layers"} for n in names}
    return QuantConfig.from_dict({**given, "schema": 1, "layers": layers}, source), facts


# ---- a digest: what was written is what is read


def digest_of(
    described: Mapping[str, Any], hashes: Mapping[str, str], model: Mapping[str, Any] | None
) -> str:
    """Of an artifact: its configuration, each tensor's name and ``weight_hash``, and the ``config.json`` of
    the model around it (None: as it was before that counted)."""
    own = {k: v for k, v in (model or {}).items() if k not in NOT_DIGESTED}
    return digest([described, sorted(hashes.items()), *([] if model is None else [own])])


def verify(files: Sequence[Path], described: Mapping[str, Any], stated: str | None) -> None:
    """Raise AquabitError where tensors or configuration are not what was written; ``stated`` is the digest,
    None of an artifact that has none: of before there were digests, or saved by diffusers alone."""
    if stated is None:
        return
    hashes: dict[str, str] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            hashes |= {name: weight_hash(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    beside = [path.parent / "config.json" for path in files[:1]]
    models = [read_json(path) for path in beside if path.is_file()]
    if stated not in (digest_of(described, hashes, model) for model in (*models, None)):
        where = next((str(path.parent) for path in files), "the artifact")
        raise AquabitError(
            f"{where} is not what was written: a tensor or the configuration is damaged, or of another model;"
            " quantize again"
        )


# ---- tensors


def is_own(key: str, config: QuantConfig) -> bool:
    """Whether a stored tensor is one that diffusers does not know: codes and what goes with them."""
    layer, _, part = key.rpartition(".weight.")
    return key.startswith((SHARED, RANGES, NOISE)) or (part in PARTS and config[layer].weight != FP)


# ---- a denoiser from them


def place_layers_(
    denoiser: nn.Module, graph: nx.DiGraph, config: QuantConfig, dtypes: Mapping[str, torch.dtype]
) -> Layers:
    """Quantized layers in the place of Linear and Conv2d, those to be coded without a weight yet."""
    nodes, placed, places = layer_nodes(graph), Layers(), tied_places(graph)
    wrong = [n for n in config.layers if n not in nodes]
    if wrong:
        raise AquabitError(f"quantization_config: layer {wrong[0]!r} is not in this model")
    for name, why in fixed_layers(graph).items():
        if config[name].weight != FP:
            raise AquabitError(f"layer {name!r} cannot be {config[name].weight}: {why}; it must be fp")
    # the model reads their weights: they stay as they are, in its dtype
    for name in graph.graph.get("uncalled", ()):
        del nodes[name]
    for name, node in nodes.items():
        placed[name] = layer = replace_layer_(denoiser, name, node.get("split"), places.get(name, ()))
        layer.compute = nn.Parameter(torch.empty(0, dtype=dtypes[name]), requires_grad=False)
        if config[name].weight != FP:
            layer.weight = torch.empty(0, dtype=dtypes[name])
    return placed


def tie_(denoiser: nn.Module, tied: Any) -> None:
    """Let places use the weights of other layers, as they did in the model that was packed; raises
    AquabitError where they are no layers of one shape."""
    if not isinstance(tied, Mapping) or not all(isinstance(n, str) for row in tied.items() for n in row):
        raise AquabitError(f"quantization_config: tied is {tied!r:.60}; it must map names to names of layers")
    modules: dict[str, Any] = dict(denoiser.named_modules(remove_duplicate=False))
    for place, first in tied.items():
        both: list[Any] = [modules.get(name) for name in (place, first)]
        if not all(map(is_quantizable, both)) or both[0].weight.shape != both[1].weight.shape:
            raise AquabitError(
                f"quantization_config: {place!r} and {first!r} share a weight, but in this model they are no"
                " layers of one shape"
            )
        both[0].weight = both[1].weight


def finish_(
    denoiser: nn.Module, graph: nx.DiGraph, layers: Layers, config: QuantConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Activations as the configuration says, once every layer has its weight; the static ranges that they
    use."""
    from aquabit.quant.attention import patch_attention_
    from aquabit.quant.feed_forward import patch_feed_forwards_

    patch_attention_(denoiser)
    patch_feed_forwards_(denoiser)
    attention = {n for n, a in layer_nodes(graph).items() if a.get("attention")}
    ranges = _ranges(config, layers, attention, tensors)
    settings = settings_of(config, layers, attention, ranges)
    share_out_(config, layers, settings)
    follow_(denoiser, None, switches(config, layers, settings))  # the pipeline's scheduler comes later
    denoiser.requires_grad_(False)
    return ranges


def stored_statistics(config: QuantConfig, about: Any, tensors: Mapping[str, Tensor]) -> Statistics | None:
    """The noise statistics of a configuration that is corrected; raises AquabitError where they are
    missing or of another one."""
    if config.correction is None:
        return None
    if about is None:
        raise AquabitError(
            f"this model is to be corrected ({config.correction}), but holds no noise statistics; run"
            " `aquabit quantize --correct` again"
        )
    statistics = Statistics.of(
        {k.removeprefix(NOISE): v.numpy() for k, v in tensors.items() if k.startswith(NOISE)},
        about,
        "this model",
    )
    statistics.check(config.fingerprint, replace(config, correction=None).digest)
    return statistics


def _ranges(
    config: QuantConfig, layers: Layers, attention: set[str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The stored static ranges; raises AquabitError where one is missing or of another shape than the
    configuration asks for."""
    found = {}
    for name, layer in layers.items():
        shape = (config.range_parts(name), input_parts(layer) + (name in attention), 2)
        ends = tensors.get(f"{RANGES}{name}")
        if shape[0] and (ends is None or tuple(ends.shape) != shape or not bool(torch.isfinite(ends).all())):
            raise AquabitError(
                f"layer {name!r} needs static ranges of shape {list(shape)}, which are not stored"
            )
        if ends is not None:
            found[name] = ends
    return found
