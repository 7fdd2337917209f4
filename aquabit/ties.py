"""Layers that choose together: members of a tied group have one weight scheme and one choice of activation
bits, as where a program stores them in one tensor.

Patterns become groups of layers here, without numpy, which the command line does not wait for; searches count
them as ``tied_groups.Groups``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from aquabit.scheme import AquabitError, Scheme

Tied = tuple[tuple[str, ...], ...]  # groups of two layers or more, in the order of their first layers


def find_ties(lists: Iterable[Sequence[str]], layers: Sequence[str], strict: bool = True) -> Tied:
    """The groups that lists of patterns (as in shells) make: layers that match patterns of one list and whose
    stars stand for the same text.

    Raises AquabitError for layers that two lists tie to different partners; where ``strict``, also for a list
    that ties nothing and a pattern that names no layer.
    """
    found: dict[str, tuple[str, ...]] = {}
    for patterns in lists:
        groups = [tuple(k for k in layers if k in names) for names in _by_stars(patterns, layers).values()]
        groups = [group for group in groups if len(group) > 1]
        if strict:
            _check_list(patterns, groups, layers)
        for name, own in ((name, group) for group in groups for name in group):
            if found.setdefault(name, own) != own:
                raise AquabitError(
                    f"layer {name!r} is tied to {_others(name, found[name])} by one list and to"
                    f" {_others(name, own)} by another; give one list that names them all"
                )
    return in_order(tuple(dict.fromkeys(found.values())), layers)


def joined(*ties: Tied) -> Tied:
    """Several groups of ties as one: groups that have a layer in common become one group."""
    groups: list[tuple[str, ...]] = []
    for group in (group for tied in ties for group in tied):
        near = [other for other in groups if set(other) & set(group)]
        groups = [other for other in groups if other not in near]
        groups.append(tuple(dict.fromkeys(name for other in (*near, group) for name in other)))
    return tuple(groups)


def in_order(tied: Tied, layers: Sequence[str]) -> Tied:
    """Groups and their members in the order of layers."""
    place = {name: i for i, name in enumerate(layers)}
    rows = (tuple(sorted(group, key=place.__getitem__)) for group in tied)
    return tuple(sorted(rows, key=lambda group: place[group[0]]))


def _check_list(patterns: Sequence[str], groups: Sequence[tuple[str, ...]], layers: Sequence[str]) -> None:
    first = f"for example the first layer is {layers[0]!r}"
    for pattern in patterns:
        if not any(map(_matcher(pattern).fullmatch, layers)):
            raise AquabitError(f"tied pattern {pattern!r} matches no layer; {first}")
    if not groups:
        raise AquabitError(
            f"tied {list(patterns)} ties nothing: no two layers match it with stars that stand for the same"
            f" text; {first}"
        )


def _by_stars(patterns: Sequence[str], layers: Sequence[str]) -> dict[tuple[str, ...], set[str]]:
    """What stars stand for -> the layers that match some pattern so."""
    found: dict[tuple[str, ...], set[str]] = {}
    for pattern in patterns:
        matcher = _matcher(pattern)
        for name in layers:
            if match := matcher.fullmatch(name):
                found.setdefault(match.groups(), set()).add(name)
    return found


def _matcher(pattern: str) -> re.Pattern[str]:
    """A pattern as in shells, with a group for each star."""
    parts = pattern.split("*")
    plain = [fnmatch.translate(part).removeprefix("(?s:").removesuffix(")\\Z") for part in parts]
    return re.compile("(.*)".join(plain), re.DOTALL)


def _others(name: str, group: tuple[str, ...]) -> str:
    return ", ".join(repr(other) for other in group if other != name)


def common_choices(choices: Mapping[str, tuple[Scheme, ...]], tied: Tied) -> dict[str, tuple[Scheme, ...]]:
    """Choices with those of tied layers narrowed to what all members may take; raises AquabitError, naming
    them, where that is nothing."""
    found = dict(choices)
    for group in tied:
        row = tuple(s for s in choices[group[0]] if all(s in choices[name] for name in group))
        if not row:
            options = "; ".join(f"{name}: {', '.join(map(str, choices[name]))}" for name in group)
            raise AquabitError(
                f"tied layers have no scheme in common ({options}); give one that all of them may take, or"
                " tie fewer"
            )
        found |= dict.fromkeys(group, row)
    return found
