"""Parts: several components of a pipeline as one network, so that one graph, one budget and one configuration
hold them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


class Parts(nn.Module):
    """Components of a pipeline by name; their layers are named PART.LAYER.

    The pipeline calls each of them itself. A call of this module names the part first:
    ``parts("transformer_2", *args, **kwargs)``; so hooks see the calls of all parts, and can make them again.
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, part: str, *args: Any, **kwargs: Any) -> Any:
        return self._modules[part](*args, **kwargs)  # type: ignore[misc]

    def register_forward_pre_hook(self, hook: Any, *, with_kwargs: bool = False, **options: Any) -> Any:
        return _Handles(
            part.register_forward_pre_hook(_Named(self, name, hook, with_kwargs), with_kwargs=True, **options)
            for name, part in self.named_children()
        )

    def register_forward_hook(self, hook: Any, *, with_kwargs: bool = False, **options: Any) -> Any:
        return _Handles(
            part.register_forward_hook(_Named(self, name, hook, with_kwargs), with_kwargs=True, **options)
            for name, part in self.named_children()
        )


@dataclass(frozen=True)
class _Named:
    """A hook of one part that is called as a hook of the whole. An object and no closure, so that a deep copy
    of the whole has hooks of its own."""

    whole: Parts
    part: str
    hook: Callable[..., Any]
    with_kwargs: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        given = ((self.part, *args), kwargs) if self.with_kwargs else ((self.part, *args),)
        return self.hook(self.whole, *given, *output)


class _Handles:
    """The handles of a hook on every part."""

    def __init__(self, handles: Iterable[Any]):
        self._handles = list(handles)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """What a pipeline calls of a network: its parts by name, or itself under the name ""."""
    return dict(network.named_children()) if isinstance(network, Parts) else {"": network}


def prefixed(part: str, name: str) -> str:
    """The name that something of a part has in the whole."""
    return f"{part}.{name}" if part else name


def own_names(part: str, names: Iterable[str]) -> dict[str, str]:
    """Of names in the whole those of one part: name there -> name in the part."""
    start = prefixed(part, "")
    return {name: name.removeprefix(start) for name in names if name.startswith(start)}
