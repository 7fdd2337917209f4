"""What the denoiser says at a configuration: slopes and output errors on stored inputs, in the unit of the
damages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from aquabit.choices import Choices
from aquabit.measuring.session import Session
from aquabit.scheme import Act, Progress, no_progress
from aquabit.search.options import activation_choices
from aquabit.search.refine import Seen, crossings, in_context, shrunk
from aquabit.sensitivity.damages import Damages
from aquabit.sensitivity.step_weights import MIN_CELLS, chosen_cells, fit_step_weights
from aquabit.space import SearchSpace

LOOKED = 8  # parts of stored inputs (8 trajectories each) that slopes are taken on
# parts that steps are judged on: others, so that nothing is accepted that only the looked-at inputs like
JUDGED = 8


@dataclass
class ContextModel:
    """``look`` and ``judge`` for ``refine``; ``spent`` counts the output errors that they ask for (a
    fifteenth of a measurement each; what the study holds already costs nothing)."""

    session: Session
    damages: Damages
    activations: tuple[Act, ...]
    seed: int = 0  # which stored inputs
    progress: Progress = no_progress
    spent: float = 0.0
    _weights: np.ndarray | None = field(default=None, repr=False)

    @property
    def space(self) -> SearchSpace:
        return self.session.space

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        """Those to look at and those to judge on."""
        first = self.seed * (LOOKED + JUDGED)
        return list(range(first, first + LOOKED)), list(range(first + LOOKED, first + LOOKED + JUDGED))

    @property
    def ready(self) -> bool:
        """Whether there are probes enough to fit weights to."""
        return len(chosen_cells(self.damages)) >= MIN_CELLS

    @property
    def weights(self) -> np.ndarray:
        """One weight a step (``fit_step_weights``), fitted to a few probes when they are first needed."""
        if self._weights is None:
            act = activation_choices(self.space)[0]
            layers, schemes = self.space.layers, self.space.schemes
            cells = chosen_cells(self.damages)
            picked = [(layers[i], self.space.choice(layers[i], schemes[j], act)) for i, j in cells]
            alone = [self.space.config({layer: choice}) for layer, choice in picked]
            found = self.session.outputs(alone, self.progress)
            self.spent += len(alone)
            rounded = self.damages.acts[:, self.space.act_choices.index(act)]
            damage = np.array([self.damages.weights[c] + rounded[c[0]] for c in cells])
            self._weights = fit_step_weights(np.array([found[c.digest]["error"] for c in alone]), damage)
        return self._weights

    def look(self, chosen: Choices) -> Seen:
        """The judge's value of a configuration (one row), and what each single change is predicted to do
        there."""
        weights = chosen.weights[0]
        parts = self.session.slopes(chosen.config, self.weights.tolist(), self.parts[0], self.progress)
        self.spent += 3 * LOOKED
        overlap = self._table(parts[0]["overlap"])
        damages = self.damages.weights
        slopes = [self._table(part["slopes"]) for part in parts]
        own_crossings = [crossings(table, overlap, damages, weights) for table in slopes]
        crossing = shrunk(np.array(own_crossings), damages)
        change = in_context(crossing, damages, weights)
        levels = self.space.act_choices
        own = chosen.act_index((*levels, 16))[0] % len(levels)  # excluded layers (16) have none anywhere
        columns = [levels.index(a) for a in self.activations]
        rounded = self.damages.acts[:, columns] - self.damages.acts[np.arange(len(own)), own][:, None]
        return Seen(self.judge(chosen)[0], change[:, :, None] + rounded[:, None, :])

    def judge(self, proposals: Choices) -> list[float]:
        """Weighted output errors of each row, in the unit of damages."""
        configs = proposals.configs()
        found = self.session.outputs_of(configs, self.parts[1], self.progress)
        self.spent += len(configs) * JUDGED
        errors = ([np.asarray(v["error"]) @ self.weights for v in found[c.digest]] for c in configs)
        return [float(np.mean(own)) for own in errors]

    def _table(self, values: Mapping[str, Mapping[str, float]]) -> np.ndarray:
        """{layer: {scheme: value}} as [L, schemes], 0 where nothing is known."""
        column = {str(s): j for j, s in enumerate(self.space.schemes)}
        out = np.zeros((len(self.space.choices), len(column)))
        for i, layer in enumerate(self.space.choices):
            for scheme, value in values.get(layer, {}).items():
                out[i, column[scheme]] = value
        return out
