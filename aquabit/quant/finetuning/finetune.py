"""Fine-tuning a quantized denoiser against its full-precision teacher, without data: PV-Tuning over a replay
buffer (AQUATIC-Diff).

The teacher makes images; its inputs and outputs are the buffer. The student runs in dense mode with decoded
weights as leaves, so that one backward pass gives dL/dW of every coded layer; codes, codebooks, scales and
offsets are moved by that (quant/finetuning/step.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.calibration.recording import output_tensor
from aquabit.quant.finetuning.replay import Record, Replay
from aquabit.quant.finetuning.settings import FineTuning
from aquabit.quant.finetuning.step import Optimizer, shared_parameters
from aquabit.quant.finetuning.store import (
    checkpoint_path,
    coded_layers,
    read_checkpoint,
    read_record,
    save_tuned,
    stored_tensors,
    weights_from,
    write_record,
)
from aquabit.quant.finetuning.weight import TrainedWeight
from aquabit.quant.model import QuantizedDenoiser
from aquabit.quant.schemes.scalar import halves
from aquabit.scheme import AquabitError, Calibration, Progress, QuantConfig, digest, no_progress

__all__ = ["FineTuning", "Tuned", "finetune"]

FORMAT = 1  # raised when the same settings would give other tensors
CHECKPOINT_SECONDS = 60.0
VALIDATION = 320  # held-out samples that the loss is measured on
DIVERGED, PATIENCE = 10.0, 3  # validation above so many times the start's, so many checks in a row


@dataclass(frozen=True)
class Tuned:
    """A tuned configuration, with the mean squared difference from the teacher's outputs on held-out samples
    ``before`` and ``after``, the share of groups whose codes ``changed``, a row for each check, the seconds
    of tuning, and what is to be said of it.
    """

    config: QuantConfig
    before: float
    after: float
    changed: float
    history: tuple[Mapping[str, float | None], ...]
    seconds: float
    notes: tuple[str, ...] = ()


def finetune(
    model: QuantizedDenoiser,
    config: QuantConfig,
    record: Record,
    settings: FineTuning | None = None,
    progress: Progress = no_progress,
) -> Tuned:
    """Tune the coded weights of ``config``; they are stored in the model's bank, and the configuration that
    is returned names them.

    ``record`` makes the teacher's images (``pipelines.replay_recorder``), sampled as the configuration's
    calibration is. A run that was interrupted continues from its last checkpoint, to the same tensors; a
    finished one is found again. Of all checks, the weights with the least loss as they are stored are kept;
    where training diverges it stops, and ``notes`` says so. Leaves the model to be applied anew. Raises
    AquabitError for configurations without coded layers or with activations that depend on the step, and for
    a packed model.
    """
    check_tunable(model, config)
    settings = (settings or FineTuning()).resolved(code_bits(model, config))
    buffer = replace(config.calibration or Calibration(), images=settings.images, seed=settings.images_seed)
    buffer = buffer if settings.guidance is None else replace(buffer, guidance=settings.guidance)
    bank, untuned = model.fitter.bank, replace(config, correction=None)
    device = model.full(next(iter(model.layers))).device
    key = digest(
        [FORMAT, model.fitter.fingerprint, untuned.digest, settings.digest, buffer.digest, device.type]
    )
    found = read_record(bank, key)
    if found is None:
        run = _Run(model, config, settings, key, device)
        try:
            run.begin(record, buffer, progress)
            run.train(progress)
        finally:
            for name in run.leaves:
                # no leaf of ours stays; the next ``apply`` decodes
                model.set_dense_(name, model.full(name), config[name].weight)
        found = run.finish()
        write_record(bank, key, found)
        checkpoint_path(bank, key).unlink(missing_ok=True)
    return Tuned(
        replace(config, tuned=found["tuned"]),
        found["before"],
        found["after"],
        found["changed"],
        tuple(found["history"]),
        found["seconds"],
        tuple(found["notes"]),
    )


def code_bits(model: QuantizedDenoiser, config: QuantConfig) -> float:
    """Mean bits of code a weight over the coded layers."""
    sizes = {name: prod(model.layers[name].shape) for name in coded_layers(config)}
    bits = sum(
        size * config[n].weight.code_bits(prod(model.layers[n].shape[2:])) for n, size in sizes.items()
    )
    return bits / sum(sizes.values())


def check_tunable(model: QuantizedDenoiser, config: QuantConfig) -> None:
    """Raises AquabitError, with the reason, for what ``finetune`` refuses."""
    if not coded_layers(config):
        raise AquabitError("the configuration codes no layer; there is nothing to fine-tune")
    if config.steps is not None:
        raise AquabitError(
            "the configuration has activation bits that depend on the step, but fine-tuning mixes steps; tune"
            " it without them"
        )
    if config.ranges != "dynamic":
        raise AquabitError(
            f"the configuration has {config.ranges} ranges, but gradients pass dynamic ones only; tune it"
            " without them"
        )
    if any(layer.packed is not None for layer in model.layers.values()):
        raise AquabitError("the model is packed; fine-tuning needs its full-precision weights")


class _Run:
    """One tuning: the trained weights, the best ones so far, and what was seen."""

    def __init__(
        self,
        model: QuantizedDenoiser,
        config: QuantConfig,
        settings: FineTuning,
        key: str,
        device: torch.device,
    ):
        self.model, self.config, self.settings, self.key, self.device = model, config, settings, key, device
        self.bank = model.fitter.bank
        self.leaves: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = dict.fromkeys(("step", "count", "flipped", "bad"), 0)
        self.facts |= dict.fromkeys(("before", "best", "changed", "sum", "seconds"), 0.0)
        self.facts |= {"history": [], "notes": []}

    def begin(self, record: Record, buffer: Calibration, progress: Progress) -> None:
        """Ask the teacher, set up the student, and take up a checkpoint where there is one."""
        s, model = self.settings, self.model
        model.prepare(self.config, progress)  # fitting needs full precision, as the teacher does
        start = {n: w.to(self.device) for n, w in model.coded_weights(self.config).items()}
        progress("fine-tuning: recording the teacher", 0, s.steps)
        model.apply(QuantConfig("", {}))
        self.replay = Replay(record(buffer, s.batch), model.denoiser, 1 if s.guidance is None else 2)
        self.held_out = self.replay.validation(s.batch, VALIDATION)
        model.apply(self.config)
        tables = shared_parameters({n: w.codebooks for n, w in start.items()})
        self.optimizer = Optimizer({n: TrainedWeight(w, tables[n]) for n, w in start.items()}, s)
        for name, weight in self.optimizer.weights.items():
            self.leaves[name] = weight.dense().clone(memory_format=torch.contiguous_format).requires_grad_()
            model.set_dense_(name, self.leaves[name], self.config[name].weight)
        self.best = start
        if not self._resume():
            self.facts["before"] = self.facts["best"] = self._validation()

    def train(self, progress: Progress) -> None:
        """The remaining steps; stops where training diverges."""
        facts, s, started, saved = self.facts, self.settings, time.monotonic(), time.monotonic()
        before, first = facts["seconds"], facts["step"]
        for step in range(first, s.steps):
            loss = self._step(step)
            if loss != loss or loss == float("inf"):
                facts["notes"].append(
                    f"the loss was not finite in step {step + 1}: stopped there, and the best weights before"
                    " are kept"
                )
                break
            facts |= {"step": step + 1, "sum": facts["sum"] + loss, "count": facts["count"] + 1}
            facts["flipped"] += self.optimizer.flipped
            if (step + 1) % s.check_every == 0 or step + 1 == s.steps:
                self._look()
                if facts["bad"] >= PATIENCE:
                    break
            progress(
                f"fine-tuning: loss {loss:.3g}, {facts['changed']:.1%} of codes changed", step + 1, s.steps
            )
            facts["seconds"] = before + time.monotonic() - started
            if time.monotonic() - saved >= CHECKPOINT_SECONDS and step + 1 < s.steps:
                self._save()
                saved = time.monotonic()

    def _step(self, step: int) -> float:
        """One step of the optimizer; the loss on its batch before the step. Nothing is changed where that
        is not finite."""
        s = self.settings
        samples = self.replay.training(step, s.order, s.batch, s.seed)
        before = (
            self.replay.training(step - 1, s.order, s.batch, s.seed)
            if step and s.semi_discontinuity
            else None
        )
        with torch.inference_mode(False), torch.enable_grad():
            loss = self._loss(samples)
            value = float(loss.detach())
            if not torch.isfinite(loss):
                return float("nan")
            found = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(self.leaves, found, strict=True) if g is not None}
        self.optimizer.step_(gradients, step, before is None or self.replay.continues(before, samples))
        self._place(stored=False)
        return value

    def _loss(self, samples: list[int]) -> Tensor:
        """Mean squared difference from the teacher, of outputs combined by guidance where that is asked
        for."""
        (args, kwargs), target = self.replay.batch(samples, self.device)
        error = output_tensor(self.model.denoiser(*args, **kwargs)).float() - target.float()
        if self.settings.guidance is not None:
            conditional, unconditional = error.chunk(2)
            error = unconditional + self.settings.guidance * (conditional - unconditional)
        return error.square().mean()

    @torch.no_grad()
    def _place(self, stored: bool) -> None:
        """Give the student the weights as they are trained, or as they would be stored."""
        for name, leaf in self.leaves.items():
            weight = self.optimizer.weights[name]
            leaf.copy_(weight.stored() if stored else weight.dense())

    @torch.no_grad()
    def _validation(self) -> float:
        """The loss on held-out samples, of the weights as they would be stored."""
        self._place(stored=True)
        total = sum(float(self._loss(samples)) * len(samples) for samples in self.held_out)
        self._place(stored=False)
        return total / sum(map(len, self.held_out))

    def _look(self) -> None:
        """A check: validation, the best so far, whether it diverges, and a row of history."""
        facts, value = self.facts, self._validation()
        if value < facts["best"]:
            facts["best"], self.best = value, self._coded()
        bad = not value <= DIVERGED * facts["before"]
        facts["bad"] = facts["bad"] + 1 if bad else 0
        if facts["bad"] >= PATIENCE:
            facts["notes"].append(
                f"the loss on held-out samples was {value:.3g} in step {facts['step']}, {PATIENCE} checks"
                f" above {DIVERGED:g} times that of the start: stopped there, and the best weights before are"
                " kept; try lower rates"
            )
        share = facts["flipped"] / (self.optimizer.groups * facts["count"])
        facts["changed"] = self.optimizer.changed
        row = {
            "step": facts["step"],
            "loss": facts["sum"] / facts["count"],
            "validation": value if value == value else None,
        }
        facts["history"].append(row | {"changed": facts["changed"], "flipped": share})
        facts |= {"sum": 0.0, "count": 0, "flipped": 0}

    def _coded(self) -> dict[str, CodebookWeight]:
        """The trained weights as they are stored; layers that share codebooks hold one tensor."""
        weights = self.optimizer.weights
        made = {id(w.tables): halves(w.tables.value).half() for w in weights.values() if w.tables is not None}
        return {n: w.coded(made.get(id(w.tables))) for n, w in weights.items()}

    def finish(self) -> dict[str, Any]:
        """Store the best weights; what is kept of the run."""
        facts = self.facts
        if facts["best"] >= facts["before"] and not facts["notes"]:
            facts["notes"].append(
                "no step was better than the start on held-out samples: the weights are those of the start"
            )
        tuned = save_tuned(self.bank, self.best, self.config)
        kept = {k: facts[k] for k in ("before", "changed", "history", "seconds", "notes")}
        return {"tuned": tuned, "after": facts["best"], "settings": asdict(self.settings), **kept}

    def _save(self) -> None:
        """A checkpoint: what later steps depend on, and the best weights so far."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.optimizer.state().items()}
        tensors |= {f"best {k}": v for k, v in stored_tensors(self.best, self.config).items()}
        self.bank.write(checkpoint_path(self.bank, self.key), tensors, {"aquabit": json.dumps(self.facts)})

    def _resume(self) -> bool:
        """Take up a checkpoint; False where there is none."""
        found = read_checkpoint(self.bank, self.key)
        if found is None:
            return False
        tensors, facts = found
        best = {k.removeprefix("best "): v for k, v in tensors.items() if k.startswith("best ")}
        shapes = {n: tuple(layer.shape) for n, layer in self.model.layers.items()}
        self.best = weights_from(best, self.config, shapes, checkpoint_path(self.bank, self.key))
        self.optimizer.restore_({k: v.to(self.device) for k, v in tensors.items()})
        self.facts |= facts
        self._place(stored=False)
        return True
