"""One call of a denoiser with the autograd graph behind its outputs: of a copy without memory or, where that
cannot run, of the model itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from aquabit.scheme import AquabitError

# what changes from one denoising step to the next
STEP_INPUTS = ("sample", "hidden_states", "x", "timestep", "timesteps", "t")

Watched = Callable[[nn.Module], Mapping[str, list[nn.Module]]]  # name -> the modules that bear it


@dataclasses.dataclass
class Call:
    """One call of ``model`` (the copy, or the denoiser itself) that was followed."""

    model: nn.Module
    outputs: list[torch.Tensor]
    steps: list[torch.Tensor]  # the inputs that change with the step: leaves of the autograd graph
    batch: int
    called: set[str]  # of what was watched
    ungraded: set[str]  # of these, whose outputs have no graph behind them


def follow(denoiser: nn.Module, inputs: Mapping[str, Any], watched: Watched) -> Call:
    """A call with these keyword arguments. First of a deep copy on the meta device, hooks, replaced layers
    and all, in float32 whatever its dtype; where this cannot be made or does not run (sizes that depend on
    data), of the model itself, on its device, which is left as it was.

    Raises AquabitError where neither runs.
    """
    try:
        return _call(meta_copy(denoiser), _marked(inputs, _on_meta), watched, torch.device("meta"))
    except Exception as error:  # any exception of the model's own code, or of its attributes' copying
        device = _device(denoiser)
        if device.type == "meta":
            raise _refused(denoiser, inputs, error) from error
    try:
        with _as_it_is(denoiser), torch.autograd.graph.saved_tensors_hooks(_forgotten, _remembered):
            dtype = getattr(denoiser, "dtype", torch.float32)
            return _call(denoiser, _marked(inputs, lambda t: _real(t, device, dtype)), watched)
    except Exception as error:  # any exception of the model's own code
        raise _refused(denoiser, inputs, error) from error


def _refused(denoiser: nn.Module, inputs: Mapping[str, Any], error: Exception) -> AquabitError:
    return AquabitError(
        f"{type(denoiser).__name__} does not run on the example inputs ({', '.join(inputs)}): {error}"
    )


def _call(
    model: nn.Module,
    marked: tuple[dict[str, Any], list[torch.Tensor], int],
    watched: Watched,
    device: torch.device | None = None,
) -> Call:
    inputs, steps, batch = marked
    called, ungraded, handles = set[str](), set[str](), []

    def see(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            called.add(name)
            if isinstance(output, torch.Tensor) and not output.requires_grad:
                ungraded.add(name)

        return hook

    for name, modules in watched(model).items():
        handles += [module.register_forward_hook(see(name)) for module in modules]
    try:
        with _Uncut(), torch.device(device) if device else _nothing():
            output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Call(model, list(_tensors(output)), steps, batch, called, ungraded)


class _Uncut(TorchFunctionMode):
    """While it lasts ``detach`` and ``no_grad`` cut nothing off: what a model computes inside them is
    followed too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.detach:
            return args[0].view_as(args[0])
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# ---- a copy without memory


class _CopiesOnMeta(TorchFunctionMode):
    """While it lasts deep copies of tensors, whatever holds them, are empty ones on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), _on_meta(tensor))


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """A deep copy whose tensors are empty ones on the meta device, floating-point ones in float32 and its
    parameters requiring gradients, in evaluation mode. A layer that stands in the place of another
    (``plain_layer`` notes it in the memo) is that one again; accelerate's hooks, which move tensors between
    devices, are left behind."""
    memo: dict[int, Any] = {}
    module: Any
    for module in denoiser.modules():
        if hasattr(module, "plain_layer"):
            module.plain_layer(memo)
        # what hangs on a model and computes nothing is shared
        memo |= {id(v): v for k, v in vars(module).items() if k in ("_hf_hook", "hf_quantizer")}
    for parameter in denoiser.parameters():
        memo[id(parameter)] = nn.Parameter(_on_meta(parameter), parameter.is_floating_point())
    with _CopiesOnMeta():
        model = copy.deepcopy(denoiser, memo)
    for module in model.modules():
        if "_hf_hook" in vars(module):
            module.forward = module._old_forward
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.eval()


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


# ---- the model itself


@contextmanager
def _as_it_is(denoiser: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its parameters requiring gradients, for a while."""
    modules: list[Any] = list(denoiser.modules())
    parameters = list(denoiser.parameters())
    training, graded = [m.training for m in modules], [p.requires_grad for p in parameters]
    checkpointed = [m for m in modules if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in modules:
            module.training = False
        for module in checkpointed:
            module.gradient_checkpointing = False
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
        for module, was in zip(modules, training, strict=True):
            module.training = was
        for parameter, was in zip(parameters, graded, strict=True):
            parameter.requires_grad_(was)


def _forgotten(tensor: torch.Tensor) -> torch.Tensor:
    """Nothing is ever sent back: what autograd would keep of a call is dropped."""
    return torch.empty_like(tensor, device="meta")


def _remembered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _real(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """An input as the model takes it; of one that has no data (an example that was made) ones, or zeros of
    whole numbers."""
    if tensor.device.type != "meta":
        return tensor.detach().to(device, copy=True)
    made = torch.ones if tensor.is_floating_point() else torch.zeros
    return made(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device)


def _device(denoiser: nn.Module) -> torch.device:
    first = next(denoiser.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def outline(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a network returns for a call, all numbers zero: none is computed, except where sizes depend on
    data."""
    device, dtype = _device(network), getattr(network, "dtype", torch.float32)

    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.zeros(tensor.shape, dtype=kind, device=device)

    with torch.no_grad():
        try:
            empty = tree_map_only(torch.Tensor, _on_meta, (args, dict(kwargs)))
            with torch.device("meta"):
                found = meta_copy(network)(*empty[0], **empty[1])
        except Exception:  # any exception of the model's own code
            found = network(*args, **kwargs)
    return tree_map_only(torch.Tensor, zeros, found)


# ---- inputs and outputs


def _marked(
    inputs: Mapping[str, Any], move: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, Any], list[torch.Tensor], int]:
    """The inputs, each tensor moved; of those, what changes with the step as leaves to be found again; and
    the batch size."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return move(value)
        if isinstance(value, Mapping):
            return {k: moved(v) for k, v in value.items()}
        return type(value)(moved(v) for v in value) if type(value) in (list, tuple) else value

    found = {name: moved(value) for name, value in inputs.items()}
    holders = [name for name in STEP_INPUTS if any(True for _ in _tensors(found.get(name)))]
    holders = holders or [name for name, value in found.items() if isinstance(value, torch.Tensor)][:1]
    steps = [tensor for name in holders for tensor in _tensors(found[name])]
    for tensor in steps:
        tensor.requires_grad_(tensor.is_floating_point())
    values = [found[name] for name in holders]
    # a list of tensors has one for each sample
    sizes = [len(v) if isinstance(v, list | tuple) else v.shape[0] for v in values if not _flat(v)]
    return found, steps, sizes[0] if sizes else 1


def _flat(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, torch.Tensor) and value.ndim < 2)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
