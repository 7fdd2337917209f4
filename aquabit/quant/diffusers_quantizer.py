"""aquabit as a quantization method of diffusers: ``from_pretrained`` of a packed model, or with
``AquabitConfig`` of a dense one.

Only diffusers' quantizers are imported here, which are there when this is imported (see
``aquabit.diffusers_hook``); the rest comes when a model is loaded.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import logging
from torch import Tensor, nn

from aquabit.scheme import FP, METHOD, AquabitError, LayerChoice, QuantConfig, Rounding, Scheme

logger = logging.get_logger("diffusers.quantizers.aquabit")


class PackedContents(Protocol):
    """What a packed model is made of (``artifact.Contents``)."""

    config: QuantConfig

    def facts(self) -> dict[str, Any]: ...

    def tensors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class Loading(Protocol):
    """The loading of one model (``unpacking.Unpacking``): diffusers' calls are handed on to it."""

    own: set[str]

    def missing(self, keys: Iterable[str]) -> list[str]: ...

    def count_(self, counted: bool) -> None: ...

    def take(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def set_(self, name: str, tensor: Tensor, device: Any) -> None: ...

    def finish_(self) -> PackedContents: ...


class AquabitMethod(StrEnum):
    """The name that diffusers knows us by, in the form that it wants."""

    AQUABIT = METHOD


class AquabitConfig(QuantizationConfigMixin):
    """How diffusers is to quantize a model as it loads it, or how a packed one was quantized.

    ``weights`` is one scheme for all Linear and Conv2d layers ("usq4"), a mapping of layer names or patterns
    to schemes ({"proj_out": "fp", "*.attn1.*": "usq4", "*": "usq3"}; the first that matches counts, and what
    none matches stays in full precision), or a whole ``QuantConfig``. ``act`` are the activations of the
    quantized layers: 16 (off, the default), 8, 6, 4, "i8" or "f8". ``modules_to_not_convert`` names modules
    whose layers stay in full precision, as in diffusers' other configurations.

    Fitted to the weights alone: for schemes with H, static ranges, fine-tuning and noise correction use
    ``aquabit.quantize``. Where a model cannot be followed (the inputs of its class are not known, or sizes
    depend on data) its layers go by name, every Linear and Conv2d, and activations stay as they are. Raises
    AquabitError for schemes and bits that are unknown, and on loading for patterns and modules that match no
    layer, and for activation bits of a model that cannot be followed.
    """

    def __init__(
        self,
        weights: str | Mapping[str, str] | QuantConfig = "usq4",
        act: Rounding | None = None,
        facts: Mapping[str, Any] | None = None,
        modules_to_not_convert: str | Sequence[str] | None = None,
    ):
        self.quant_method = AquabitMethod.AQUABIT
        self.weights, self.act, self.facts = weights, act, dict(facts or {})
        names = modules_to_not_convert or ()
        self.modules_to_not_convert = [names] if isinstance(names, str) else list(names)
        self.digest: str | None = None  # of the artifact that this was read from
        if isinstance(weights, QuantConfig):
            if act is not None or self.modules_to_not_convert:
                what = "modules are left out" if act is None else f"activation bits are {act}"
                raise AquabitError(f"{what}, but the configuration names each layer's; leave them out")
            return
        self.act = 16 if act is None else act
        for scheme in [weights] if isinstance(weights, str) else weights.values():
            _fits(Scheme.parse(scheme))
        QuantConfig.from_dict(
            {
                "schema": 1,
                "model": "",
                "fingerprint": "",
                "layers": {"any": {"weight": "usq4", "act": self.act}},
            },
            "act",
        )

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        from aquabit.quant.artifact import DIGEST, parsed

        value = {k: v for k, v in config_dict.items() if k != "quant_method"}
        if "groups" in value or "schema" in value:
            config, facts = parsed(value)
            found = cls(config, facts=facts)
            found.digest = value.get(DIGEST)
        else:
            unknown = sorted(set(value) - {"weights", "act", "modules_to_not_convert"})
            if unknown:
                raise AquabitError(
                    f"quantization_config has {unknown[0]!r}; a packed model's has schema and groups, a"
                    " request weights and act"
                )
            found = cls(**value)
        return (found, kwargs) if return_unused_kwargs else found

    def to_dict(self) -> dict[str, Any]:
        from aquabit.quant.artifact import described

        if isinstance(self.weights, QuantConfig):
            return {**described(self.weights), **self.facts}
        weights = self.weights if isinstance(self.weights, str) else dict(self.weights)
        left = {"modules_to_not_convert": self.modules_to_not_convert} if self.modules_to_not_convert else {}
        return {"quant_method": METHOD, "weights": weights, "act": self.act, **left}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def resolved(self, layers: list[str]) -> QuantConfig:
        """The configuration of a dense model with these layers, its fingerprint still empty unless one was
        given."""
        if isinstance(self.weights, QuantConfig):
            wrong = [
                f
                for f, there in (
                    ("noise correction", self.weights.correction),
                    ("fine-tuning", self.weights.tuned),
                    ("static ranges", self.weights.ranges != "dynamic"),
                )
                if there
            ]
            if wrong:
                raise AquabitError(
                    f"the configuration asks for {wrong[0]}, which needs images; use aquabit.quantize"
                )
            for choice in self.weights.layers.values():
                _fits(choice.weight)
            return self.weights
        patterns = {"*": self.weights} if isinstance(self.weights, str) else dict(self.weights)
        found, used = dict[str, LayerChoice](), set[str]()
        for name in layers:
            left = {m for m in self.modules_to_not_convert if f".{m}." in f".{name}."}
            used |= left
            if left:
                continue
            pattern = next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
            if pattern is not None:
                used.add(pattern)
                scheme = Scheme.parse(patterns[pattern])
                found[name] = LayerChoice() if scheme == FP else LayerChoice(scheme, self.act or 16)
        unused = [p for p in (*self.modules_to_not_convert, *patterns) if p not in used]
        if unused:
            raise AquabitError(
                f"{unused[0]!r} matches none of the model's {len(layers)} layers that an earlier one leaves,"
                f" as {layers[0]!r}"
            )
        return QuantConfig("", found)


def _fits(scheme: Scheme) -> None:
    if scheme.output_aware or scheme.shared:
        need = "H, which is measured on images" if scheme.output_aware else "several layers fitted together"
        raise AquabitError(f"scheme {scheme} needs {need}; use aquabit.quantize, or name {str(scheme)[:-1]}")


class AquabitQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads or saves a model. ``contents`` is what the loaded model is made
    of."""

    use_keep_in_fp32_modules = True  # as in a dense model: those modules' own tensors
    required_packages = ("accelerate",)

    def __init__(self, quantization_config: AquabitConfig, **kwargs: Any):
        if "pre_quantized" not in kwargs:  # diffusers' from_single_file
            raise AquabitError(
                "a single file cannot be quantized while diffusers loads it; give aquabit.quantize what"
                " aquabit.load(FILE, base=PIPELINE) makes of it, or load a folder that save_pretrained wrote"
            )
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized and not isinstance(quantization_config.weights, QuantConfig):
            raise AquabitError(
                "quantization_config of a packed model needs schema and groups; this one is a request to"
                " quantize"
            )
        self.contents: PackedContents | None = None
        self.model: Any = None
        self._dtype = torch.float32
        self._loading: Loading | None = None
        self._files: list[Path] = []  # that a packed model is read from

    @property
    def loading(self) -> Loading:
        assert self._loading is not None  # diffusers calls ``preprocess_model`` before what needs it
        return self._loading

    # ---- loading: in the order in which diffusers calls ----

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self._dtype = torch_dtype or torch.get_default_dtype()
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        from aquabit.quant.artifact import is_own

        if not self.pre_quantized:
            return loaded_keys
        given = [checkpoint_files] if isinstance(checkpoint_files, str | Path) else checkpoint_files
        self._files = [Path(file) for file in given]
        return [k for k in loaded_keys if not is_own(k, self.quantization_config.weights)]

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Any = (), **kwargs: Any
    ) -> None:
        from aquabit.graph import fixed_layers, layers
        from aquabit.quant.unpacking import Quantizing, Unpacking, dense_graph

        asked, fp32 = self.quantization_config, list(keep_in_fp32_modules or ())
        if self.pre_quantized:
            self._loading = Unpacking(model, asked.weights, asked.facts, self._dtype, fp32)
        else:
            graph, why = dense_graph(model)
            fixed = fixed_layers(graph)
            config = asked.resolved([n for n in layers(graph) if n not in fixed])
            if why and any(choice.act != 16 for choice in config.layers.values()):
                raise AquabitError(
                    f"activation bits need a model that can be followed, and {why}; leave act at 16"
                )
            if why:
                logger.info(f"{why}: the layers of {type(model).__name__} go by name, weights only")
            self._loading = Quantizing(model, config, self._dtype, fp32, graph, bool(why))

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """diffusers calls this again when the device map was made."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise AquabitError(
                "the device map puts layers on disk, which packed ones cannot run from; leave them on cpu, or"
                " give enable_group_offload(offload_to_disk_path=...) when the model is loaded"
            )
        if self._loading is not None:
            self._loading.count_(False)

    def get_special_dtypes_update(self, model: Any, torch_dtype: Any) -> dict[str, torch.dtype]:
        """Called before diffusers adds up what a device map is made by: codes count from here on."""
        if self._loading is not None:
            self._loading.count_(True)
        return {}

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        return self.loading.missing(missing_keys)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.loading.take(state_dict)

    def check_if_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        state_dict: Mapping[str, Tensor],
        **kwargs: Any,
    ) -> bool:
        return self._loading is not None and param_name in self._loading.own

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor, loaded_param: Tensor
    ) -> bool:
        raise AquabitError(
            f"{param_name} is stored as {list(loaded_param.shape)}, the model has {list(current_param.shape)}"
        )

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.loading.set_(param_name, state_dict[param_name], target_device)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from aquabit.quant.artifact import verify

        self.contents = self.loading.finish_()
        asked = self.quantization_config  # after what names more exactly what is wrong
        verify(self._files, asked.to_dict(), asked.digest)
        self._loading, self._files = None, []
        adopt_(model, self)
        config = self.contents.config
        if config.correction or config.total_steps is not None:
            what = (
                f"noise correction {config.correction}" if config.correction else "activation bits per step"
            )
            logger.warning(
                f"{what}: diffusers gives a model no scheduler to follow, so this does not act;"
                " aquabit.load(folder) binds it"
            )
        return model

    # ---- saving ----

    def get_state_dict_and_metadata(
        self, state_dict: Mapping[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not safe_serialization:
            raise AquabitError(
                "packed models are saved as safetensors only; leave safe_serialization at True"
            )
        assert self.contents is not None
        self._check_there(state_dict)
        return self.contents.tensors(state_dict), {}

    def _check_there(self, state: Mapping[str, Tensor]) -> None:
        """Raise AquabitError where tensors hold nothing: they are offloaded, to disk or by accelerate."""
        registries = [vars(m).get("_diffusers_hook") for m in self.model.modules()]
        hooks = [registry.get_hook("group_offloading") for registry in registries if registry is not None]
        on_disk = any(hook is not None and hook.config.offload_to_disk_path for hook in hooks)
        if on_disk or any(tensor.is_meta for tensor in state.values()):
            raise AquabitError(
                f"tensors of {type(self.model).__name__} are offloaded; load it without offloading to save or"
                " decode it"
            )

    def _dequantize(self, model: Any) -> Any:
        """Plain layers with decoded weights; nothing is rounded or corrected while it runs any more."""
        from aquabit.quant.correction.sampling import follow_
        from aquabit.quant.layers import plain_layers_

        self._check_there(model.state_dict())
        follow_(model, None, [])
        plain_layers_(model)
        model._internal_dict = type(model.config)(
            {k: v for k, v in model.config.items() if k != "quantization_config"}
        )
        for name in REFUSED:
            vars(model).pop(name, None)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


ADAPTED = (
    "peft cannot put adapters on packed layers; aquabit.add_lora(pipe, FILE, scale) puts a LoRA beside them,"
    " and training needs the dense model"
)
REFUSED = {  # methods of diffusers' models that read the weights of layers
    "add_adapter": ADAPTED,
    "load_lora_adapter": ADAPTED,
    "fuse_qkv_projections": (
        "packed projections cannot be fused; fuse those of the dense model, then quantize it in memory"
    ),
}


def _refuse(why: str, *_: object, **__: object) -> None:
    raise AquabitError(why)


def adopt_(model: Any, quantizer: AquabitQuantizer) -> None:
    """A packed model as diffusers has it after loading: its quantizer, and the configuration that
    ``save_pretrained`` writes."""
    found = quantizer.contents
    assert found is not None
    quantizer.quantization_config = AquabitConfig(found.config, facts=found.facts())
    quantizer.model = model
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, AquabitMethod.AQUABIT
    for name, why in REFUSED.items():
        if hasattr(model, name):
            setattr(model, name, partial(_refuse, why))
    if hasattr(model, "register_to_config"):  # a model of the user's own has no config
        model.register_to_config(quantization_config=quantizer.quantization_config.to_dict())


def attach_(model: nn.Module, contents: PackedContents) -> None:
    """Make a model that was packed in memory known to diffusers, so that ``save_pretrained`` writes an
    artifact."""
    quantizer = AquabitQuantizer(AquabitConfig(contents.config), pre_quantized=True)
    quantizer.contents = contents
    adopt_(model, quantizer)


AUTO_QUANTIZER_MAPPING[METHOD] = AquabitQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = AquabitConfig
