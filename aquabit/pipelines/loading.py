"""load: a diffusers pipeline from a bundled name, a directory (dense or packed), a hub id, or an object."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from aquabit.file_memory import CopiesInFiles
from aquabit.jsonio import read_json
from aquabit.parts import Parts
from aquabit.pipelines.class_conditional import ClassConditionalPipeline
from aquabit.pipelines.class_latent import ClassEmbedder, ClassLatentPipeline
from aquabit.pipelines.family import scheduler_of
from aquabit.pipelines.lora import fuse_loras_
from aquabit.pipelines.network import DENOISERS, choose_components_, network_of
from aquabit.pipelines.own_model import Model, named_model
from aquabit.pipelines.prompts import can_reload
from aquabit.pipelines.reference import Reference, component_list, file_and_scale
from aquabit.pipelines.single_files import FILES, denoiser_of_file, holds_a_pipeline
from aquabit.pipelines.weights_files import check_complete, origin
from aquabit.quality import real_images
from aquabit.quant.bank import weights_folder
from aquabit.runtime import out_of_memory
from aquabit.scheme import AquabitError
from aquabit.user_code import names_function

BUNDLED = Path(__file__).parent / "bundled"
# diffusers does not know these
OWN_PIPELINES: Mapping[str, Any] = {c.__name__: c for c in (ClassConditionalPipeline, ClassLatentPipeline)}
OWN_COMPONENTS: Mapping[str, Any] = {ClassEmbedder.__name__: ClassEmbedder}


def bundled_models() -> list[str]:
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def bundled_facts() -> list[dict[str, Any]]:
    """Name, denoiser's class and bytes of each bundled model, and what it was trained on."""
    found = []
    for name in bundled_models():
        index = read_json(BUNDLED / name / "model_index.json")
        weights = next((BUNDLED / name / "denoiser").glob("*.safetensors"))
        facts = {"name": name, "denoiser": index["denoiser"][1], "bytes": weights.stat().st_size}
        found.append({**facts, "trained_on": real_images(index["real_images"]).title})
    return found


def load(
    model: str | Path | DiffusionPipeline | Model,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "float32",
    offload: bool = False,
    *,
    variant: str | None = None,
    base: str | Path | None = None,
    loras: Sequence[str] = (),
    component: str | None = None,
    into: Model | None = None,
) -> Any:
    """The pipeline that ``model`` names, on a device and in a dtype; a packed artifact comes back running
    packed. ``module:function`` runs that function, which returns a ``Model`` of the user's own.

    ``variant`` ("fp16") names the files of a folder or hub id that are meant. ``model`` may be a file of
    weights (.safetensors, .gguf): of a denoiser, or of a whole pipeline where ``from_single_file`` of its
    class reads it; ``base`` is the pipeline that it belongs to, for its configs and all that the file lacks.
    GGUF is taken as the full precision of what it decodes to. ``loras`` ("FILE" or "FILE:SCALE") are fused
    with its weights. ``component`` ("text_encoder", "transformer,text_encoder_2") is what is quantized of a
    pipeline, else its denoisers; of a pipeline in memory a copy with that choice comes back, which shares its
    networks. All of these may stand in ``model``, as in "org/name?variant=fp16&lora=FILE:0.8".
    ``into``: the model of the user's own that ``model``, a folder, is a packed artifact of; a copy of it then
    runs from the codes. ``offload``: components wait on the CPU and are on the GPU only while they run.
    Raises AquabitError for an unknown name, a folder that is no pipeline or lacks components, files that are
    damaged or do not fit, a hub that does not give the model, and a device that is not there.
    """
    if isinstance(model, DiffusionPipeline | Model):
        if variant is not None or base is not None or loras:
            raise AquabitError("variant, base and loras say what is loaded, and this model is loaded already")
        if into is not None:
            raise AquabitError("into is for the folder of a packed artifact; the model given is in memory")
        if offload:
            raise AquabitError("offload says how a model is loaded, and this one is loaded already")
        return model if component is None else _chosen(copy.copy(model), component_list(component))
    if into is not None:
        return _packed_into(into, Path(model))
    check_device(device, offload)
    dtype = _dtype(dtype)
    reference = Reference.parse(str(model)).with_(
        variant, None if base is None else str(base), loras, component
    )
    if reference.loras or reference.components:
        pipe = load(replace(reference, loras=(), components=()).text, device, dtype)
        if reference.loras:
            fuse_loras_(pipe, [file_and_scale(lora) for lora in reference.loras])
        if reference.components:
            _chosen(pipe, reference.components)
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        return pipe
    name, variant = reference.model, reference.variant
    if names_function(name):
        if offload or reference.text != name:
            raise AquabitError(
                f"{name} is a model of your own, which has no variant and is not offloaded; leave these out"
            )
        return named_model(name, device, dtype)
    folder = BUNDLED / name if name in bundled_models() else Path(name)
    if folder.is_file():
        if variant is not None:
            raise AquabitError(f"variant {variant!r} names files of a folder, and {folder} is a file")
        return _bound(_from_file(folder, reference.base, dtype, device), reference, dtype, device, offload)
    if reference.base is not None:
        raise AquabitError(f"base is the pipeline of a file of weights, and there is no file {name}")
    if folder.is_dir():
        own = Reference(str(folder), variant)
        return _bound(_from_folder(folder, dtype, device, variant), own, dtype, device, offload)
    if folder.suffix in FILES:
        raise AquabitError(f"there is no file {folder}")
    if name.count("/") != 1 or folder.is_absolute() or name.startswith((".", "~")):
        raise AquabitError(
            f"unknown model {name!r}; bundled are {', '.join(bundled_models())}, else give a diffusers"
            " directory, a hub id, a file of weights (.safetensors, .gguf), or module:function for a model of"
            " your own"
        )
    pipe = _guarded(
        name, lambda: DiffusionPipeline.from_pretrained(name, dtype=dtype, variant=variant), device
    )
    return _bound(pipe, reference, dtype, device, offload)


def _chosen(pipe: Any, components: Sequence[str]) -> Any:
    """The pipeline, of which these components are quantized from now on."""
    if isinstance(pipe, Model):
        raise AquabitError(
            f"component {', '.join(components)} is one of a pipeline, and this is a model of your own; its"
            " denoiser is what is quantized"
        )
    choose_components_(pipe, components)
    return pipe


def sources_of(model: str | Path | DiffusionPipeline | Model) -> set[str]:
    """Where a pipeline and its components were loaded from: folders, of which some may not be there (ids of
    the hub, and what diffusers and transformers remember of other machines)."""
    if isinstance(model, Model) or names_function(str(model)):
        return set()
    if not isinstance(model, DiffusionPipeline):
        named = Reference.parse(str(model))
        places = (named.model, named.base, *(file_and_scale(lora)[0] for lora in named.loras))
        return {str(BUNDLED / p if p in bundled_models() else p) for p in places if p is not None}
    origins = (origin(part) for part in (model, *model.components.values()))
    return {name for name in origins if name is not None}


def _packed_into(model: Model, folder: Path) -> Model:
    """A copy of a model of the user's own that runs from the codes of an artifact, on the model's device."""
    from aquabit.quant.bare_artifact import load_bare_denoiser_

    if not isinstance(model, Model):
        raise AquabitError(f"into is a {type(model).__name__}; it must be the aquabit.Model of {folder}")
    own = model.copied()
    load_bare_denoiser_(own.denoiser.eval(), folder)
    return own


def check_device(device: str | torch.device, offload: bool = False) -> None:
    """Raise AquabitError for a device that this machine does not have, and for offloading from none."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise AquabitError(
            f"device {str(device)!r} is unknown; use cpu, or cuda or cuda:1 on a GPU"
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise AquabitError(
            f"device {str(device)!r} is not available: torch {torch.__version__} sees no GPU;"
            " use --device cpu"
        )
    if offload and kind == "cpu":
        raise AquabitError(
            "offload lets components wait on the CPU while others run on a GPU, and the device is cpu; use"
            " --device cuda"
        )


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if isinstance(dtype, str) and dtype not in known:
        raise AquabitError(f"dtype {dtype!r} is unknown; it must be one of {', '.join(known)}")
    return known[dtype] if isinstance(dtype, str) else dtype


def _index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its class and components."""
    index = folder / "model_index.json"
    if not index.exists():
        from aquabit.quant.bare_artifact import is_bare

        if is_bare(folder):
            raise AquabitError(
                f"{folder} holds the packed denoiser of a model of one's own, and not the model: give it too,"
                " load(folder, into=model) or --model module:function"
            )
        raise AquabitError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    described = read_json(index)
    if not isinstance(described, dict) or not isinstance(described.get("_class_name"), str):
        raise AquabitError(f"{index} names no pipeline class (_class_name)")
    return described


def _components(described: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (library, class) of the components that are there."""
    pairs = ((k, v) for k, v in described.items() if isinstance(v, list | tuple) and len(v) == 2)
    return {k: (str(v[0]), v[1]) for k, v in pairs if isinstance(v[1], str)}


def _from_folder(
    folder: Path, dtype: torch.dtype, device: str | torch.device, variant: str | None = None
) -> DiffusionPipeline:
    described = _index(folder)
    components = _components(described)
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise AquabitError(
            f"{folder} lacks components that its model_index.json names: {', '.join(missing)}; copy or"
            " download them too"
        )
    from aquabit.quant.artifact import is_packed
    from aquabit.quant.packed_encoder import load_packed_encoder

    packed = [name for name in components if is_packed(folder / name)]  # refuses those of earlier versions
    encoders = [name for name in packed if components[name][0] == "transformers"]
    cls: Any = OWN_PIPELINES.get(described["_class_name"], DiffusionPipeline)

    def loaded() -> Any:
        own = {
            k: OWN_COMPONENTS[c].from_pretrained(folder / k, dtype=dtype)
            for k, (_, c) in components.items()
            if c in OWN_COMPONENTS
        } | {k: load_packed_encoder(folder / k, components[k][1], dtype) for k in encoders}
        return cls.from_pretrained(folder, dtype=dtype, variant=variant, use_safetensors=True, **own)

    return _guarded(str(folder), loaded, device)


def _from_file(
    file: Path, base: str | None, dtype: torch.dtype, device: str | torch.device
) -> DiffusionPipeline:
    """The pipeline of a file of weights, with what it lacks from ``base``."""
    if file.suffix not in FILES:
        raise AquabitError(
            f"{file} is no file of weights that is read ({', '.join(FILES)}); a .ckpt holds code: save its"
            " tensors as .safetensors, and one of LDM-4 becomes a pipeline by `aquabit convert`"
        )
    if base is None:
        raise AquabitError(
            f"{file} holds weights alone; give the pipeline that they belong to by --base: a diffusers folder"
            " or a hub id"
        )
    place = BUNDLED / base if base in bundled_models() else Path(base)

    def loaded() -> Any:
        described = _index(place) if place.is_dir() else dict(DiffusionPipeline.load_config(base))
        cls = _diffusers_class(described["_class_name"])
        if file.suffix != ".gguf" and holds_a_pipeline(file):
            if not hasattr(cls, "from_single_file"):
                raise AquabitError(f"{cls.__name__} does not read whole pipelines from one file, as {file}")
            return cls.from_single_file(str(file), config=str(place), dtype=dtype)
        components = _components(described)
        name = next((n for n in DENOISERS if n in components), None)
        if name is None:
            raise AquabitError(f"{base} names no denoiser: none of {', '.join(DENOISERS)}")
        denoiser = denoiser_of_file(file, _diffusers_class(components[name][1]), place, name, dtype)
        return cls.from_pretrained(place, dtype=dtype, use_safetensors=True, **{name: denoiser})

    return _guarded(str(file), loaded, device)


def _diffusers_class(name: str) -> Any:
    found = OWN_PIPELINES.get(name) or getattr(diffusers, name, None)
    if not isinstance(found, type):
        raise AquabitError(f"{name} is no class of diffusers {diffusers.__version__}")
    return found


def _bound(
    pipe: DiffusionPipeline, source: Reference, dtype: torch.dtype, device: str | torch.device, offload: bool
) -> DiffusionPipeline:
    """A loaded pipeline on its device; its text encoders can come again, and what a packed denoiser does
    while sampling follows the scheduler."""
    from aquabit.quant.artifact import contents_of
    from aquabit.quant.correction.corrector import corrected_
    from aquabit.quant.correction.sampling import follow_, refollow_, unfollow_parts_

    can_reload(pipe, _reloader(pipe, source, dtype, device))
    packed = [name for name, part in pipe.components.items() if contents_of(part) is not None]
    if packed:
        choose_components_(pipe, packed)
        network = network_of(pipe)
        if isinstance(network, Parts):  # their watchers take part together
            follow_(network, scheduler_of(pipe), unfollow_parts_(network))
        refollow_(network, scheduler_of(pipe))
        found = contents_of(network)
        if found is not None and found.statistics is not None:
            corrected_(network, scheduler_of(pipe), found.statistics, found.config.correction)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe if packed and str(device) == "cpu" else pipe.to(device)


def _reloader(
    pipe: DiffusionPipeline, source: Reference, dtype: torch.dtype, device: str | torch.device
) -> Callable[[], Mapping[str, Any]]:
    """What loads a pipeline's text encoders, and nothing else, again; it does not hold the pipeline."""
    from aquabit.quant.artifact import contents_of

    cls: Any = type(pipe)
    parts = pipe.components.items()
    encoders = [n for n, part in parts if n.startswith("text_encoder") and contents_of(part) is None]
    others = {name: None for name in pipe.components if name not in encoders}
    whole = source.base or source.model
    place = str(BUNDLED / whole) if whole in bundled_models() else whole

    def reload() -> Mapping[str, Any]:
        def loaded() -> Any:
            return cls.from_pretrained(place, dtype=dtype, variant=source.variant, **others)

        again = _guarded(source.text, loaded, device)
        return {name: getattr(again, name) for name in encoders}

    return reload


def _guarded(name: str, loader: Callable[[], Any], device: str | torch.device) -> Any:
    """The loaded pipeline, without diffusers' own bars and warnings; failures as one sentence.

    What stays on the CPU may be larger than memory: weights that are used as they are stored are mapped from
    the model's own files, which is safetensors' doing, and others are converted into files, one by one.
    """
    stays = torch.device(device).type == "cpu"
    try:
        with _silence(), _copies_in_files() if stays else nullcontext():
            pipe = loader()
    except AquabitError:
        raise
    except (
        Exception
    ) as error:  # diffusers, safetensors and the hub raise many types: all mean that it cannot be loaded
        raise AquabitError(_reason(name, error)) from error
    try:
        with _silence():
            check_complete(pipe)
    except AquabitError as error:
        raise AquabitError(f"{name}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _copies_in_files() -> Iterator[None]:
    """``CopiesInFiles`` while a library loads; transformers then converts in this thread, which is its
    variable's doing."""
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with CopiesInFiles(weights_folder()):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def _silence() -> Iterator[None]:
    """No bars and warnings of diffusers and, where it is installed, transformers (then diffusers has
    imported it)."""
    found = sys.modules.get("transformers")
    libraries = [logging, *([] if found is None else [found.utils.logging])]
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    for each in libraries:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, (level, bars) in zip(libraries, before, strict=True):
            each.set_verbosity(level)
            if bars:
                each.enable_progress_bar()


_GATED = ("GatedRepoError",)
_UNKNOWN = ("RepositoryNotFoundError", "RevisionNotFoundError")
_UNREACHABLE = (
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "ConnectionError",
    "ProxyError",
)


def _reason(name: str, error: BaseException) -> str:
    """Why a pipeline could not be loaded and what to do, from the kinds of the error and of those behind
    it."""
    behind = list(_chain(error))
    kinds = {base.__name__ for e in behind for base in type(e).__mro__}
    if any(out_of_memory(e) for e in behind):
        return (
            f"out of memory while {name} was loaded; use --dtype bfloat16, fewer --workers, or a machine with"
            " more"
        )
    if kinds.intersection(_GATED):
        return (
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth"
            " login`"
        )
    if kinds.intersection(_UNKNOWN):
        return (
            f"{name} is not on the hub, or it is private; look for a typing error, or log in with `hf auth"
            " login`"
        )
    if kinds.intersection(_UNREACHABLE) and not Path(name).is_dir():
        return f"the hub cannot be reached and {name} is not in its cache; connect, or give a folder"
    first = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{name} cannot be loaded as a diffusers pipeline:"
        f" {first if len(first) < 300 else first[:297] + '...'}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
