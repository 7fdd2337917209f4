"""Prompts as embeddings: each is encoded once, alone, and kept on the CPU; the text encoders may then go."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from aquabit.pipelines.family import EVERYWHERE, Encoding
from aquabit.pipelines.network import encoder_names
from aquabit.scheme import AquabitError

Encoders = Mapping[str, Any]  # component name -> text encoder


@dataclass
class _Known:
    """What is known of one pipeline's prompts. ``reload`` gives its text encoders again; ``free``: they go
    when they have run."""

    embeddings: dict[tuple[str, bool], dict[str, Tensor]] = field(default_factory=dict)
    reload: Callable[[], Encoders] | None = None
    free: bool = False


# several adapters may serve one pipeline
_KNOWN: WeakKeyDictionary[DiffusionPipeline, _Known] = WeakKeyDictionary()


def _known(pipe: DiffusionPipeline) -> _Known:
    return _KNOWN.setdefault(pipe, _Known())


def embeddings(
    pipe: DiffusionPipeline,
    encodings: Sequence[Encoding],
    prompts: Sequence[str],
    every: Sequence[str],
    guided: bool,
    gradients: bool = False,
) -> dict[str, Tensor]:
    """Call argument -> tensor with a row for each of ``prompts``, on the pipeline's device; those without
    guidance too where ``guided``.

    ``every`` are all prompts that will be asked for: what is new among them is encoded in one go. A prompt is
    encoded by itself, so that its embedding depends on no other. Where text encoders are what is quantized,
    nothing is kept: ``prompts`` are encoded in every call, with ``gradients`` so that these pass. Raises
    AquabitError where a new prompt comes after encoders were freed that cannot be loaded again.
    """
    known = _known(pipe)
    if encoder_names(pipe):
        with torch.set_grad_enabled(gradients):
            fresh = {p: _encoded(pipe, encodings, p, guided, gradients) for p in dict.fromkeys(prompts)}
        return {name: torch.cat([fresh[p][name] for p in prompts]) for name in fresh[prompts[0]]}
    if not guided:  # what guidance needs holds it
        for (prompt, with_), row in list(known.embeddings.items()):
            if with_:
                own = {k: v for k, v in row.items() if not k.startswith("negative_")}
                known.embeddings.setdefault((prompt, False), own)
    missing = [p for p in dict.fromkeys(every) if (p, guided) not in known.embeddings]
    if missing:
        restore_text_encoders(pipe)
        for prompt in missing:
            with torch.no_grad():
                row = {k: v.to("cpu") for k, v in _encoded(pipe, encodings, prompt, guided).items()}
            others = next((o for (_, same), o in known.embeddings.items() if same == guided), {})
            # no prompt: kept once
            known.embeddings[prompt, guided] = {
                k: others[k] if k in others and torch.equal(v, others[k]) else v for k, v in row.items()
            }
        if known.free:
            _set(pipe, dict.fromkeys(_encoders(pipe)))
    rows = [known.embeddings[p, guided] for p in prompts]
    device = pipe._execution_device
    return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}


def _encoded(
    pipe: Any, encodings: Sequence[Encoding], prompt: str, guided: bool, gradients: bool = False
) -> dict[str, Tensor]:
    parameters = inspect.signature(pipe.encode_prompt).parameters
    own = {k: p.default for k, p in inspect.signature(type(pipe).__call__).parameters.items()}
    own = {k: v for k, v in own.items() if v is not None and v is not inspect.Parameter.empty}
    common = {
        **own,  # as the pipeline's own call would have it
        **EVERYWHERE,
        "prompt": [prompt],
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guided,
    }
    found: dict[str, Tensor] = {}
    for encoding in encodings:
        result = pipe.encode_prompt(
            **{k: v for k, v in {**common, **encoding.arguments}.items() if k in parameters}
        )
        named = zip(encoding.returns, result, strict=True)
        found |= {
            f"{n}{encoding.suffix}": v if gradients else v.detach()
            for n, v in named
            if n is not None and v is not None
        }
    return found


def _encoders(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The text encoders that are not what is quantized."""
    own = encoder_names(pipe)
    names = (name for name in pipe.config if name.startswith("text_encoder") and name not in own)
    return {name: getattr(pipe, name, None) for name in names}


def _set(pipe: DiffusionPipeline, encoders: Encoders) -> None:
    for name, encoder in encoders.items():
        pipe.__dict__[name] = (
            encoder  # not through setattr, which forgets the component's class in the config
        )


def can_reload(pipe: DiffusionPipeline, reload: Callable[[], Encoders]) -> None:
    """Say how a pipeline's text encoders are loaded again."""
    _known(pipe).reload = reload


def change_reloaded(pipe: DiffusionPipeline, change: Callable[[Encoders], None]) -> None:
    """Let ``change`` see a pipeline's text encoders whenever they were loaded again."""
    reload = _known(pipe).reload
    if reload is None:
        return

    def changed() -> Encoders:
        again = reload()
        change(again)
        return again

    can_reload(pipe, changed)


def free_text_encoders(pipe: DiffusionPipeline) -> None:
    """From now on text encoders go as soon as all prompts are embeddings; nothing where they could not be
    loaded again."""
    _known(pipe).free = _known(pipe).reload is not None


def restore_text_encoders(pipe: DiffusionPipeline) -> None:
    """Load again what was freed."""
    known = _known(pipe)
    gone = [name for name, encoder in _encoders(pipe).items() if encoder is None and pipe.config[name][0]]
    if not gone:
        return
    if known.reload is None:
        raise AquabitError(
            f"{type(pipe).__name__} has no {', '.join(gone)}; give it its text encoders, or load it from its"
            " folder"
        )
    loaded = known.reload()
    _set(pipe, {name: loaded[name].to(pipe.device) for name in gone})
