"""What a study lacks for a report, and the command that makes it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from aquabit.reports.facts import Facts, number

Lacks = Mapping[str, tuple[str, str]]  # name -> one sentence, and the command (empty where there is none)

MEASURE = "aquabit measure {model} --study {study}"
SEARCH = "aquabit search {study} --bits 3.0"


def _told(part: str) -> Callable[[Facts], Any]:
    """Whether the sensitivity has a part: rows of a table, or values."""
    return lambda facts: facts.sensitivity is not None and len(getattr(facts.sensitivity, part)) > 0


def _effects(facts: Facts) -> bool:
    return facts.sensitivity is not None and bool(facts.sensitivity.layers.effect.notna().any())


def _images(facts: Facts) -> bool:
    own = facts.protocol.digest if facts.protocol else ""
    return any(protocol == own for _, protocol in facts.thumbnails)


# command -> name -> whether it is there, and what is said where it is not
NEEDS: Mapping[str, Mapping[str, tuple[Callable[[Facts], Any], str]]] = {
    MEASURE: {
        "graph": (
            lambda f: f.layers,
            "The study holds no layer graph, so layers have no operator type, size or place.",
        ),
        "reference": (lambda f: len(f.rows("reference")), "The full-precision model was not measured."),
        "uniform": (lambda f: len(f.rows("uniform")), "No uniform configuration was measured."),
        "images": (_images, "No images are stored."),
    },
    f"{MEASURE} --samples 120": {
        "samples": (lambda f: len(f.rows("sample")), "No configuration of a design was measured.")
    },
    "aquabit explain {study}": {
        "layers": (_effects, "The effects of layers were not estimated."),
        "operators": (_told("operators"), "There are no effects by operator type."),
        "blocks": (_told("blocks"), "There are no effects by block."),
        "surrogate": (lambda f: f.scores, "The surrogate's held-out scores are not stored."),
        "scatter": (_told("scatter"), "There are no out-of-fold predictions."),
        "swarm": (
            lambda f: f.sensitivity and f.sensitivity.swarm.get("shap"),
            "SHAP values of single configurations are not stored.",
        ),
        "curve": (_told("curve"), "There is no learning curve."),
        "pairs": (_told("interactions"), "No pair of layers was looked at."),
        "scores": (_told("scores"), "Schemes have no scores by operator type."),
    },
    "aquabit validate {study} --flips 40": {
        "swaps": (lambda f: f.validation.get("rows"), "No predicted effect was checked against real swaps.")
    },
    SEARCH: {
        "front": (lambda f: f.members, "No configuration was searched for."),
        "latency": (
            lambda f: any(math.isfinite(number(m.latency_ms)) for m in f.members),
            "No found configuration was timed.",
        ),
        "operations": (
            lambda f: any(m.operations for m in f.members),
            "The operations of found configurations are not stored.",
        ),
        "winner": (lambda f: f.front and f.front.winner, "No configuration was chosen."),
        "comparison": (
            lambda f: "winner" in f.comparison,
            "The winner was not compared with a uniform configuration on fresh seeds.",
        ),
    },
}


def missing(facts: Facts) -> dict[str, tuple[str, str]]:
    """What the study lacks: name -> (one sentence, the command that makes it; empty while a run goes on,
    which makes it)."""
    names = {"model": shlex.quote(facts.model or "MODEL"), "study": shlex.quote(facts.source)}
    lacks = {
        name: (sentence, "" if facts.running else command.format(**names))
        for command, needs in NEEDS.items()
        for name, (there, sentence) in needs.items()
        if not there(facts)
    }
    if "comparison" in lacks and "same_quality" in facts.comparison:
        lacks["comparison"] = (
            "No uniform configuration of the space is as large as the winner, so none was compared with it at"
            " its size.",
            "",
        )
    if facts.foreign:
        lacks["protocols"] = (
            f"{facts.foreign} measurements were made under other protocols and are left out: numbers of"
            " different protocols never mix.",
            "",
        )
    return lacks
