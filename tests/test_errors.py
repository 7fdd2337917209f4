"""Errors are one line that a terminal shows as it is."""

from __future__ import annotations

import pickle

from aquabit.errors import AquabitError


def test_a_message_is_one_line_of_printable_characters() -> None:
    error = AquabitError("layer 'a\nb' \x1b[31mred\x07 \ud800 é ٣ is\t unknown")
    assert str(error) == r"layer 'a b' \x1b[31mred\x07 \ud800 é ٣ is unknown"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(AquabitError()) == ""
