"""Static ranges of activations: one per layer, or one per layer and step, measured while calibration images
are made.

They are measured in full precision, as H is: a range then depends on the model, the calibration and the
number of bits alone, so that configurations share it and the bank keeps it. Softmax outputs stay dynamic:
they are made inside attention, and a grid over [0, 1] would round the small probabilities of long sequences
to zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aquabit.kernels import fake_quantize_static
from aquabit.quant.bank import Bank
from aquabit.quant.calibration.full_precision import FullPrecision, Layer
from aquabit.quant.correction.sampling import Watcher, steps_of
from aquabit.quant.layers import QuantConv2d, Range
from aquabit.quant.step_switch import input_parts
from aquabit.scheme import (
    ROUNDINGS,
    AquabitError,
    Calibration,
    QuantConfig,
    Rounding,
    act_parts,
    act_text,
    digest,
)

# makes calibration images with the model as it is, followed by watchers
Sample = Callable[[Calibration, Sequence[Watcher]], None]

FORMAT = 2  # raised when the same images would give other ranges
# Shares of values beyond either end of the ranges that are tried; 0: the smallest and the largest value. At
# a4 a hundredth has less squared error still, but costs images 3 dB of PSNR (digits-unet): what is cut off
# matters most.
TAILS = (0.0, 1e-5, 1e-4, 1e-3)
KEPT = 1 << 26  # values that one measurement keeps, of all layers and steps (256 MB)
QUANTILE_LIMIT = 1 << 23  # torch refuses more than twice as many
FEWEST, MOST = 256, 4096  # values kept of one tensor of one call


def best_range(values: Tensor, low: float, high: float, act: Rounding, zero: bool) -> Range:
    """Of [low, high] and the ranges between percentiles of ``values`` [n] (``TAILS``), the one with the
    least squared error at ``act``; with ``zero`` in it, as padding of convolutions asks, and as far on both
    sides of it for symmetric grids. Raises AquabitError for ends that are not finite."""
    some = values[:: 1 + len(values) // QUANTILE_LIMIT]
    ends = some.quantile(torch.tensor([q for tail in TAILS[1:] for q in (tail, 1 - tail)]))
    tried = [(low, high), *((float(a), float(b)) for a, b in ends.reshape(-1, 2))]
    tried = [(min(a, 0.0), max(b, 0.0)) if zero else (a, b) for a, b in tried]
    if not isinstance(act, int):
        tried = [(-max(-a, b), max(-a, b)) for a, b in tried]
    errors = [float((fake_quantize_static(values, act, a, b) - values).square().mean()) for a, b in tried]
    return tried[errors.index(min(errors))]  # the widest of equals


class _Values:
    """Some values of one tensor in one step, over all images, with the smallest and the largest of all."""

    def __init__(self) -> None:
        self.low, self.high, self.parts = torch.inf, -torch.inf, list[Tensor]()

    def add(self, x: Tensor, count: int) -> None:
        low, high = (float(end) for end in x.aminmax())
        # NaN stays where it comes first: it is refused below
        self.low, self.high = (min(low, self.low), max(high, self.high))
        flat = x.detach().reshape(-1)
        if len(flat) > count:
            flat = flat[
                torch.randint(
                    len(flat), (count,), generator=torch.Generator().manual_seed(len(self.parts))
                ).to(x.device)
            ]
        self.parts.append(flat.float().cpu())


class RangeRecorder(Watcher):
    """Keeps values of the layers' inputs, and of the outputs of ``attention`` layers, by step; use
    ``watching`` around the sampling."""

    def __init__(self, layers: Mapping[str, Layer], attention: Collection[str], count: int):
        self.layers, self.attention, self.count, self.step, self.steps = layers, attention, count, 0, 0
        # by layer, part; by step
        self.values: dict[tuple[str, int], dict[int, _Values]] = defaultdict(lambda: defaultdict(_Values))

    def begin(self, scheduler: Any) -> None:
        self.steps = steps_of(scheduler)[-1] + 1

    def before(self, step: int) -> None:
        self.step = step

    def watching(self) -> ExitStack:
        """Hooks on the layers, until the stack is closed."""
        stack = ExitStack()
        for name, layer in self.layers.items():
            stack.callback(layer.register_forward_hook(partial(self._see, name)).remove)
        return stack

    def _see(self, name: str, layer: Layer, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0]
        parts = [x] if input_parts(layer) == 1 else [x[:, : layer.split], x[:, layer.split :]]
        for part, tensor in enumerate([*parts, output] if name in self.attention else parts):
            self.values[name, part][self.step].add(tensor, self.count)

    def tables(self, act: Rounding) -> dict[str, Tensor]:
        """Layer -> ranges [1 + steps, parts, 2] for a rounding: over all steps, then of each; layers
        that did not run are left out."""
        ends: dict[str, list[list[Range]]] = {}
        for (name, _), by_step in sorted(self.values.items()):
            zero, every = isinstance(self.layers[name], QuantConv2d), list(by_step.values())
            chosen = [every, *([by_step[s]] if s in by_step else every for s in range(self.steps))]
            ends.setdefault(name, []).append([self._range(name, values, act, zero) for values in chosen])
        return {name: torch.tensor(parts).transpose(0, 1).contiguous() for name, parts in ends.items()}

    @staticmethod
    def _range(name: str, values: Iterable[_Values], act: Rounding, zero: bool) -> Range:
        kept = list(values)
        low = min(v.low for v in kept)
        high = max(v.high for v in kept)
        sample = torch.cat([p for v in kept for p in v.parts])
        if not -torch.inf < low <= high < torch.inf or not bool(torch.isfinite(sample).all()):
            raise AquabitError(
                f"layer {name!r} meets NaN or Inf in full precision; no static range holds them"
            )
        return best_range(sample, low, high, act, zero)


class RangeTables:
    """Static ranges of a model's layers by calibration and rounding: in memory, else from the bank, else
    measured."""

    def __init__(
        self,
        model: FullPrecision,
        bank: Bank,
        fingerprint: str,
        attention: Collection[str],
        sample: Sample | None,
    ):
        self.model = model
        self.bank = bank
        self.fingerprint = fingerprint
        self.attention = attention
        self.sample = sample
        self._known: dict[tuple[str, Rounding], dict[str, Tensor]] = {}

    def of(self, config: QuantConfig) -> dict[str, Tensor]:
        """Layer -> ranges [parts, inputs + outputs, 2] of a configuration, a part for each step, group or all
        (``QuantConfig.range_part``).

        What is missing is measured, which leaves the model in full precision. Raises AquabitError where there
        is nothing to measure it on.
        """
        calibration = config.calibration or Calibration()
        used = {part for c in config.layers.values() for part in act_parts(c.act)}
        self._find(calibration, [a for a in ROUNDINGS if a in used and a != 16])
        return {
            name: self._table(config, name, calibration) for name in config.layers if config.range_parts(name)
        }

    def _table(self, config: QuantConfig, name: str, calibration: Calibration) -> Tensor:
        parts, rows = act_parts(config[name].act), []
        for part in range(config.range_parts(name)):
            own = parts[0] if len(parts) == 1 else parts[config.group_of_part(part)]
            # a16 rounds to no range: any will do
            known = next(a for a in parts if a != 16) if own == 16 else own
            table = self._known[calibration.digest, known].get(name)
            if table is None:
                raise AquabitError(
                    f"layer {name!r} did not run during calibration, so that its static range is not known;"
                    " give it a16"
                )
            if config.ranges == "step" and part + 1 >= len(table):
                raise AquabitError(
                    f"calibration took {len(table) - 1} steps, ranges are asked for {config.total_steps};"
                    " give both the same number"
                )
            rows.append(table[1 + part if config.ranges == "step" else 0])
        return torch.stack(rows)

    def _find(self, calibration: Calibration, acts: Collection[Rounding]) -> None:
        for act in acts:
            if (calibration.digest, act) not in self._known and (
                stored := self._stored(calibration, act)
            ) is not None:
                self._known[calibration.digest, act] = stored
        missing = [act for act in acts if (calibration.digest, act) not in self._known]
        if not missing:
            return
        recorder = self._measured(calibration)
        for act in missing:
            self._known[calibration.digest, act] = tables = recorder.tables(act)
            self.bank.write(self._path(calibration, act), tables)

    def _measured(self, calibration: Calibration) -> RangeRecorder:
        if self.sample is None:
            raise AquabitError(
                "static ranges need images to be measured on, and this model was opened without a pipeline"
            )
        self.model.set_()
        calls = 2 * len(self.model.layers) * calibration.steps * -(-calibration.images // 16)
        recorder = RangeRecorder(self.model.layers, self.attention, max(FEWEST, min(MOST, KEPT // calls)))
        with recorder.watching():
            self.sample(calibration, [recorder])
        return recorder

    def _path(self, calibration: Calibration, act: Rounding) -> Any:
        return (
            self.bank.folder
            / f"ranges-{digest([FORMAT, self.fingerprint, calibration.digest])}-{act_text(act)}.safetensors"
        )

    def _stored(self, calibration: Calibration, act: Rounding) -> dict[str, Tensor] | None:
        try:
            found = load_file(self._path(calibration, act))
        except (OSError, SafetensorError):
            return None  # missing, or damaged: it is measured again
        return found if all(t.ndim == 3 and t.shape[-1] == 2 for t in found.values()) else None
