"""A search that was killed anywhere ends, continued, with the front of one that was not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aquabit.search.continuing import BEGUN
from aquabit.study import Study
from tests.search.test_search import World, cheap  # noqa: F401 (a fixture)


class Killed(BaseException):
    pass


def stopped_at(world: World, count: int, **options: Any) -> bool:
    """Search until ``count`` measurements and output errors more were recorded; whether it came so far."""
    left = [count]
    real = {name: getattr(Study, name) for name in ("record", "add_outputs")}

    def counted(name: str) -> Any:
        def call(self: Study, *given: Any, **named: Any) -> None:
            if left[0] <= 0:
                raise Killed
            left[0] -= 1
            real[name](self, *given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(Study, name, counted(name))
        try:
            world.find(**options)
        except Killed:
            return True
    return False


def copied(world: World, folder: Path) -> World:
    folder.mkdir()
    shutil.copy(world.study.path, folder / "s.db")
    made = World(**{**world.__dict__, "study": Study(folder / "s.db")})
    return made


def answer(world: World, **options: Any) -> tuple[Any, int]:
    front = world.find(**options)
    return [{k: v for k, v in m.items() if k != "latency_ms"} for m in front.to_list()], world.rows()


@pytest.mark.parametrize("method", ["program", "surrogate"])
def test_a_killed_search_ends_as_one_that_was_not(cheap: None, method: str, tmp_path: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {"method": method, "rounds": 1}
    options |= {"per_round": 2, "screen": 2} if method == "surrogate" else {}
    (tmp_path / "first").mkdir()
    begun = World.at(tmp_path / "first")
    if method == "surrogate":  # which learns from measurements
        from aquabit import workflows
        from tests.search.test_search import PROTOCOL, SPACE

        workflows.measure(begun.pipe, begun.study, 12, protocol=PROTOCOL, space=SPACE, bank=begun.bank)
    begun.study.close()
    whole = copied(begun, tmp_path / "whole")
    expected, rows = answer(whole, **options)
    killed = copied(begun, tmp_path / "killed")
    kills = 0
    for count in (1, 9, 2, 25, 14, 3, 7, 31) * 8:
        if not stopped_at(killed, count, **options):
            break
        kills += 1
    else:
        raise AssertionError("it never ended")
    assert kills >= 3
    found = [{k: v for k, v in m.items() if k != "latency_ms"} for m in killed.study.get("front")["members"]]
    assert found == expected
    assert killed.rows() == rows, "nothing is measured that the undisturbed one did not need"
    assert killed.study.get(BEGUN) is None


def test_what_was_asked_otherwise_is_another_search(cheap: None, tmp_path: Path) -> None:  # noqa: F811
    world = World.at(tmp_path)
    assert stopped_at(world, 5)  # what two backward passes found, and three measurements
    before = world.study.get(BEGUN)
    assert stopped_at(world, 1, rounds=0)
    after = world.study.get(BEGUN)
    assert after["asked"] != before["asked"] and after["rows"] == 3, "what the first one measured is known"
