"""SearchSpace: which schemes each layer may take, and random configurations of it."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, groupby, pairwise, product
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from aquabit.graph import codebook_names, fixed_layers
from aquabit.graph import layers as graph_layers
from aquabit.jsonio import read_json, record
from aquabit.layer_formats import FORMATS, LEVELS, layer_formats
from aquabit.maximum_entropy import level_odds
from aquabit.scheme import (
    FP,
    ROUNDINGS,
    Act,
    AquabitError,
    Calibration,
    LayerChoice,
    QuantConfig,
    Rounding,
    Scheme,
    StepGroups,
    act_bits,
    act_text,
    closest,
    known_rounding,
    lowest,
    parse_correction,
)
from aquabit.scheme_kinds import KINDS
from aquabit.target_choices import check_pins, fused, held, rounded
from aquabit.targets import WEIGHTS_ONLY, target_named
from aquabit.tied_groups import Groups
from aquabit.ties import Tied, common_choices, find_ties

# beside the additive formats; plain rounding and k-means lose to these nearly everywhere
DEFAULT_SCHEMES = ("usq2h", "usq4h", "usq6h")
TINY_SCHEMES = (*DEFAULT_SCHEMES, "usq8")  # of layers whose bytes hardly count
TINY = 1e-3  # share of all weights below which bytes hardly count: at 16 bits they are .01 bit of the model
DEFAULT_ACTIVATIONS = (8, 6)  # what budgets in bits fix, and the next lower one, for budgets in BOPs
BITS_RANGE = (2.0, 4.5)  # mean bits of a random sample: the budgets that people ask for


@dataclass(frozen=True)
class SearchSpace:
    """The weight schemes and activation bits each layer may take, layers in execution order.

    A pinned layer has one choice; an excluded one stays in full precision with its activations off. With
    ``steps`` activation bits may change once while sampling (``act_choices``). Layers of a group of ``tied``
    take one scheme and one choice of activations together. Rows of its configurations are
    ``choices.Choices``.
    """

    fingerprint: str
    choices: Mapping[str, tuple[Scheme, ...]]
    activations: tuple[Rounding, ...] = DEFAULT_ACTIVATIONS
    operators: Mapping[str, str] | None = None  # layer -> operator type, for balanced sampling
    kernel_area: Mapping[str, int] | None = None
    model: str = ""
    codebooks: Mapping[str, str] | None = None  # layer -> name of the codebooks that its shared schemes use
    calibration: Calibration | None = None
    steps: StepGroups | None = None
    correction: str | None = None  # of every configuration that quantizes: it is measured after correction
    tied: Tied = ()  # groups of layers that choose together; members have the same choices
    target: str | None = None  # the program that all of it can be deployed to (``targets.TARGETS``)
    # how a session makes images, for configurations that calibrate nothing to say so too; not stored
    sampled: Calibration | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "correction", "+".join(parse_correction(self.correction)) or None)
        if not self.choices:
            raise AquabitError("the search space is empty: the model has no Linear or Conv2d layer")
        if not self.activations:
            known = ", ".join(map(str, ROUNDINGS))
            raise AquabitError(f"the list of activations is empty; give at least one of {known}")
        for rounding in self.activations:
            known_rounding(rounding)
        self._check_ties()
        target_named(self.target)

    def _check_ties(self) -> None:
        """Raise AquabitError for groups of less than two layers of the space, a layer in two of them, and
        members whose choices differ."""
        members = Counter(name for group in self.tied for name in group)
        for group in self.tied:
            rows = {self.choices.get(name) for name in group}
            if len(group) < 2 or len(rows) > 1 or None in rows or max(members[name] for name in group) > 1:
                raise AquabitError(
                    f"the tied layers {', '.join(group)} must be two or more of the space, in no other group,"
                    " with the same schemes"
                )

    @cached_property
    def groups(self) -> Groups:
        """Which layers choose together."""
        return Groups.of(self.layers, self.tied)

    @property
    def layers(self) -> list[str]:
        return list(self.choices)

    @property
    def act_choices(self) -> tuple[Act, ...]:
        """What activations may be: the roundings, high to low; with groups of steps also a low one followed
        by one of the next higher number of bits, and the reverse, from each boundary on."""
        single = tuple(r for r in ROUNDINGS if r in self.activations)
        groups = 0 if self.steps is None else len(self.steps.starts)
        levels = [list(same) for _, same in groupby(single, act_bits)]
        steps = [step for highs, lows in pairwise(levels) for step in product(highs, lows)]
        pairs = [pair for high, low in steps for pair in ((low, high), (high, low))]
        return *single, *((a,) * b + (z,) * (groups - b) for a, z in pairs for b in range(1, groups))

    @property
    def closest_act(self) -> Rounding:
        """Of its activations, the one that is closest to full precision."""
        return closest(self.activations)

    def over_steps(self, values: np.ndarray) -> np.ndarray:
        """Values [..., groups] averaged over the steps, [...]."""
        return values[..., 0] if self.steps is None else np.asarray(values @ np.array(self.steps.shares))

    @property
    def schemes(self) -> list[Scheme]:
        """Every scheme that some layer may take, ``fp`` first: what ``Choices.weights`` index."""
        found = {s: None for row in self.choices.values() for s in row}
        return [FP, *(s for s in found if s != FP)]

    @property
    def columns(self) -> dict[Scheme, int]:
        """Where in ``schemes`` each one stands."""
        return {scheme: j for j, scheme in enumerate(self.schemes)}

    def cells(self) -> list[tuple[str, str]]:
        """Every (layer, scheme) and (layer, activation choice), as text, that changes something."""
        layers = [k for k, row in self.choices.items() if row != (FP,)]
        acts = [act_text(a) for a in self.act_choices if a != 16]
        schemes = [(k, str(s)) for k in layers for s in self.choices[k] if s != FP]
        return schemes + [(k, a) for k in layers for a in acts]

    def codebook(self, layer: str) -> str:
        """The name of the codebooks that a layer may share."""
        name = (self.codebooks or {}).get(layer)
        if name is None:
            raise AquabitError(
                f"layer {layer!r} shares its operator type and shape with no other: it cannot share codebooks"
            )
        return name

    def choice(self, layer: str, weight: Scheme, act: Act) -> LayerChoice:
        """What a layer gets, with the name of its codebooks where the scheme shares them."""
        return LayerChoice(weight, act, self.codebook(layer) if weight.shared else None)

    def config(self, choices: Mapping[str, LayerChoice]) -> QuantConfig:
        # full precision has no noise to correct
        quantizes = any(choice != LayerChoice() for choice in choices.values())
        correction = self.correction if quantizes else None
        sampled = self.calibration or self.sampled
        return QuantConfig(self.fingerprint, choices, self.model, self.steps, correction, sampled)

    def free_layers(self) -> list[str]:
        """Layers that have more than one weight scheme to choose from."""
        return [k for k, row in self.choices.items() if len(row) > 1]

    def common_schemes(self) -> list[Scheme]:
        """The schemes that every free layer may take: what a uniform configuration can have."""
        free = [self.choices[k] for k in self.free_layers()]
        return [s for s in self.schemes if all(s in row for row in free)]

    def code_bits(self, layer: str, scheme: Scheme) -> float:
        """Nominal bits of codes per weight of one layer."""
        return scheme.code_bits((self.kernel_area or {}).get(layer, 1))

    def bit_levels(self, layer: str) -> dict[float, list[Scheme]]:
        """The layer's schemes by nominal bits, rounded to halves so that 2.25 and 2 bits are one level;
        ``fp`` only where there is no other: random configurations quantize every layer, as Qua2SeDiMo's
        do."""
        row = self.choices[layer]
        return self._levels(tuple(s for s in row if s != FP) or row, (self.kernel_area or {}).get(layer, 1))

    @staticmethod
    @lru_cache(maxsize=4096)
    def _levels(row: tuple[Scheme, ...], kernel_area: int) -> dict[float, list[Scheme]]:
        levels: dict[float, list[Scheme]] = {}
        for scheme in row:
            levels.setdefault(round(2 * scheme.code_bits(kernel_area)) / 2, []).append(scheme)
        return dict(sorted(levels.items()))

    def scheme_odds(self, layer: str, mean: float) -> dict[Scheme, float]:
        """The chance of each scheme of a layer in a random configuration of so many mean bits: levels of
        maximum entropy, schemes of a level alike."""
        levels = self.bit_levels(layer)
        odds = level_odds(tuple(levels), mean)
        return {s: p / len(row) for row, p in zip(levels.values(), odds, strict=True) for s in row}

    def allowed(self) -> np.ndarray:
        """Boolean [layers, schemes]: what each layer may take."""
        schemes = self.schemes
        return np.array([[s in row for s in schemes] for row in self.choices.values()])

    def uniform(self, scheme: Scheme | str, act: Act = 8) -> QuantConfig:
        """Every free layer with one scheme, pinned and excluded layers as they are."""
        scheme = Scheme.parse(scheme)
        return self._with([scheme if len(row) > 1 else row[0] for row in self.choices.values()], act)

    def near_uniform(self, scheme: Scheme, act: Act = 8) -> QuantConfig:
        """Every layer that may take a scheme with it, the others with what they have nearest in bits, of
        output-aware ones where they have some."""

        def nearest(layer: str) -> Scheme:
            bits = self.code_bits(layer, scheme)

            def distance(s: Scheme) -> tuple[bool, bool, float]:
                return s != scheme, not s.calibrated, abs(self.code_bits(layer, s) - bits)

            return min(self.choices[layer], key=distance)

        return self._with([nearest(layer) for layer in self.choices], act)

    def level(self, kind: str, bits: float, act: Act = 8) -> QuantConfig:
        """Every free layer with its scheme of a kind nearest to ``bits`` of code, of output-aware ones
        where it has some; where it has none of that kind, the nearest output-aware one, else any."""
        record = KINDS.get(kind)

        def nearest(layer: str) -> Scheme:
            def distance(s: Scheme) -> tuple[bool, bool, float]:
                return s.record is not record, not s.calibrated, abs(self.code_bits(layer, s) - bits)

            return min(self.choices[layer], key=distance)

        return self._with([nearest(layer) for layer in self.choices], act)

    def _with(self, schemes: Sequence[Scheme], act: Act) -> QuantConfig:
        """One scheme for each layer, activations at ``act``, those of excluded layers off."""
        rows = zip(self.choices.items(), schemes, strict=True)
        return self.config({k: self.choice(k, s, 16 if row == (FP,) else act) for (k, row), s in rows})

    def full_precision(self) -> QuantConfig:
        return self.config({})

    def check(self, config: QuantConfig, extra_schemes: bool = False, broken_ties: bool = False) -> None:
        """Raise AquabitError where a configuration is of another model, names an unknown layer or a scheme
        outside the space, or breaks a tie."""
        if config.fingerprint != self.fingerprint:
            raise AquabitError(
                f"the configuration is for model {config.fingerprint}, this is model {self.fingerprint}"
            )
        unknown = [k for k in config.layers if k not in self.choices]
        if unknown:
            raise AquabitError(
                f"unknown layer {unknown[0]!r}; the model's layers are listed by `aquabit inspect`"
            )
        for layer, choice in config.layers.items():
            if not extra_schemes and choice.weight not in self.choices[layer]:
                raise AquabitError(
                    f"layer {layer!r} may not take {choice.weight}; its choices are"
                    f" {', '.join(map(str, self.choices[layer]))}"
                )
        broken = None if broken_ties else self.broken_tie(config)
        if broken is not None:
            has = (f"{k} {config[k].weight} at {act_text(config[k].act)}" for k in broken)
            raise AquabitError(
                f"tied layers must have the same scheme and activation bits; the configuration gives"
                f" {', '.join(has)}"
            )

    def broken_tie(self, config: QuantConfig) -> tuple[str, ...] | None:
        """The first tied layers to which a configuration gives different schemes or activation bits."""
        return next((g for g in self.tied if len({(config[k].weight, config[k].act) for k in g}) > 1), None)

    def swapped(self, config: QuantConfig, layer: str, weight: Scheme) -> QuantConfig:
        """A configuration with another scheme in a layer and in those that are tied to it."""
        names = self.tied_to(layer)
        own = {k: self.choice(k, weight, config[k].act) for k in names}
        return replace(config, layers={**config.layers, **own})

    def tied_to(self, layer: str) -> tuple[str, ...]:
        """The layers that choose together with one, itself included."""
        return next((group for group in self.tied if layer in group), (layer,))

    def sample(
        self, count: int, seed: int = 0, bits_range: tuple[float, float] = BITS_RANGE
    ) -> list[QuantConfig]:
        """``count`` independent random configurations that cover the range of mean bits evenly.

        A target mean is drawn uniformly over ``bits_range``; each layer's bits come from the maximum-entropy
        distribution with that mean over the layer's levels; the method is uniform among the schemes of a
        level. Activations are all at the highest bits in half of the configurations, else each layer takes
        the lowest with a probability drawn per configuration; with groups of steps every second of these lets
        it take any of the lower widths and patterns instead. Configuration i depends on (seed, i) alone.
        """
        return [self._draw(np.random.default_rng([seed, i]), bits_range) for i in range(count)]

    def _draw(self, rng: np.random.Generator, bits_range: tuple[float, float]) -> QuantConfig:
        target = rng.uniform(*bits_range)
        share = rng.uniform(0, 1) if rng.random() < 0.5 else 0.0
        others = self.lower_acts(share, rng)
        picked: dict[str, LayerChoice] = {}
        for group in self.grouped():
            layer, row = group[0], self.choices[group[0]]
            levels = self.bit_levels(layer)
            level = rng.choice(list(levels), p=level_odds(tuple(levels), target))
            methods = levels[float(level)]
            scheme = methods[int(rng.integers(len(methods)))]
            low = others[int(rng.integers(len(others)))] if len(others) > 1 else others[0]
            act = low if rng.random() < share else self.closest_act
            picked |= {k: self.choice(k, scheme, 16 if row == (FP,) else act) for k in group}
        return self.config(picked)

    def grouped(self) -> list[tuple[str, ...]]:
        """The layers in groups that choose together, most of them alone, in execution order."""
        layers, own = self.layers, {group[0]: group for group in self.tied}
        return [own.get(layers[i], (layers[i],)) for i in self.groups.first]

    def lower_acts(self, share: float, rng: np.random.Generator) -> tuple[Act, ...]:
        """What a random configuration gives to the ``share`` of its layers whose activations are not at
        the highest bits: the lowest (of several kinds any), or, with groups of steps, every second time
        any lower one or pattern."""
        if self.steps is not None and share and rng.random() < 0.5:
            lower = tuple(a for a in self.act_choices if a != self.closest_act)
            return lower or lowest(self.activations)
        return lowest(self.activations)

    def to_dict(self) -> dict[str, Any]:
        choices = {k: [str(s) for s in v] for k, v in self.choices.items()}
        steps, calibration = self.steps, self.calibration and self.calibration.to_dict()
        if calibration and calibration["conditions"]:
            calibration["conditions"] = list(calibration["conditions"])  # as JSON gives it back
        later = {  # absent where there is none: spaces stay what they were
            "codebooks": dict(self.codebooks or {}),
            "calibration": calibration,
            "correction": self.correction,
            "step_groups": steps and steps.to_dict(),
            "tied": [list(group) for group in self.tied],
            "target": self.target,
        }
        return {
            "fingerprint": self.fingerprint,
            "choices": choices,
            "activations": list(self.activations),
            "operators": dict(self.operators or {}),
            "kernel_area": dict(self.kernel_area or {}),
            "model": self.model,
            **{name: value for name, value in later.items() if value},
        }

    @staticmethod
    def from_dict(value: Any, source: str = "the stored space") -> SearchSpace:
        """The inverse of ``to_dict``; raises AquabitError where it is none."""
        found = record(_Stored, value, source)
        return SearchSpace(
            found.fingerprint,
            {k: tuple(Scheme.parse(s) for s in row) for k, row in found.choices.items()},
            tuple(known_rounding(a, source) for a in found.activations),
            found.operators,
            found.kernel_area,
            found.model,
            found.codebooks,
            found.calibration,
            read_groups(found.step_groups, source),
            found.correction,
            found.tied,
            found.target,
        )


@dataclass(frozen=True)
class _Stored:
    """A space as JSON."""

    fingerprint: str
    choices: dict[str, tuple[str, ...]]
    activations: tuple[int | str, ...]
    operators: dict[str, str]
    kernel_area: dict[str, int]
    model: str
    codebooks: dict[str, str] | None = None
    calibration: Calibration | None = None
    step_groups: Any = None
    correction: str | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    target: str | None = None


def without_additive(space: SearchSpace) -> SearchSpace:
    """The space without additive formats, but for layers that may take nothing else but full precision."""
    kept = {k: tuple(s for s in row if not s.additive) for k, row in space.choices.items()}
    return replace(
        space, choices={k: space.choices[k] if set(row) <= {FP} else row for k, row in kept.items()}
    )


def _matching(patterns: Iterable[str], names: Sequence[str], what: str) -> dict[str, str]:
    """layer -> the last pattern that names it; a pattern that names no layer is an error."""
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise AquabitError(
                f"{what} pattern {pattern!r} matches no layer; for example the first layer is {names[0]!r}"
            )
        found.update(dict.fromkeys(hits, pattern))
    return found


def make_space(
    graph: nx.DiGraph,
    fingerprint: str,
    model: str = "",
    *,
    schemes: Sequence[str] | None = None,
    levels: Sequence[float] | None = None,
    formats: Mapping[str, Sequence[str]] | None = None,
    activations: Sequence[Rounding] | None = None,
    pinned: Mapping[str, str] | None = None,
    excluded: Sequence[str] = (),
    calibration: Calibration | None = None,
    correction: str | None = None,
    step_groups: Mapping[str, Any] | None = None,
    tied: Sequence[Sequence[str]] = (),
    target: str | None = None,
) -> SearchSpace:
    """The space of a traced model. ``pinned`` maps layer patterns (as in shells) to one scheme; ``excluded``
    layers stay ``fp``, and so do those that cannot run from codes (``graph.fixed_layers``).

    Beside ``schemes`` each layer gets the additive format that suits its operator type and shape
    (``formats``, a table as ``formats.FORMATS``) at each of ``levels`` code bits; levels are given by default
    where schemes are not. By default every layer may also stay ``fp``, so that any budget up to 16 bits can
    be used, and one whose bytes hardly count (TINY) takes 8 bits instead of additive formats: at most eight
    schemes are fitted to a layer. A scheme that shares codebooks is left out for layers that have no partner,
    and any for layers whose shape cannot be stored so (groups that do not divide a row).
    ``calibration``: what H, and the noise that ``correction`` (as "cnc+bc") takes away, are measured on
    (default: ``Calibration()``). ``step_groups``: {"total": steps, "starts": [0, ...]}, groups of steps
    between which activation bits may change. ``tied``: lists of patterns; layers that match one list, with
    stars that stand for the same text, choose together, of what all of them may take. ``target``: a name of
    ``targets.TARGETS``; what it cannot hold is left out of what is offered (by default its own schemes), a
    layer that is left with nothing stays ``fp``, and layers that it fuses are tied.
    """
    nodes, goal = graph_layers(graph), target_named(target)
    pins = _matching(pinned or {}, list(nodes), "pinned")
    out = {*_matching(excluded, list(nodes), "excluded"), *fixed_layers(graph)}
    if nodes and len(out) == len(nodes):
        raise AquabitError(
            f"every layer is excluded ({', '.join(excluded) or 'none can run from codes'}), and none is left"
            " to quantize; exclude fewer"
        )
    partners = codebook_names(graph)
    if goal is not None and schemes is None and levels is None and formats is None:
        choices = dict.fromkeys(nodes, (FP, *map(Scheme.parse, goal.schemes)))
    else:
        choices = _offered(nodes, partners, schemes, levels, FORMATS if formats is None else formats)
    model_class = str(graph.graph.get("model_class"))
    acts = rounded(goal, activations, DEFAULT_ACTIVATIONS)
    if goal is not None:
        choices = held(goal, nodes, choices, model_class, out, acts)
        check_pins(goal, nodes, pins, pinned or {}, model_class, acts)
    choices |= _pinned(nodes, {name: Scheme.parse((pinned or {})[pattern]) for name, pattern in pins.items()})
    choices |= dict.fromkeys(out, (FP,))
    for name, row in choices.items():
        if not row:
            raise AquabitError(
                f"no scheme is left for layer {name!r} {nodes[name]['shape']}; give one that fits it, as in"
                " usq4, or exclude it"
            )
    groups = find_ties(tied, list(nodes))
    if goal is not None:
        choices, groups = fused(goal, model_class, choices, groups)
    choices = common_choices(choices, groups)
    calibrated = any(s.calibrated for row in choices.values() for s in row)
    shared = any(s.shared for row in choices.values() for s in row)
    return SearchSpace(
        fingerprint,
        choices,
        acts,
        {n: str(a["operator"]) for n, a in nodes.items()},
        {n: int(np.prod(a["shape"][2:])) for n, a in nodes.items()},
        model,
        partners if shared else None,
        (calibration or Calibration()) if calibrated or parse_correction(correction) else None,
        read_groups(step_groups, "the space"),
        correction,
        groups,
        None if goal is None else goal.name,
    )


def narrowed(space: SearchSpace, graph: nx.DiGraph, target: str | None) -> SearchSpace:
    """The part of a space that a target can hold; the space itself where it is of that target, or none is
    named. Raises AquabitError where it is of another one, and where nothing is left."""
    goal = target_named(target)
    if goal is None or space.target == goal.name:
        return space
    if space.target is not None:
        raise AquabitError(
            f"the space is of the target {space.target}, not {goal.name}; measure another study with --target"
            f" {goal.name}"
        )
    nodes, model_class = graph_layers(graph), str(graph.graph.get("model_class"))
    excluded = {k for k, row in space.choices.items() if row == (FP,)}
    known = [a for a in goal.activations if a in space.activations]
    choices = held(goal, nodes, space.choices, model_class, excluded, ())
    plain = any(goal.beside(s, 16) is None for row in choices.values() for s in row if s != FP)
    first = WEIGHTS_ONLY if plain or not known else tuple(known)  # what every scheme must go with
    choices = held(goal, nodes, choices, model_class, excluded, first)
    choices, groups = fused(goal, model_class, choices, space.tied)
    every = {s for row in choices.values() for s in row if s != FP}
    more = (a for a in known if all(goal.beside(s, a) is None for s in every))
    kept = tuple(dict.fromkeys((*first, *more)))
    choices = common_choices(choices, groups)
    return replace(space, choices=choices, activations=kept, tied=groups, target=goal.name)


def _offered(
    nodes: Mapping[str, Mapping[str, Any]],
    partners: Mapping[str, str],
    schemes: Sequence[str] | None,
    levels: Sequence[float] | None,
    formats: Mapping[str, Sequence[str]],
) -> dict[str, tuple[Scheme, ...]]:
    """What each layer may take where nothing is pinned or excluded, see ``make_space``; ``partners`` names
    the codebooks that a layer may share."""
    plain = [Scheme.parse(s) for s in (DEFAULT_SCHEMES if schemes is None else schemes)]
    chosen = (LEVELS if schemes is None else ()) if levels is None else levels
    if not plain and not chosen:
        raise AquabitError("the list of schemes is empty; give at least one, as in usq4")
    sharers, weights = Counter(partners.values()), sum(int(np.prod(node["shape"])) for node in nodes.values())
    choices = {}
    for name, node in nodes.items():
        operator, shape = node["operator"], tuple(node["shape"])
        additive = layer_formats(operator, shape, chosen, sharers.get(partners.get(name, ""), 1), formats)
        plain_here = [s for s in plain if s.refuses(shape) is None]
        offered = [s for s in (*plain_here, *additive) if name in partners or not s.shared]
        if schemes is None:
            tiny = levels is None and int(np.prod(shape)) < TINY * weights
            offered = [FP, *(map(Scheme.parse, TINY_SCHEMES) if tiny else offered)]
        choices[name] = tuple(dict.fromkeys(offered))
    return choices


def _pinned(
    nodes: Mapping[str, Mapping[str, Any]], pins: Mapping[str, Scheme]
) -> dict[str, tuple[Scheme, ...]]:
    """The choice of each pinned layer; raises AquabitError for one that cannot be stored so."""
    for name, scheme in pins.items():
        why = scheme.refuses(tuple(nodes[name]["shape"]))
        if why is not None:
            raise AquabitError(f"layer {name!r} is pinned to {scheme}, which cannot hold it: {why}")
    return {name: (scheme,) for name, scheme in pins.items()}


def read_groups(value: Any, source: str) -> StepGroups | None:
    """Groups of steps from untrusted JSON ({"total": 10, "starts": [0, 5]}, and "first", the first that runs;
    None stays None); raises AquabitError naming ``source``."""
    if value is None:
        return None
    numbers = []
    if isinstance(value, Mapping) and isinstance(starts := value.get("starts"), list | tuple):
        numbers = [value.get("total"), value.get("first", 0), *starts]
    if (
        not numbers
        or {*value, "first"} != {"total", "starts", "first"}
        or any(type(n) is not int for n in numbers)
    ):
        raise AquabitError(
            f'{source}: step_groups {value!r:.60} must be as {{"total": 10, "starts": [0, 5]}}'
        )
    return StepGroups(numbers[0], tuple(numbers[2:]), numbers[1])


def read_space(path: str | Path) -> dict[str, Any]:
    """The keyword arguments of ``make_space`` from a JSON file: schemes, levels, formats, activations,
    pinned, excluded, correction, step_groups, tied."""
    value = read_json(path)
    known = {
        "schemes": list,
        "levels": list,
        "formats": dict,
        "activations": list,
        "pinned": dict,
        "excluded": list,
        "correction": str,
        "step_groups": dict,
        "tied": list,
    }
    if not isinstance(value, dict):
        raise AquabitError(f"{path} must hold a JSON object with any of {', '.join(known)}")
    for key, entry in value.items():
        if key not in known:
            raise AquabitError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
        if not isinstance(entry, known[key]):
            raise AquabitError(f"{path}: {key} is {entry!r:.60}; it must be a {known[key].__name__}")
    for level in value.get("levels", []):
        if not isinstance(level, int | float) or isinstance(level, bool) or not 0 < level <= 16:
            raise AquabitError(
                f"{path}: level {level!r} must be a number of code bits per weight, as in 2 or 1.5"
            )
    rows = value.get("formats", {}).values()
    if any(not isinstance(row, list) for row in rows):
        raise AquabitError(f"{path}: formats must map operator patterns to lists of additive schemes")
    for scheme in (*value.get("schemes", []), *value.get("pinned", {}).values(), *chain.from_iterable(rows)):
        if not isinstance(scheme, str):
            raise AquabitError(f"{path}: scheme {scheme!r} must be text, as in usq4")
        Scheme.parse(scheme)
    for pattern in value.get("excluded", []):
        if not isinstance(pattern, str):
            raise AquabitError(f"{path}: excluded pattern {pattern!r} must be text, as in conv_in")
    for patterns in value.get("tied", []):
        if not isinstance(patterns, list) or len(patterns) < 2 or not all(type(p) is str for p in patterns):
            raise AquabitError(
                f"{path}: tied holds {patterns!r:.60}; it must hold lists of two or more patterns of layers,"
                ' as in [["*.to_q", "*.to_k", "*.to_v"]]'
            )
    for rounding in value.get("activations", []):
        known_rounding(rounding, path)
    parse_correction(value.get("correction"))
    read_groups(value.get("step_groups"), str(path))
    return value
