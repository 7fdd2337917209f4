"""What a model is loaded from, as one text that studies and configurations keep: MODEL, or
MODEL?variant=fp16&base=DIR&lora=FILE:0.8&component=text_encoder,transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from aquabit.scheme import AquabitError

OPTIONS = ("variant", "base", "lora", "component")


@dataclass(frozen=True)
class Reference:
    """``model`` is a bundled name, a folder, a hub id or a file of weights; ``variant`` names the files of a
    folder or hub id that are meant ("fp16": diffusion_pytorch_model.fp16.safetensors); ``base`` is the
    pipeline, a folder or hub id, that a file of weights belongs to; ``loras`` ("FILE" or "FILE:SCALE") are
    fused with the weights; ``components`` are what is quantized of it (none: its denoisers)."""

    model: str
    variant: str | None = None
    base: str | None = None
    loras: tuple[str, ...] = ()
    components: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The inverse of ``parse``."""
        given = [("variant", self.variant), ("base", self.base), *(("lora", lora) for lora in self.loras)]
        given.append(("component", ",".join(self.components) or None))
        asked = [(name, value) for name, value in given if value is not None]
        return f"{self.model}?{urlencode(asked, safe='/:,')}" if asked else self.model

    @property
    def composed(self) -> bool:
        """Whether it says more than a place, of files of this machine."""
        return self.text != self.model and (Path(self.model).exists() or bool(self.loras))

    @property
    def public(self) -> str:
        """The text without folders of this machine, which tell nobody."""
        base = None if self.base is None else _named(self.base)
        return replace(self, model=_named(self.model), base=base, loras=tuple(map(_named, self.loras))).text

    @staticmethod
    def parse(text: str) -> Reference:
        """A text whose last "?" is followed by anything else than options is a name with a "?" in it."""
        model, mark, options = text.rpartition("?")
        found = parse_qsl(options) if mark and model else []
        if not found or not {name for name, _ in found} <= set(OPTIONS):
            return Reference(text)
        single = {name: value for name, value in found if name != "lora"}
        components = component_list(single.pop("component", None))
        loras = tuple(value for name, value in found if name == "lora")
        return Reference(model, **single, loras=loras, components=components)

    def with_(
        self,
        variant: str | None = None,
        base: str | None = None,
        loras: Sequence[str] = (),
        component: str | None = None,
    ) -> Reference:
        """With options beside those of the text. Raises AquabitError where both name a variant, a base or
        components, and for a LoRA that is not there."""
        for name, value in (("variant", variant), ("base", base), ("component", component)):
            own = ",".join(self.components) or None if name == "component" else getattr(self, name)
            if value is not None and own not in (None, value):
                raise AquabitError(
                    f"{name} is {own!r} in {self.text!r} and {value!r} besides; give one of them"
                )
        for lora in loras:
            if not Path(file_and_scale(lora)[0]).is_file():
                raise AquabitError(
                    f"the LoRA {file_and_scale(lora)[0]} is not there; give FILE or FILE:SCALE"
                )
        return replace(
            self,
            variant=variant or self.variant,
            base=base or self.base,
            loras=(*self.loras, *loras),
            components=component_list(component) or self.components,
        )


def component_list(text: str | None) -> tuple[str, ...]:
    """Of "text_encoder,transformer"."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def file_and_scale(lora: str) -> tuple[str, float]:
    """Of "FILE" or "FILE:SCALE"; raises AquabitError for a scale that is not finite."""
    file, colon, tail = lora.rpartition(":")
    try:
        scale = float(tail) if colon else 1.0
    except ValueError:
        return lora, 1.0
    if not math.isfinite(scale):
        raise AquabitError(f"the scale of the LoRA {file} is {tail}; it must be a number, as 0.8")
    return (file, scale) if colon else (lora, 1.0)


def _named(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place
