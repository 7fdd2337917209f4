"""What a model is loaded from, as one text that studies and configurations keep: MODEL, or
MODEL?variant=fp16&base=DIR."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from aquabit.scheme import AquabitError


@dataclass(frozen=True)
class Reference:
    """``model`` is a bundled name, a folder, a hub id or a file of weights; ``variant`` names the files of a
    folder or hub id that are meant ("fp16": diffusion_pytorch_model.fp16.safetensors); ``base`` is the
    pipeline, a folder or hub id, that a file of weights belongs to."""

    model: str
    variant: str | None = None
    base: str | None = None

    @property
    def text(self) -> str:
        """The inverse of ``parse``."""
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        asked = {name: value for name, value in given.items() if value is not None}
        return f"{self.model}?{urlencode(asked)}" if asked else self.model

    @property
    def composed(self) -> bool:
        """Whether it says more than a place, of files of this machine."""
        return self.text != self.model and Path(self.model).exists()

    @property
    def public(self) -> str:
        """The text without folders of this machine, which tell nobody."""
        base = None if self.base is None else _named(self.base)
        return replace(self, model=_named(self.model), base=base).text

    @staticmethod
    def parse(text: str) -> Reference:
        """A text whose last "?" is followed by anything else than options is a name with a "?" in it."""
        model, mark, options = text.rpartition("?")
        found = parse_qsl(options) if mark and model else []
        known = {f.name for f in fields(Reference)[1:]}
        if not found or not {name for name, _ in found} <= known:
            return Reference(text)
        return Reference(model, **dict(found))

    def with_(self, variant: str | None = None, base: str | None = None) -> Reference:
        """With options beside those of the text; raises AquabitError where both name one."""
        for name, value in (("variant", variant), ("base", base)):
            own = getattr(self, name)
            if value is not None and own not in (None, value):
                raise AquabitError(
                    f"{name} is {own!r} in {self.text!r} and {value!r} besides; give one of them"
                )
        return replace(self, variant=variant or self.variant, base=base or self.base)


def _named(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place
