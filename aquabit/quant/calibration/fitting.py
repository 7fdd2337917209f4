"""Fitting: schemes of layers into the bank, calibrated ones with the H of their layer's input at the
activation bits they are used with."""

from __future__ import annotations

import ctypes
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.bank import Bank, Fit
from aquabit.quant.calibration.calibrator import Call, Group, Moments, input_groups, moments, plan
from aquabit.quant.calibration.hessian import output_error
from aquabit.quant.schemes.progress import Report
from aquabit.quant.weights import quantize_weight, quantize_weights, relative_error
from aquabit.scheme import AquabitError, Calibration, Progress, QuantConfig, Scheme, digest, no_progress

if TYPE_CHECKING:
    from aquabit.quant.model import QuantizedDenoiser

Record = Callable[[Calibration], list[Call]]  # denoiser calls of a full-precision run
# bits of the inputs that shared codebooks are fitted for: one set of tables serves layers of different
# activation bits
SHARED_ACT = 8
LARGE = 1 << 20  # weights of a layer whose fit leaves much memory behind


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it, in pieces that grow with every large fit (3 GB over
    those of a DiT-XL/2).

    Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class FitRequest:
    """A layer's weight at a scheme, for inputs at ``act`` bits: SHARED_ACT where codebooks are shared,
    whatever is asked for."""

    layer: str
    scheme: Scheme
    act: int

    def __post_init__(self) -> None:
        if self.scheme.shared:
            object.__setattr__(self, "act", SHARED_ACT)


class _Told:
    """Progress of a run of fits: the text changes from step to step, the count from fit to fit."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def next(self, text: str) -> None:
        self.done += 1
        self.progress(f"quantizing: {text}", self.done, self.total)

    def report(self, text: str) -> Report:
        return lambda step: self.progress(f"quantizing: {text}, loss {step.loss:.4f}", self.done, self.total)


class Fitter:
    """Finds coded weights in the bank, and fits what is missing.

    ``record`` gives the denoiser calls that H is measured on; ``partners`` maps a layer to the name of the
    codebooks it may share. What is fitted with H is kept under a key of the weight, the scheme, the whole
    model (which makes the inputs), the calibration, the activation bits and, for shared codebooks, the
    members' weights.
    """

    def __init__(
        self,
        model: QuantizedDenoiser,
        bank: Bank,
        fingerprint: str,
        record: Record | None,
        partners: Mapping[str, str],
    ):
        self.model, self.bank, self.fingerprint, self.record, self.partners = (
            model,
            bank,
            fingerprint,
            record,
            partners,
        )
        self._calls: tuple[Calibration, list[Call], list[Group]] | None = None
        self._moments: tuple[Calibration, dict[tuple[str, int], Moments]] | None = None  # the last ones

    def members(self, layer: str, scheme: Scheme) -> list[str]:
        """The layers that are fitted together: those that share codebooks, else the layer alone."""
        if not scheme.shared:
            return [layer]
        name = self.partners.get(layer)
        if name is None:
            raise AquabitError(
                f"layer {layer!r} cannot be {scheme}: no other layer has its operator type and shape"
            )
        return [n for n, other in self.partners.items() if other == name]

    def context(self, need: FitRequest, calibration: Calibration | None) -> str:
        """What else than weight and scheme a fit depends on, as a key; empty for schemes that see the
        weight alone."""
        if not need.scheme.calibrated:
            return ""
        members = (
            [self.model.key(n) for n in self.members(need.layer, need.scheme)] if need.scheme.shared else []
        )
        return digest([self.fingerprint, (calibration or Calibration()).digest, need.act, members])

    def found(self, need: FitRequest, calibration: Calibration | None) -> Fit | None:
        return self.bank.get(self.model.key(need.layer), need.scheme, self.context(need, calibration))

    def has(self, need: FitRequest, calibration: Calibration | None) -> bool:
        """Whether the bank has a file for it (which may turn out to be damaged)."""
        return self.bank.has(self.model.key(need.layer), need.scheme, self.context(need, calibration))

    def coded(self, need: FitRequest, calibration: Calibration | None) -> CodebookWeight:
        """The coded weight, fitted first where it is missing."""
        with self.bank.using():
            found = self.found(need, calibration)
            if found is None:
                self.fit([need], calibration)
                found = self.found(need, calibration)
                assert found is not None
            return found.coded

    def fit(
        self, needs: Iterable[FitRequest], calibration: Calibration | None, progress: Progress = no_progress
    ) -> None:
        """Fit what is missing, a few layers' H in memory at a time. Leaves the model in full precision
        where H was measured."""
        missing = [n for n in dict.fromkeys(needs) if self.found(n, calibration) is None]
        told = _Told(progress, len(missing))
        for need in missing:
            if not need.scheme.calibrated:
                weight = self.model.full(need.layer)
                self._store(need, None, quantize_weight(weight, need.scheme), [], None)
                if weight.numel() >= LARGE:
                    give_back()
                told.next(f"{need.layer} {need.scheme}")
        waiting = [n for n in missing if n.scheme.calibrated]
        acts = sorted({n.act for n in waiting if not n.scheme.shared}, reverse=True)
        while waiting:
            part, waiting = self._next(waiting, acts, calibration)
            layers = {m for n in part for m in self.members(n.layer, n.scheme)}
            known = self.moments(layers, [SHARED_ACT] if part[0].scheme.shared else acts, calibration)
            self._fit_calibrated(part, known, calibration, told)

    def _next(
        self, waiting: list[FitRequest], acts: Sequence[int], calibration: Calibration | None
    ) -> tuple[list[FitRequest], list[FitRequest]]:
        """The needs to fit next, and the rest: one set of shared codebooks, or the layers whose H fit into
        memory together."""
        first = waiting[0]
        if first.scheme.shared:
            together = set(self.members(first.layer, first.scheme))
            part = [
                n for n in waiting if n.layer in together and n.scheme == first.scheme and n.act == first.act
            ]
        else:
            alone = [n for n in waiting if not n.scheme.shared]
            chunk = self.chunks({n.layer for n in alone}, acts, calibration)[0]
            inside = {layer for group in chunk for layer in group}
            part = [n for n in alone if n.layer in inside]
        taken = set(part)
        return part, [n for n in waiting if n not in taken]

    def chunks(
        self, layers: Iterable[str], acts: Sequence[int], calibration: Calibration | None
    ) -> list[list[Group]]:
        """Groups of layers that read the same tensor, in portions whose H fit into memory together."""
        wanted = set(layers)
        groups = [
            kept
            for group in self._recorded(calibration)[1]
            if (kept := tuple(n for n in group if n in wanted))
        ]
        never = wanted - {n for group in groups for n in group}
        if never:
            raise AquabitError(
                f"layer {min(never)!r} did not run during calibration; exclude it or pin it to a scheme that"
                " needs no H"
            )
        return plan(groups, self.model, acts)

    def moments(
        self, layers: Iterable[str], acts: Sequence[int], calibration: Calibration | None
    ) -> dict[tuple[str, int], Moments]:
        """H of layers at activation bits."""
        wanted, asked = set(layers), calibration or Calibration()
        if (
            self._moments is None
            or self._moments[0] != asked
            or any((n, a) not in self._moments[1] for n in wanted for a in acts)
        ):
            self._moments = None  # no two at a time
            calls, groups = self._recorded(asked)
            kept = [own for group in groups if (own := tuple(n for n in group if n in wanted))]
            self._moments = asked, moments(self.model, calls, kept, acts)
        return self._moments[1]

    def _recorded(self, calibration: Calibration | None) -> tuple[list[Call], list[Group]]:
        """Denoiser calls and the layers that read the same tensors; made once for a calibration."""
        asked = calibration or Calibration()
        if self._calls is None or self._calls[0] != asked:
            if self.record is None:
                raise AquabitError(
                    "calibrated schemes need images to measure H on, and this model was opened without a"
                    " pipeline"
                )
            self.model.apply(QuantConfig("", {}))
            calls = self.record(asked)
            self._calls = (asked, calls, input_groups(self.model, calls))
        return self._calls[1], self._calls[2]

    def _fit_calibrated(
        self,
        needs: list[FitRequest],
        known: dict[tuple[str, int], Moments],
        calibration: Calibration | None,
        told: _Told,
    ) -> None:
        """Fit needs whose H are known, those of one shape together where that saves time."""
        batches: dict[Any, list[FitRequest]] = defaultdict(list)
        for need in needs:
            weight = self.model.full(need.layer)
            alone = (
                weight.device.type == "cpu" and not need.scheme.shared
            )  # batches save time on a GPU only, and a CPU's results are exact
            kind = (need.layer if alone else tuple(weight.shape), known[need.layer, need.act].diagonal)
            batches[kind, need.scheme, need.act].append(need)
        for (_, scheme, act), batch in batches.items():
            layers = self.members(batch[0].layer, scheme) if scheme.shared else [n.layer for n in batch]
            weights, hessians = [self.model.full(n) for n in layers], [known[n, act].hessian for n in layers]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                coded = quantize_weights(
                    weights, scheme, hessians, report=told.report(f"{layers[0]} {scheme} a{act}")
                )
            notes = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
            if known[layers[0], act].diagonal:
                notes.append(f"H of {weights[0][0].numel()} inputs is kept as its diagonal only")
            for layer, weight, hessian, result in zip(layers, weights, hessians, coded, strict=True):
                error, need = (
                    output_error(weight, result.dequantize(), hessian),
                    FitRequest(layer, scheme, act),
                )
                self._store(need, calibration, result, notes, error)
                if need in batch:
                    told.next(f"{layer} {scheme} a{act}, loss {error:.4f}")

    def _store(
        self,
        need: FitRequest,
        calibration: Calibration | None,
        coded: CodebookWeight,
        notes: list[str],
        output: float | None,
    ) -> None:
        weight = self.model.full(need.layer)
        fit = Fit(coded, relative_error(weight, coded), output, tuple(notes))
        self.bank.put(self.model.key(need.layer), need.scheme, self.context(need, calibration), fit)

    def facts(
        self,
        layers: Sequence[str],
        schemes: Mapping[str, Sequence[Scheme]],
        acts: Sequence[int],
        calibration: Calibration | None,
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Fit every scheme of some layers, calibrated ones for each of ``acts``; layer -> scheme -> what is
        known of it.

        "error" is the relative weight error, "output" the relative output error at the first of ``acts``
        (only with a calibration), "notes" what is to be said of the fit, where there is something.
        """
        with self.bank.using():
            return self._facts(layers, schemes, acts, calibration)

    def _facts(
        self,
        layers: Sequence[str],
        schemes: Mapping[str, Sequence[Scheme]],
        acts: Sequence[int],
        calibration: Calibration | None,
    ) -> dict[str, dict[str, dict[str, Any]]]:
        needs = [
            FitRequest(n, s, a)
            for n in layers
            for s in schemes[n]
            for a in (acts if s.calibrated else acts[:1])
        ]
        self.fit(needs, calibration)
        known = {} if calibration is None else self.moments(layers, acts[:1], calibration)
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for layer in layers:
            for scheme in schemes[layer]:  # a layer that never ran has no H
                fit = self.found(FitRequest(layer, scheme, acts[0]), calibration)
                assert fit is not None
                value: dict[str, Any] = {"error": fit.error}
                if (layer, acts[0]) in known:
                    hessian: Tensor = known[layer, acts[0]].hessian
                    value["output"] = output_error(self.model.full(layer), fit.coded.dequantize(), hessian)
                if fit.notes:
                    value["notes"] = list(fit.notes)
                found.setdefault(layer, {})[str(scheme)] = value
        return found
