"""QuantLinear and QuantConv2d: layers whose weight is dense (decoded) or packed, and whose activations are
fake-quantized.

In dense mode gradients pass through: to the weight, and to the input as if it were not rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from aquabit.graph import is_quantizable
from aquabit.kernels import Accuracy, codebook_conv2d, codebook_linear, fake_quantize_static, straight_through
from aquabit.kernels.arranged import Arranged
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.direct import Direct
from aquabit.kernels.dispatch import conv2d_request, device_of, format_held, held, linear_request
from aquabit.kernels.functions import Function
from aquabit.kernels.geometry import Geometry, padded
from aquabit.kernels.registry import numbered
from aquabit.kernels.request import Request
from aquabit.quant.lora import LowRank
from aquabit.scheme import FP, AquabitError, Rounding, Scheme, act_code, act_text

Range = tuple[float, float]  # the smallest and the largest value of a static quantizer


class Setting(NamedTuple):
    """How a layer's activations are quantized in a step: how its input and its output are rounded, and their
    ranges where those are static (two of an input with ``split``)."""

    act: Rounding = 16
    act_output: Rounding = 16
    ranges: tuple[Range, ...] | None = None
    range_output: Range | None = None


class _QuantLayer(nn.Module):
    """State that both kinds share.

    ``act`` says how the layer's input is rounded (16 = off), ``act_output`` its output (Q, K and V),
    ``split`` the channel where a concatenated skip begins: then the input has two ranges. ``ranges`` and
    ``range_output`` are those of static quantizers (None: each token or sample has its own), ``shares`` the
    activation bits that the layer has while sampling, by share of the steps. In dense mode ``weight`` is a
    tensor of the original shape; in packed mode ``packed`` is the coded weight as kernels read it and
    ``weight`` an empty tensor that carries dtype and device only. ``dense`` is a decoded copy beside it,
    which memory=auto keeps where it saves time.

    The tensors of the coded weight are parameters of the layer, so that whatever counts, moves or offloads
    parameters does so with them; casts leave them as they are.
    """

    weight: Tensor
    bias: Tensor | None
    _direct: Direct | None  # calls by the shortest way; whatever is set on the layer ends it

    def __init__(self, weight: Tensor, bias: Tensor | None, split: int | None = None):
        super().__init__()
        self.shape, self.split, self.scheme = tuple(weight.shape), split, FP
        self.act: Rounding = 16
        self.act_output: Rounding = 16
        self.ranges: tuple[Range, ...] | None = None
        self.range_output: Range | None = None
        self.shares: dict[Rounding, float] = {}
        self.accuracy: Accuracy = "fast"
        self._packed: CodebookWeight | Arranged | None = None
        self._shared: Tensor | None = None  # codebooks that other layers hold, too, as they are to be
        self.dense: Tensor | None = None
        # of no elements and in no file: models and pipelines ask the first parameter what to compute in
        self.compute = nn.Parameter(weight.detach().new_empty(0), requires_grad=False)
        self.branches: list[LowRank] = []  # LoRAs beside the weight
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_direct"] = None
        super().__setattr__(name, value)

    def _directly(self, x: Tensor, function: Function | None = None) -> Tensor | None:
        """What the layer makes of x, or of what ``function`` makes of it, where a kernel serves it by itself;
        None elsewhere."""
        own = self.__dict__
        codes, bias, direct = own["_parameters"].get("codes"), own["_buffers"].get("bias"), own["_direct"]
        if direct is None or direct.weight.codes is not codes or direct.bias is not bias:
            direct = own["_direct"] = self._direct_calls()
            if direct is None or direct.weight.codes is not codes:
                return None
        if own["branches"]:
            return None
        y: Tensor | None = direct(x, function)
        return y

    def _direct_calls(self) -> Direct | None:
        """The layer's calls; None where more than a kernel has to do with them, or something is to be said
        against the setting."""
        weight, more = self._packed, (self.ranges, self.range_output, self._shared, self.dense)
        if not isinstance(weight, Arranged) or any(part is not None for part in more):
            return None
        sound = min(act_code(self.act), act_code(self.act_output)) > 1 and self.accuracy in ("fast", "exact")
        if not sound or "bias" not in self._buffers:
            return None
        return Direct(weight, self._buffers["bias"], self._request, self._output_rounding())

    def _request(self, x: Tensor) -> Request | None:
        """What kernels are asked for an input; None for one that does not fit."""
        raise NotImplementedError

    def _output_rounding(self) -> Rounding:
        return 16

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if f"{prefix}compute" in missing:
            missing.remove(f"{prefix}compute")
        self._hold_(self._packed)  # what kernels made of the tensors before is no longer true

    @property
    def packed(self) -> CodebookWeight | Arranged | None:
        """The coded weight as it is to be run, None in dense mode: of the layer's parameters, which
        accelerate replaces by others on the device while the layer runs."""
        found, own = self._packed, self._parameters
        if found is None or torch.compiler.is_compiling() or found.held_codes is own["codes"]:
            return found
        here = found.holding({name: own[name] for name in found.tensors()})  # type: ignore[misc]
        if device_of(here) == device_of(found):
            self._packed = here
        return here

    def _hold_(self, weight: CodebookWeight | Arranged | None) -> None:
        """Make a coded weight the layer's own, its tensors the layer's parameters."""
        for name in () if self._packed is None else self._packed.tensors():
            del self._parameters[name]
        self._packed = None
        if weight is not None:
            own = {name: _parameter(tensor) for name, tensor in weight.tensors().items()}
            self._packed = numbered(weight.holding(own))
            self._parameters.update(own)

    def set_activations_(self, setting: Setting) -> None:
        self.act, self.act_output, self.ranges, self.range_output = setting

    def kernel_acts(self) -> dict[Rounding, float]:
        """The roundings that kernels are asked for, by share of the steps: 16 where ranges are
        static, since then they read what is rounded already."""
        return {16: 1} if self.ranges is not None else self.shares or {self.act: 1}

    def quantized_output(self, y: Tensor) -> Tensor:
        """An output [..., out] as what follows reads it."""
        if self.range_output is None:
            return straight_through(y, self.act_output, "token")
        return fake_quantize_static(y, self.act_output, *self.range_output)

    def plain_layer(self, memo: dict[int, Any]) -> nn.Module:
        """The layer that this one stands in the place of, on the meta device; ``memo`` (by id) keeps it."""
        if id(self) not in memo:
            memo[id(self)] = _hooked(_plain(self), self)
        found: nn.Module = memo[id(self)]
        return found

    @property
    def coded(self) -> CodebookWeight | None:
        """The weight as it is stored, restored from what the kernels read; None in dense mode."""
        return self._packed.restore() if isinstance(self._packed, Arranged) else self._packed

    def set_dense_(self, weight: Tensor, scheme: Scheme) -> None:
        self._hold_(None)
        self.dense, self.weight, self.scheme = None, weight, scheme

    def set_packed_(self, coded: CodebookWeight | Arranged, scheme: Scheme) -> None:
        """Run from the coded tensors, arranged for the kernels; the dense weight is dropped."""
        self.set_coded_(coded, scheme)
        self.arrange_()

    def set_coded_(self, coded: CodebookWeight | Arranged, scheme: Scheme) -> None:
        """Hold the coded tensors as they are, until ``arrange_``; the dense weight is dropped."""
        self.weight = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        self._hold_(coded)
        self.dense, self.scheme = None, scheme

    def arrange_(self) -> None:
        """Lay the coded weight, where there is one, out as the kernels read it."""
        if self._packed is not None:
            self._hold_(held(self._packed))
            self._remember_()

    def _remember_(self) -> None:
        codebooks = None if self._packed is None or not self.scheme.shared else self._packed.codebook_values
        self._shared = None if codebooks is None else codebooks.detach()

    def _check_shared(self, packed: CodebookWeight | Arranged) -> None:
        """Raise AquabitError where shared codebooks were lost: diffusers writes each group of layers to disk
        after it has emptied the tensors of those before."""
        if torch.compiler.is_compiling():
            return
        kept, there = self._shared, packed.codebook_values
        if kept is None or there is None:
            return
        same = kept.untyped_storage()._cdata == there.untyped_storage()._cdata
        if not same and not torch.equal(kept, there.to(kept.device)):
            raise AquabitError(
                f"codebooks of {self.scheme}, which several layers share, were lost in offloading to disk;"
                " offload to memory, without offload_to_disk_path"
            )

    def keep_dense_(self, dtype: torch.dtype | None) -> None:
        """Keep a decoded copy of the coded weight in ``dtype``; None drops it."""
        coded = None if dtype is None else self.coded
        self.dense = None if coded is None else coded.dequantize().to(dtype)

    def shrink_(self, dtype: torch.dtype = torch.float16) -> None:
        """Keep the bias, and a weight that is not coded, at 16 bits; both are widened as they are used."""
        self.bias = None if self.bias is None else self.bias.to(dtype)
        if self.packed is None:  # else it is what says what to compute in
            self.weight = self.weight.to(dtype)

    def dense_for(self, x: Tensor) -> Tensor | None:
        alike = self.dense is not None and self.dense.dtype == x.dtype and self.dense.device == x.device
        return self.dense if alike else None

    def resident(self) -> list[Tensor]:
        """The tensors that the layer's weight and bias hold in memory; layers may share some."""
        parts: list[Tensor | None] = [self.weight, self.bias, self.dense]
        if self._packed is not None:
            parts += self._packed.tensors().values()
        if isinstance(self._packed, Arranged):  # what kernels made of it
            parts += [t for made in self._packed.derived.values() for t in made.tensors()]
        parts += [t for part in self.branches for t in (part.down, part.up)]
        return [t for t in parts if t is not None]

    def extra_repr(self) -> str:
        return (
            f"{'x'.join(map(str, self.shape))}, {self.scheme}, {act_text(self.act)},"
            f" {'dense' if self.packed is None else 'packed'}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_direct": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["_direct"] = None
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._packed is not None:  # a copy is a weight of its own to the kernels
            numbered(self._packed)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        own = set() if self._packed is None else {id(t) for t in self._packed.tensors().values()}
        was = self.compute.device

        def keeping(tensor: Tensor) -> Tensor:  # codes and tables keep their dtype: only the device moves
            made: Tensor = fn(tensor)
            kept = id(tensor) not in own or made.dtype == tensor.dtype
            return made if kept else tensor.to(made.device)

        super()._apply(keeping, recurse)  # type: ignore[no-untyped-call]
        self._packed = self.packed  # on the meta device parameters are other objects
        self._remember_()
        device = self.compute.device
        if device != was and isinstance(self._packed, Arranged):
            self._packed.derived.clear()  # what kernels of the other device made of it
        self.branches = [p.to(device) for p in self.branches]
        self.dense = None if self.dense is None else self.dense.to(device)
        return self


_parameters: Any = WeakIdKeyDictionary()  # tensors -> the parameters of them: layers may share both


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    found: nn.Parameter = _parameters.setdefault(tensor, nn.Parameter(tensor, requires_grad=False))
    return found


def resident_bytes(layers: Iterable[_QuantLayer]) -> int:
    """Bytes that weights and biases of layers hold in memory, what they share once."""
    storages = {
        s.data_ptr(): s.nbytes()
        for layer in layers
        for t in layer.resident()
        if (s := t.untyped_storage()).nbytes()
    }
    return sum(storages.values())


class QuantLinear(_QuantLayer):
    """x [..., in] -> [..., out]; activations per token (the last dimension)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, split: int | None = None):
        super().__init__(weight, bias, split)
        self.out_features, self.in_features = weight.shape

    def quantized_input(self, x: Tensor, act: Rounding) -> Tensor:
        """x [..., in] as the layer reads it at ``act`` (16: x itself)."""
        if self.ranges is None:
            return straight_through(x, act, "token")
        return fake_quantize_static(x, act, *self.ranges[0])

    def forward(self, input: Tensor, *_: object, place: Tied | None = None) -> Tensor:
        """``input`` as torch names it; ``place`` is what calls where that is another layer with this one's
        weight."""
        if torch.compiler.is_compiling():
            return self._product(input, place)
        with torch._C.DisableTorchFunction():  # an attention's mode would be asked at each step in here
            y = self._directly(input) if place is None else None
            return self._product(input, place) if y is None else y

    def after(self, function: Function, x: Tensor) -> Tensor | None:
        """What the layer makes of ``function`` of x, where one kernel does both; None elsewhere."""
        with torch._C.DisableTorchFunction():
            return self._directly(x, function)

    def _request(self, x: Tensor) -> Request | None:
        weight = self._packed
        if not isinstance(weight, Arranged) or not x.ndim or x.shape[-1] != self.in_features:
            return None
        return linear_request(x, format_held(weight), self.accuracy, self.act)

    def _output_rounding(self) -> Rounding:
        return self.act_output

    def _product(self, x: Tensor, place: Tied | None) -> Tensor:
        given, beside, packed = x, self.branches if place is None else [], self.packed
        act, bias = self.act, _bias_for(x, (place or self).bias, packed is not None)
        if packed is None or self.ranges is not None:  # kernels know dynamic ranges only
            x, act = self.quantized_input(x, act), 16
        if packed is not None and self._shared is not None:
            self._check_shared(packed)
        if packed is None:
            y = functional.linear(x, self.weight.to(x.dtype), bias)
        else:
            y = codebook_linear(x, packed, bias, self.accuracy, act=act, dense=self.dense_for(x))
        y = self.quantized_output(y)
        for part in beside:
            y = y + part.linear(given)
        return y


class QuantConv2d(_QuantLayer):
    """x [n, cin, h, w] -> [n, cout, h', w']; activations per sample with zero in the range, so that
    padding is exact."""

    def __init__(self, weight: Tensor, bias: Tensor | None, split: int | None, like: nn.Conv2d):
        super().__init__(weight, bias, split)
        self.out_channels, self.in_channels = like.out_channels, like.in_channels
        self.stride = pair(like.stride)
        self.padding = _padding(like.padding)
        self.dilation = pair(like.dilation)
        self.groups = like.groups
        self.kernel_size = like.kernel_size

    def quantized_input(self, x: Tensor, act: Rounding) -> Tensor:
        """x [n, cin, h, w] as the layer reads it at ``act`` (16: x itself)."""
        if self.ranges is None:
            return straight_through(x, act, "sample", self.split)
        parts = (x,) if self.split is None else (x[:, : self.split], x[:, self.split :])
        rounded = [
            fake_quantize_static(part, act, *ends) for part, ends in zip(parts, self.ranges, strict=True)
        ]
        return rounded[0] if len(rounded) == 1 else torch.cat(rounded, 1)

    def forward(self, input: Tensor, *_: object, place: Tied | None = None) -> Tensor:
        """``input`` as torch names it; ``place`` is what calls where that is another layer with this one's
        weight."""
        if place is None and not torch.compiler.is_compiling():
            with torch._C.DisableTorchFunction():
                y = self._directly(input)
            if y is not None:
                return y
        return self._product(input, place)

    def _request(self, x: Tensor) -> Request | None:
        weight = self._packed
        if not isinstance(weight, Arranged) or x.ndim != 4 or x.shape[1] != self.in_channels:
            return None
        filled, edges = padded(x, self.padding, self.stride, self.dilation, self.kernel_size)
        geometry = Geometry(self.stride, edges, self.dilation, self.groups)
        divided = self.split is None or 0 < self.split < self.in_channels
        if filled is not x or not divided or min(geometry.output(x.shape[2:], self.kernel_size)) < 1:
            return None
        return conv2d_request(x, format_held(weight), geometry, self.accuracy, self.act, self.split)

    def _product(self, x: Tensor, place: Tied | None) -> Tensor:
        given, beside, packed = x, self.branches if place is None else [], self.packed
        act, bias = self.act, _bias_for(x, (place or self).bias, packed is not None)
        geometry: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        if packed is None or self.ranges is not None:
            x, act = self.quantized_input(x, act), 16
        if packed is not None and self._shared is not None:
            self._check_shared(packed)
        if packed is None:
            y = functional.conv2d(x, self.weight.to(x.dtype), bias, *geometry)
        else:
            coded = (x, packed, bias, *geometry, self.accuracy)
            y = codebook_conv2d(*coded, act=act, split=self.split, dense=self.dense_for(x))
        for part in beside:
            y = y + part.conv2d(given, *geometry)
        return y


def _bias_for(x: Tensor, bias: Tensor | None, coded: bool) -> Tensor | None:
    """A bias in the dtype of x; as it is kept where compiled code calls a kernel with it: what prepares the
    kernel's calls knows it by its identity, and widens it."""
    if bias is None or (coded and torch.compiler.is_compiling()):
        return bias
    return bias.to(x.dtype)


def _padding(values: str | tuple[int, ...]) -> str | tuple[int, int]:
    return values if isinstance(values, str) else pair(values)


def pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _plain(layer: Any) -> nn.Module:
    """A Linear or Conv2d of the same shape, without memory."""
    bias = layer.bias is not None
    if isinstance(layer, QuantLinear):
        return nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    return nn.Conv2d(layer.in_channels, layer.out_channels, *sizes, bias, device="meta")


class Tied(nn.Module):
    """A layer that has its weight, and all that goes with it, from another (``layer``): it runs from that
    one's codes, with a bias of its own."""

    bias: Tensor | None

    def __init__(self, layer: QuantLinear | QuantConv2d, bias: Tensor | None):
        super().__init__()
        self.__dict__["layer"] = layer  # no part of this one: its tensors are stored and moved once
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def layer(self) -> QuantLinear | QuantConv2d:
        found: QuantLinear | QuantConv2d = self.__dict__["layer"]
        return found

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def plain_layer(self, memo: dict[int, Any]) -> nn.Module:
        """As that of a quantized layer."""
        if id(self) not in memo:
            memo[id(self)] = plain = _hooked(_plain(self.layer), self)
            plain.weight = self.layer.plain_layer(memo).weight
            own = None if self.bias is None else nn.Parameter(torch.empty_like(self.bias, device="meta"))
            plain.register_parameter("bias", own)
        found: nn.Module = memo[id(self)]
        return found

    def forward(self, input: Tensor, *_: object) -> Tensor:
        y: Tensor = self.layer(input, place=self)
        return y


def quant_layer(module: Any, split: int | None = None) -> QuantLinear | QuantConv2d:
    """The quantizable counterpart of a Linear or Conv2d; it shares the weight's storage."""
    if isinstance(module, nn.Conv2d):
        return QuantConv2d(module.weight, module.bias, split, module)
    return QuantLinear(module.weight, module.bias, split)


def check_layer(network: nn.Module, name: str, node: Mapping[str, Any]) -> None:
    """Raise AquabitError where a model's layer is not the one that a graph has under its name."""
    try:
        module = network.get_submodule(name)
    except AttributeError as error:
        raise AquabitError(f"the model has no layer {name!r}; the graph belongs to another model") from error
    shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
    if not (isinstance(module, _QuantLayer) or is_quantizable(module)) or shape != tuple(node["shape"]):
        raise AquabitError(
            f"layer {name!r} is a {type(module).__name__} of {list(shape)}, in the graph a"
            f" {node['kind']} layer of {list(node['shape'])}; trace the model as it is now"
        )


M = TypeVar("M", bound=nn.Module)
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _hooked(module: M, like: nn.Module) -> M:
    """A module with the hooks of the one that it replaces, to be removed by the same handles."""
    vars(module).update({name: vars(like)[name] for name in HOOKS})
    return module


def replace_layer_(
    network: nn.Module, name: str, split: int | None, tied: Iterable[str] = ()
) -> QuantLinear | QuantConv2d:
    """Put its quantizable counterpart in the place of a layer, and return it; the places in ``tied``, which
    use its weight, run from it. Hooks stay."""
    module = network.get_submodule(name)
    layer = _hooked(quant_layer(module, split), module)
    _put(network, name, layer)
    for place in tied:
        other: Any = network.get_submodule(place)
        if other is not layer:  # else it is in a part that stands in two places itself
            _put(network, place, layer if other is module else _hooked(Tied(layer, other.bias), other))
    return layer


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, layer)


def plain_layers_(network: nn.Module) -> None:
    """Put Linear and Conv2d in the place of quantized layers: of the decoded weights, LoRAs beside them
    fused, in the dtype that each computes in."""
    plain = dict[int, Any]()
    layers = {
        n: m for n, m in network.named_modules(remove_duplicate=False) if isinstance(m, _QuantLayer | Tied)
    }
    for name, layer in sorted(layers.items(), key=lambda item: isinstance(item[1], Tied)):
        if id(layer) not in plain:
            plain[id(layer)] = made = _hooked(
                _plain(layer.layer if isinstance(layer, Tied) else layer), layer
            )
            own: Any = layer.bias
            if isinstance(layer, Tied):
                made.weight = plain[id(layer.layer)].weight
            else:
                made.weight = nn.Parameter(_decoded(layer), requires_grad=False)
            bias = None if own is None else own.to(made.weight.dtype)
            made.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        _put(network, name, plain[id(layer)])


def _decoded(layer: _QuantLayer) -> Tensor:
    coded = layer.coded
    weight = layer.weight if coded is None else coded.dequantize()
    for part in layer.branches:
        weight = weight.float() + part.delta().to(weight.device)
    return weight.to(layer.compute.dtype)
