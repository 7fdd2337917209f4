"""Activations that change while sampling: the settings of every layer in every step, and the watcher that
switches between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from aquabit.quant.correction.sampling import Watcher, steps_of
from aquabit.quant.layers import QuantConv2d, QuantLinear, Setting
from aquabit.scheme import AquabitError, QuantConfig, act_parts, output_rounding

Layers = Mapping[str, QuantLinear | QuantConv2d]


def settings_of(
    config: QuantConfig,
    layers: Layers,
    attention: Collection[str],
    ranges: Mapping[str, Tensor] | None = None,
) -> dict[str, list[Setting]]:
    """Layer -> its settings in each step, or one where they never change. ``attention`` names the layers
    whose outputs are quantized too (Q, K, V); ``ranges`` maps layers to static ranges [1 or parts, inputs +
    outputs, 2] as ``QuantConfig.range_part`` counts them.
    """
    total = config.total_steps
    return {
        name: _rows(config, name, layer, name in attention, (ranges or {}).get(name), total)
        for name, layer in layers.items()
    }


def _rows(
    config: QuantConfig,
    name: str,
    layer: QuantLinear | QuantConv2d,
    output: bool,
    table: Tensor | None,
    total: int | None,
) -> list[Setting]:
    parts, inputs = act_parts(config[name].act), input_parts(layer)

    def setting(step: int) -> Setting:
        own = parts[0] if config.steps is None or len(parts) == 1 else parts[config.steps.of(step)]
        out = output_rounding(own) if output else 16
        if table is None or own == 16:
            return Setting(own, out)
        ends = [(float(low), float(high)) for low, high in table[config.range_part(name, step)]]
        return Setting(own, out, tuple(ends[:inputs]), ends[inputs] if out != 16 else None)

    changing = len(parts) > 1 or (table is not None and len(table) > 1)
    assert total is not None or not changing
    return [setting(step) for step in range(total or 1)] if changing else [setting(0)]


def input_parts(layer: QuantLinear | QuantConv2d) -> int:
    """How many ranges a layer's input has."""
    return 2 if isinstance(layer, QuantConv2d) and layer.split is not None else 1


def share_out_(config: QuantConfig, layers: Layers, settings: Mapping[str, list[Setting]]) -> None:
    """Every layer as it is in the first step, and what it tells of the others to those who time kernels."""
    for name, layer in layers.items():
        layer.set_activations_(settings[name][0])
        act = config[name].act
        layer.shares = {a: config.share(name, a) for a in set(act)} if isinstance(act, tuple) else {}


class StepSwitch(Watcher):
    """Sets the layers' activation bits and ranges as the steps of sampling go by.

    Raises AquabitError where sampling begins with another number of steps than the settings are for.
    """

    needs_steps = True

    def __init__(self, total: int, layers: Layers, settings: Mapping[str, list[Setting]]):
        self.total = total
        self.changing = [(layers[name], rows) for name, rows in settings.items() if len(rows) > 1]

    def begin(self, scheduler: Any) -> None:
        count = steps_of(scheduler)[-1] + 1
        if count != self.total:
            raise AquabitError(
                f"this configuration's activations are set for {self.total} steps, not for {count}; sample"
                f" with {self.total} steps"
            )

    def before(self, step: int) -> None:
        """Set at every call: a layer may have been set otherwise since the last one (full precision sees
        the same inputs, say)."""
        for layer, rows in self.changing:
            layer.set_activations_(rows[min(step, self.total - 1)])


def switches(config: QuantConfig, layers: Layers, settings: Mapping[str, list[Setting]]) -> list[Watcher]:
    """The watcher that a configuration needs; none where nothing changes while sampling."""
    total = config.total_steps
    return [] if total is None else [StepSwitch(total, layers, settings)]
