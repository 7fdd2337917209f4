"""What of a pipeline is quantized: its denoiser, all of them where it has several, or the components that
were asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from aquabit.file_memory import CopiesInFiles
from aquabit.parts import Parts
from aquabit.quant.bank import weights_folder
from aquabit.scheme import AquabitError

DENOISERS = ("denoiser", "transformer", "unet")  # where a pipeline holds its denoiser
NETWORKS = (
    "diffusers.models.transformers",
    "diffusers.models.unets",
)  # and where diffusers has their classes
CHOSEN, HELD = "_aquabit_components", "_aquabit_network"  # attributes of a pipeline


def denoiser_names(pipe: Any) -> list[str]:
    """The attributes that hold denoisers: by their usual names, then by what class of diffusers they are.
    Raises AquabitError where there is none."""
    named = [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
    parts = [name for name, part in getattr(pipe, "config", {}).items() if isinstance(part, tuple | list)]
    found = list(dict.fromkeys([*named, *(n for n in parts if _is_network(getattr(pipe, n, None)))]))
    if not found:
        raise AquabitError(
            f"{type(pipe).__name__} has no denoiser: none of {', '.join(DENOISERS)} is a network"
        )
    return found


def _is_network(part: Any) -> bool:
    """Whether a component is of a class that denoises; an adapter's weights are in the denoiser itself."""
    bases = type(part).__mro__ if isinstance(part, nn.Module) else ()
    return any(b.__module__.startswith(NETWORKS) and b.__name__ != "MotionAdapter" for b in bases)


def denoiser_of(pipe: Any) -> nn.Module:
    """A pipeline's denoiser (of several the first, which tells their sizes); a bare one is its own."""
    module = pipe if isinstance(pipe, nn.Module) else getattr(pipe, denoiser_names(pipe)[0])
    assert isinstance(module, nn.Module)
    return module


def component_names(pipe: Any) -> list[str]:
    """The attributes that hold what is quantized."""
    return list(vars(pipe).get(CHOSEN, ())) or denoiser_names(pipe)


def choose_components_(pipe: DiffusionPipeline, names: Sequence[str]) -> None:
    """Let these components be what is quantized. Raises AquabitError where one is no network of the
    pipeline."""
    there = [n for n, part in pipe.components.items() if isinstance(part, nn.Module)]
    wrong = [name for name in names if name not in there]
    if wrong:
        raise AquabitError(
            f"component {wrong[0]!r} is no network of this {type(pipe).__name__}; it has {', '.join(there)}"
        )
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise AquabitError(f"component {twice[0]!r} is named twice; name each once")
    vars(pipe)[CHOSEN] = tuple(names)


def network_of(pipe: Any) -> nn.Module:
    """What is quantized: a component, or several as ``Parts``, the same object in every call."""
    if isinstance(pipe, nn.Module) or not isinstance(pipe, DiffusionPipeline):
        return denoiser_of(pipe)
    parts = {name: getattr(pipe, name) for name in component_names(pipe)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    held = vars(pipe).get(HELD)
    if held is None or dict(held.named_children()) != parts:
        held = vars(pipe)[HELD] = Parts(parts)
    return held


def copy_network_(pipe: Any) -> None:
    """Give a pipeline what is quantized as a copy of its own."""
    names, network = component_names(pipe), network_of(pipe)
    with CopiesInFiles(weights_folder()):
        own = copy.deepcopy(network)
    vars(pipe).pop(HELD, None)
    if isinstance(own, Parts):
        vars(pipe)[HELD] = own
    parts = dict(own.named_children()) if isinstance(own, Parts) else {names[0]: own}
    vars(pipe).update(parts)


def encoder_names(pipe: Any) -> list[str]:
    """Of what is quantized the components that are no denoisers: they run before, not in every step."""
    if not isinstance(pipe, DiffusionPipeline):
        return []
    denoisers = denoiser_names(pipe)
    return [name for name in component_names(pipe) if name not in denoisers]


def check_steps(
    components: Sequence[str], encoders: Sequence[str], correction: object, steps: object
) -> None:
    """Raise AquabitError where what is quantized (``component_names``, ``encoder_names``) cannot change from
    step to step as a noise correction or groups of steps ask for."""
    if encoders and (correction or steps is not None):
        what = f"correction {correction}" if correction else "what changes between steps"
        raise AquabitError(
            f"{what} needs the sampler's steps, and {encoders[0]} runs before them; leave it out"
        )
    if correction and len(components) > 1:
        raise AquabitError(
            f"correction {correction} follows one denoiser, and {' and '.join(components)} are quantized;"
            " leave it out, or name one of them as the component"
        )
