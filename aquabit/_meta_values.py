"""Values of whole numbers on the meta device, for models whose sizes depend on data: lengths read from masks,
tokens that are sent to experts."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

MOST = 1 << 22  # elements of a tensor whose values are held


class _OfData(TorchFunctionMode):
    """While it lasts ``torch.tensor`` makes what is to be on the meta device on the CPU first, so that its
    numbers are seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


class MetaValues(TorchDispatchMode):
    """While it lasts whole numbers (and truths) on the meta device have values, held on the CPU: those of
    ``given`` pairs (tensor, values), of what is made of no tensor, and of what is computed from these. So
    their sums, counts and lists are there, and sizes that depend on them.

    Which experts the numbers of a token choose nobody knows here: the indices of ``topk`` count through all
    of them, so that each gets as many tokens.
    """

    def __init__(self, given: Iterable[tuple[Tensor, Tensor]] = ()):
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: Any = WeakTensorKeyDictionary()
        self._changed: set[int] = set()  # storages of values that are known no more
        self._of_data = _OfData()
        for tensor, values in given:
            self._hold(tensor, values)

    def __enter__(self) -> Any:
        self._of_data.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._of_data.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if _is_meta(t)]
        if not all(self._known(t) for t in tensors):
            return self._of_unknown(func, args, kwargs)
        device = kwargs.get("device")
        to_meta = device is not None and torch.device(device).type == "meta"
        if not tensors and not to_meta:
            return func(*args, **kwargs)
        if not tensors:
            return self._made(func, args, kwargs)
        real_args, real_kwargs = tree_map(self._value, (args, kwargs))
        if device is not None:
            real_kwargs["device"] = torch.device("cpu")
        found = func(*real_args, **real_kwargs)
        if device is not None and not to_meta:
            return found  # the values are asked for
        return args[0] if func._schema.is_mutable else self._beside(found, func, args, kwargs)

    def _beside(self, found: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """What the meta device makes of a call (nothing where sizes depend on data), with these values."""
        leaves, form = tree_flatten(found)
        made: list[Any] = []
        with suppress(Exception):  # whatever a kernel of the meta device lacks
            made = tree_leaves(func(*args, **kwargs))
        for i, value in enumerate(leaves):
            if not isinstance(value, Tensor):
                continue
            same = len(made) == len(leaves) and made[i].shape == value.shape
            leaves[i] = made[i] if same else torch.empty(value.shape, dtype=value.dtype, device="meta")
            self._hold(leaves[i], value)
        return tree_unflatten(leaves, form)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is made of no tensor."""
        found = func(*args, **kwargs)
        if isinstance(found, Tensor) and _held(found):
            self._hold(found, func(*args, **{**kwargs, "device": torch.device("cpu")}))
        return found

    def _of_unknown(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Of numbers that nobody knows."""
        found = func(*args, **kwargs)
        if func._schema.is_mutable and _is_meta(args[0]) and self._known(args[0]):
            self._changed.add(self._values[args[0]].untyped_storage()._cdata)
        if func is torch.ops.aten.topk.default and found[1].ndim:
            count = torch.arange(found[1].numel()).remainder(args[0].shape[-1])
            self._hold(found[1], count.reshape(found[1].shape))
        return found

    def _known(self, tensor: Tensor) -> bool:
        value = self._values.get(tensor)
        return value is not None and value.untyped_storage()._cdata not in self._changed

    def _value(self, item: Any) -> Any:
        return self._values[item] if _is_meta(item) else item

    def _hold(self, tensor: Tensor, values: Tensor) -> None:
        if _held(values):
            self._values[tensor] = values


def _is_meta(item: Any) -> bool:
    return isinstance(item, Tensor) and item.device.type == "meta"


def _held(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= MOST
