"""Fitting: schemes of layers into the bank, calibrated ones with the H of their layer's input."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.bank import Bank, Fit, FullWeights
from aquabit.quant.calibration.calibrator import Calibrator
from aquabit.quant.calibration.hessian import output_error
from aquabit.quant.calibration.input_groups import Group
from aquabit.quant.calibration.moments import Moments
from aquabit.quant.schemes.progress import Report
from aquabit.quant.sharing import shared_work
from aquabit.quant.weights import quantize_weights, relative_error, vanished
from aquabit.runtime import give_back
from aquabit.scheme import UNIT_GAIN_FITS, AquabitError, Calibration, Progress, Scheme, digest, no_progress

# bits of the inputs that H is measured of, whatever a layer's activations are rounded to: a fit for one width
# serves the others as well as one of their own (within 2 %, its median within 0.2 %, of the output error)
FIT_ACT = 8
LARGE = 1 << 20  # weights of a layer whose fit leaves much memory behind
# of the fits with H; raised whenever one of them finds other codes or levels, so that the bank does not mix
# them with what an earlier version kept
CALIBRATED_FITS = 2


@dataclass(frozen=True)
class FitRequest:
    """A layer's weight at a scheme."""

    layer: str
    scheme: Scheme


class _FitProgress:
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

    ``partners`` maps a layer to the name of the codebooks it may share. What is fitted with H is kept under
    a key of the weight, the scheme, the whole model (which makes the inputs), the calibration and, for
    shared codebooks, the members' weights; where other layers have the same weight, of the layer.
    """

    def __init__(
        self,
        bank: Bank,
        weights: FullWeights,
        calibrator: Calibrator,
        fingerprint: str,
        partners: Mapping[str, str],
    ):
        self.bank, self.weights, self.calibrator = bank, weights, calibrator
        self.fingerprint, self.partners = fingerprint, partners

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

    def context(self, request: FitRequest, calibration: Calibration | None) -> str:
        """What else than weight and scheme a fit depends on, as a key; of schemes that see the weight alone
        how it is made, empty where that never changed."""
        if not request.scheme.calibrated:
            return f"fits{UNIT_GAIN_FITS}" if request.scheme.unit_gain else ""
        if request.scheme.shared:
            members = [self.weights.key(n) for n in self.members(request.layer, request.scheme)]
        else:
            members = []
        if len(self.weights.twins(request.layer)) > 1:  # equal weights, each with the H of its own inputs
            members.append(request.layer)
        return digest([CALIBRATED_FITS, self.fingerprint, (calibration or Calibration()).digest, members])

    def found(self, request: FitRequest, calibration: Calibration | None) -> Fit | None:
        return self.bank.get(
            self.weights.key(request.layer), request.scheme, self.context(request, calibration)
        )

    def has(self, request: FitRequest, calibration: Calibration | None) -> bool:
        """Whether the bank has a file for it (which may turn out to be damaged)."""
        return self.bank.has(
            self.weights.key(request.layer), request.scheme, self.context(request, calibration)
        )

    def coded(self, request: FitRequest, calibration: Calibration | None) -> CodebookWeight:
        """The coded weight, fitted first where it is missing."""
        with self.bank.using():
            found = self.found(request, calibration)
            if found is None:
                self.fit([request], calibration)
                found = self.found(request, calibration)
                assert found is not None
            return found.coded

    def fit(
        self,
        requests: Iterable[FitRequest],
        calibration: Calibration | None,
        progress: Progress = no_progress,
    ) -> None:
        """Fit what is missing, a few layers' H in memory at a time. Leaves the model in full precision
        where H was measured."""
        missing = [n for n in dict.fromkeys(requests) if self.found(n, calibration) is None]
        counter = _FitProgress(progress, len(missing))
        for request in missing:
            if not request.scheme.calibrated:
                weight = self.weights[request.layer]
                [coded] = quantize_weights([weight], request.scheme)
                self._store(request, None, coded, [], None)
                if weight.numel() >= LARGE:
                    give_back()
                counter.next(f"{request.layer} {request.scheme}")
        waiting = [n for n in missing if n.scheme.calibrated]
        while waiting:
            part, waiting = self._next(waiting, calibration)
            layers = {m for n in part for m in self.members(n.layer, n.scheme)}
            with shared_work():
                self._fit_calibrated(part, self._moments(layers, calibration), calibration, counter)

    def portions(self, layers: Iterable[str], calibration: Calibration | None) -> list[list[Group]]:
        """Groups of layers that read the same tensor, in portions whose H fit into memory together."""
        return self.calibrator.portions(layers, [FIT_ACT], calibration)

    def _moments(self, layers: Iterable[str], calibration: Calibration | None) -> dict[str, Moments]:
        """H by layer; layers that did not run are left out."""
        found = self.calibrator.moments(layers, [FIT_ACT], calibration)
        return {layer: value for (layer, act), value in found.items() if act == FIT_ACT}

    def _next(
        self, waiting: list[FitRequest], calibration: Calibration | None
    ) -> tuple[list[FitRequest], list[FitRequest]]:
        """The requests to fit next, and the rest: one set of shared codebooks, or the layers whose H fit into
        memory together."""
        first = waiting[0]
        if first.scheme.shared:
            together = set(self.members(first.layer, first.scheme))
            part = [n for n in waiting if n.layer in together and n.scheme == first.scheme]
        else:
            alone = [n for n in waiting if not n.scheme.shared]
            portion = self.portions({n.layer for n in alone}, calibration)[0]
            inside = {layer for group in portion for layer in group}
            part = [n for n in alone if n.layer in inside]
        taken = set(part)
        return part, [n for n in waiting if n not in taken]

    def _fit_calibrated(
        self,
        requests: list[FitRequest],
        known: dict[str, Moments],
        calibration: Calibration | None,
        counter: _FitProgress,
    ) -> None:
        """Fit requests whose H are known, those of one shape together where that saves time."""
        batches: dict[Any, list[FitRequest]] = defaultdict(list)
        for request in requests:
            weight = self.weights[request.layer]
            # batches save time on a GPU only, and a CPU's results are exact
            alone = weight.device.type == "cpu" and not request.scheme.shared
            kind = (request.layer if alone else tuple(weight.shape), known[request.layer].diagonal)
            batches[kind, request.scheme].append(request)
        for (_, scheme), batch in batches.items():
            layers = self.members(batch[0].layer, scheme) if scheme.shared else [n.layer for n in batch]
            weights, hessians = [self.weights[n] for n in layers], [known[n].hessian for n in layers]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                coded = quantize_weights(
                    weights, scheme, hessians, report=counter.report(f"{layers[0]} {scheme}")
                )
            notes = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
            if known[layers[0]].diagonal:
                notes.append(f"H of {weights[0][0].numel()} inputs is kept as its diagonal only")
            for layer, weight, hessian, result in zip(layers, weights, hessians, coded, strict=True):
                error = output_error(weight, result.dequantize(), hessian)
                request = FitRequest(layer, scheme)
                self._store(request, calibration, result, notes, error)
                if request in batch:
                    counter.next(f"{layer} {scheme}, loss {error:.4f}")

    def _store(
        self,
        request: FitRequest,
        calibration: Calibration | None,
        coded: CodebookWeight,
        notes: list[str],
        output: float | None,
    ) -> None:
        weight = self.weights[request.layer]
        if gone := vanished(weight, coded):
            notes = [*notes, f"{gone} outputs are too small for scales of 16 bits, and became 0"]
        fit = Fit(coded, relative_error(weight, coded), output, tuple(notes))
        self.bank.put(
            self.weights.key(request.layer), request.scheme, self.context(request, calibration), fit
        )

    def facts(
        self,
        layers: Sequence[str],
        schemes: Mapping[str, Sequence[Scheme]],
        calibration: Calibration | None,
        beside: Mapping[str, Sequence[Scheme]] | None = None,
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Fit every scheme of some layers, and those of ``beside``, of which nothing is told; layer -> scheme
        -> what is known of it.

        "error" is the relative weight error, "output" the relative output error (only with a calibration),
        "notes" what is to be said of the fit, where there is something.
        """
        with self.bank.using():
            others = beside or {}
            asked = [FitRequest(n, s) for n in layers for s in (*schemes[n], *others.get(n, ()))]
            self.fit(asked, calibration)
            fits: dict[str, dict[Scheme, Fit]] = {}
            for layer in layers:
                for scheme in schemes[layer]:
                    fit = self.found(FitRequest(layer, scheme), calibration)
                    assert fit is not None
                    fits.setdefault(layer, {})[scheme] = fit
            # those that were fitted with H are kept beside their output errors
            unknown = [k for k, row in fits.items() if any(f.output is None for f in row.values())]
            known = self._moments(unknown, calibration) if unknown and calibration is not None else {}
            found: dict[str, dict[str, dict[str, Any]]] = {}
            with shared_work():
                for layer, row in fits.items():
                    for scheme, fit in row.items():
                        output = None if calibration is None else fit.output
                        if output is None and layer in known:  # a layer that never ran has no H
                            hessian: Tensor = known[layer].hessian
                            output = output_error(self.weights[layer], fit.coded.dequantize(), hessian)
                        value: dict[str, Any] = {"error": fit.error}
                        if output is not None:
                            value["output"] = output
                        if fit.notes:
                            value["notes"] = list(fit.notes)
                        found.setdefault(layer, {})[str(scheme)] = value
            return found
