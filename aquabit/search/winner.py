"""The winner under a budget: finalists are told apart by paired distances on common seeds, and by the
objective where it can tell."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np

from aquabit.measuring.latency import packed_latencies
from aquabit.quality import PAIRED
from aquabit.scheme import AquabitError, Protocol, QuantConfig
from aquabit.search.judging import Judgement, judge, paired_metric, pieces
from aquabit.search.search import Search
from aquabit.stats import LEVEL, paired_difference

FINALISTS = 8  # candidates under the budget that are judged on common seeds
# where the objective is no paired distance, finalists have it on these: the protocol's own seeds chose them
OBJECTIVE_BLOCKS = (3, 4, 5, 6)
OBJECTIVE_RIVALS = 2  # finalists of the best objective that are compared with the winner


def choose_winner(search: Search) -> tuple[QuantConfig, Judgement]:
    """The best configuration under the budget: by paired distances on common seeds, and by the
    objective where it can tell."""
    session, protocol = search.session, search.session.protocol
    fidelity = paired_metric(protocol)
    values, usable = search.values(fidelity), search.usable()
    configs = [c for c, ok in zip(usable.values(), search.within(list(usable.values())), strict=True) if ok]
    configs = [c for c in configs if isfinite(values.get(c.digest, float("nan")))]
    given = {c.digest for _, c in search.given}
    configs.sort(key=lambda c: (values[c.digest], search.costs(c).bytes, c.digest))
    if search.options.budget.latency_ms is not None:
        configs = _fast(search, configs)
    if not configs:
        raise AquabitError(
            f"no measured configuration keeps the budget ({search.options.budget}); every candidate failed"
        )
    objective = search.values(protocol.objective)
    best_by_objective = sorted(configs, key=lambda c: objective.get(c.digest, float("inf")))[:1]
    chosen = (*configs[:FINALISTS], *best_by_objective, *(c for c in configs if c.digest in given))
    finalists = list({c.digest: c for c in chosen}.values())

    def measure(indices: Sequence[int], count: int) -> np.ndarray:
        blocks = pieces(protocol, count, search.options.seed, _conditions(search, protocol))
        session.measure_full(blocks, "judging seeds", search.progress)
        asked = [finalists[i] for i in indices]
        session.measure(asked, "selection", search.progress, blocks, "telling finalists apart")
        tables = [search.values(fidelity, b) for b in blocks]
        return np.array([[t.get(finalists[i].digest, float("nan")) for t in tables] for i in indices])

    judgement = judge(range(len(finalists)), measure)
    winner = finalists[judgement.winner]
    if protocol.objective not in PAIRED and ":" not in protocol.objective:
        winner = _by_objective(search, winner, finalists)
    return winner, judgement


def _conditions(search: Search, protocol: Protocol) -> tuple[str | int, ...] | None:
    """The prompts or classes of a protocol, so that small blocks go on in them; None where images are
    made from nothing."""
    adapter = search.session.here.adapter
    return None if adapter.kind == "batch_size" else tuple(adapter.conditions(protocol))


def _fast(search: Search, configs: Sequence[QuantConfig]) -> list[QuantConfig]:
    """The first FINALISTS whose whole packed call keeps the limit of latency; raises AquabitError
    where none does."""
    limit, kept, calls = search.options.budget.latency_ms, list[QuantConfig](), list[float]()
    assert limit is not None
    for config in configs[: 3 * FINALISTS]:
        calls += packed_latencies(search.session.here, [config], search.progress, search.session.protocol)
        if calls[-1] <= limit:
            kept.append(config)
        if len(kept) == FINALISTS:
            break
    if not kept and calls:
        least = min(calls)
        raise AquabitError(
            f"the layers of {len(calls)} configurations add up to {limit:g} ms or less, but whole calls"
            f" take {least:.3g} ms or more; allow a latency of {1.05 * least:.3g}"
        )
    return kept


def _by_objective(search: Search, winner: QuantConfig, finalists: Sequence[QuantConfig]) -> QuantConfig:
    """``winner``, or where its objective is shown to be worse than full precision's, the finalist whose
    objective is better beyond doubt (paired intervals over blocks of seeds, at 95 % for all rivals together).

    Rivals are those that the protocol's own seeds favour, so that these seeds do not count: of a hundred
    configurations the luckiest is better on them than it is.

    A quantized model is to be like the model that it replaces: what lies below full precision's FID is no
    gain, it is noise of another kind (36 dB can have a lower FID than 47).
    """
    session, metric = search.session, search.session.protocol.objective
    protocols = [session.protocol.block(b) for b in OBJECTIVE_BLOCKS]
    first = search.values(metric)
    own = first.get(winner.digest, np.inf)
    rivals = [c for c in finalists if c.digest != winner.digest and first.get(c.digest, np.inf) < own]
    rivals = sorted(rivals, key=lambda c: first[c.digest])[:OBJECTIVE_RIVALS]
    if not rivals:
        return winner
    session.measure_full(protocols, "judging seeds", search.progress)
    what = f"telling finalists apart by {metric}"
    session.measure([winner, *rivals], "selection", search.progress, protocols, what)
    tables = [search.values(metric, p) for p in protocols]

    def blocks(config: QuantConfig) -> list[float]:
        return [t.get(config.digest, float("nan")) for t in tables]

    if not paired_difference(blocks(winner), blocks(session.space.full_precision())).low > 0:
        return winner
    for rival in rivals:
        level = 1 - (1 - LEVEL) / len(rivals)
        if paired_difference(blocks(rival), blocks(winner), level=level).high < 0:
            return rival
    return winner
