"""A search that was interrupted goes the same way again: what it measured is there, and comes to light in the
order in which it is asked for, so that the front is that of an undisturbed one, whatever the number of
workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from aquabit.measuring.session import Session
from aquabit.scheme import digest
from aquabit.search.search_options import SearchOptions

BEGUN = "search_begun"  # the fact of a study: what was asked for, and how many measurements there were


def _asked(session: Session, options: SearchOptions) -> str:
    """What an interrupted search must agree in to be continued: the options, the protocol, and what the user
    had measured."""
    own = {k: getattr(options, k) for k in ("method", "rounds", "seed")}
    own |= {"per_round": options.proposed, "screen": options.screened}
    rivals = [(name, config.digest) for name, config in options.against]
    study = session.study
    table = study.measurements(session.protocol, failed=True)
    samples = int(table.kind.isin(("sample", "flip")).sum())
    facts = [asdict(options.budget), own, rivals, list(options.spread), session.protocol.to_dict(), samples]
    return digest(facts)


@contextmanager
def continuing(session: Session, options: SearchOptions) -> Iterator[None]:
    """While a search lasts: the study shows what was measured before this search began, and what it has asked
    for since. Ended by an error, the next search with the same options goes on from there."""
    study, asked = session.study, _asked(session, options)
    begun = study.get(BEGUN)
    if not (isinstance(begun, dict) and begun.get("asked") == asked and type(begun.get("rows")) is int):
        begun = {"asked": asked, "rows": study.last_row()}
        study.set(**{BEGUN: begun})
    study.hide_after(begun["rows"])
    try:
        yield
        study.set(**{BEGUN: None})
    finally:
        study.hide_after(None)
