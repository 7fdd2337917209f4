"""Kills at random moments over all verbs that write: python benchmarks/interruptions.py [--kills 40]
[--seed 0] [--parts measure search ...]

Each part runs a command on a small model once undisturbed, then kills it (SIGKILL, the main process alone)
and runs it again until it ends, over and over from the start, until ``--kills`` kills have been made. After
each kill: no file but a whole one under its own name (that of the undisturbed run, or the one that was there
before), a study that opens and has lost and changed nothing, no process that lives on. At each end: what the
undisturbed run ended with, and not a measurement more.
Writes benchmarks/results/interruptions.json and interruptions.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "AQUABIT_BANK": "bank"}
from benchmarks.common import RESULTS, about, parser, read, write_results

MODEL = Path(__file__).parents[1] / "tests" / "data" / "old" / "model"
MARK = "AQUABIT_INTERRUPTED"  # in the environment of what a part starts: whoever has it lives on
ALONE = 10.0  # seconds in which what was started ends after its parent
RAY_ALONE = 60.0  # the same of Ray's own processes, which look for their parent now and then
FAULTS = ("lost or changed", "doubled", "half a file", "another end", "lives on", "does not end")
MEASURE = "measure model --study s.db --samples 6 --images 4 --steps 2 --workers"


@dataclass(frozen=True)
class Part:
    """A command, in a folder that holds the files ``needs`` of other parts' ends, and the mean time in
    seconds to a kill. ``unordered``: measurements may be recorded in any order."""

    words: str
    needs: tuple[str, ...] = ()
    every: float = 1.5
    unordered: bool = False
    before: str = ""  # a command whose files are there already, to be replaced
    timed: tuple[str, ...] = ()  # files that hold times, besides TIMED

    @property
    def verb(self) -> str:
        return self.words.split()[0]


MEASURED, FOUND = ("bank", "s.db"), ("bank", "s.db", "c.json")
PARTS = {
    "measure": Part(f"{MEASURE} 1", every=2.0),
    "measure, 2 workers": Part(f"{MEASURE} 2", every=6.0, unordered=True),
    "measure on Ray": Part(f"{MEASURE} 1 --ray local", every=15.0, unordered=True),
    "search": Part("search s.db --bits 5 --workers 1 --out c.json", ("measure",), 2.0),
    "search, 2 workers": Part("search s.db --bits 5 --workers 2 --out c.json", ("measure",), 6.0, True),
    "validate": Part("validate s.db --flips 6 --bits 5 --workers 1", ("measure",), 2.0),
    "quantize": Part("quantize model c.json --out packed", ("search",), 0.2),
    "quantize over another": Part(
        "quantize model c.json --out packed",
        ("search",),
        1.0,
        before="quantize model other.json --out packed",
    ),
    "fine-tune": Part("quantize model c.json --out tuned --finetune-steps 20", ("search",), 0.4),
    "generate": Part(
        "generate packed --images 8 --steps 2 --deterministic --out made.png", ("quantize",), 0.3
    ),
    "report": Part("report s.db --out page", ("search",), 2.0),
    "export": Part("export model c.json --to torchao --out exported.json", ("search",), 0.1),
    "explain": Part("explain s.db --json explained.json", ("search",), 0.7),
    "run": Part(
        "run model --out whole --samples 4 --flips 2 --bits 5 --images 4 --steps 2 --workers 1",
        every=4.0,
        timed=(
            *(f"{n}.{kind}" for n in ("front", "frontiers", "counts") for kind in ("csv", "tex", "json")),
            *(f"frontier_latency.{kind}" for kind in ("svg", "pdf", "png")),
        ),
    ),
}


# ---- processes


def started(words: str, folder: Path) -> int:
    """The command in a fork of this process, in which everything is imported; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        from aquabit.cli.app import app

        app(words.split(), standalone_mode=False)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a child that ends in time, or None."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def alive(mark: str) -> dict[int, str]:
    """Processes that were started with the mark, but for this one: number -> command."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(path.name)] = words[:80]
    return {pid: words for pid, words in found.items() if pid != os.getpid()}


def kill(child: int, mark: str, alone: float) -> dict[int, str]:
    """Kill a child; what it had started and lives on after ``alone`` seconds is killed too, and returned."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until = time.monotonic() + alone
    while (left := alive(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return left


# ---- what there is


def files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files that a command leaves, but for those that hold times, or are nobody's
    result."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        skipped = ("model/", "bank/", "log.txt")
        part = any(
            word.endswith(".part") for word in path.relative_to(folder).parts
        )  # what a killed one began
        if not name.startswith(skipped) and ".db" not in name and not part:
            found[name] = sha256(path.read_bytes()).hexdigest()
    return found


TIMED = ("index.html", "status.json")  # pages that say when and how long


def rows(folder: Path) -> list[tuple[str, ...]]:
    """Measurements of the study, as far as they do not depend on time; raises AquabitError for one that does
    not open."""
    from aquabit.study import Study

    found: list[tuple[str, ...]] = []
    for path in sorted((*folder.glob("*.db"), *folder.glob("*/*.db"))):
        study = Study(path, create=False)
        found += study._rows(
            "SELECT config, protocol, kind, status, metrics FROM measurements ORDER BY rowid"
        )
        study.close()
    return found


def facts(folder: Path) -> dict[str, Any]:
    """What else a study holds, but for times."""
    from aquabit.study import Study

    found: dict[str, Any] = {}
    for path in sorted((*folder.glob("*.db"), *folder.glob("*/*.db"))):
        study = Study(path, create=False)
        for (name,) in study._rows("SELECT name FROM facts"):
            found[name] = _timeless(study.get(name))
        found["features"] = {" ".join(k): v for k, v in study.features().items()}
        found["swaps"] = study._rows("SELECT * FROM flips")
        study.close()
    return {k: v for k, v in found.items() if k != "plan"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("latency_ms", "seconds", "created")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


# ---- one part


@dataclass
class Found:
    """Of one part."""

    kills: int = 0
    ends: int = 0
    seconds: float = 0.0  # of the undisturbed run
    faults: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def fault(self, kind: str, what: str) -> None:
        self.faults[kind] += 1
        self.said.append(f"{kind}: {what}")
        print("   ", kind, what, flush=True)


def campaign(name: str, kills: int, seed: int, base: Path) -> Found:
    part, found, random = PARTS[name], Found(), Random(f"{name} {seed}")
    mark = f"{os.getpid()}-{sha256(name.encode()).hexdigest()[:8]}"
    os.environ[MARK] = mark
    with tempfile.TemporaryDirectory(prefix="aquabit-kills-") as place:
        start, whole = Path(place) / "start", Path(place) / "whole"
        _prepare(part, start, base)
        shutil.copytree(start, whole)
        began = time.perf_counter()
        if _run(part.words, whole):
            sys.exit(f"{name} does not run: {(whole / 'log.txt').read_text()[-500:]}")
        found.seconds = time.perf_counter() - began
        shutil.copytree(whole, base / name, dirs_exist_ok=True)
        good, before = files(whole), files(start)
        expected, told, first = rows(whole), facts(whole), rows(start)
        while found.kills < kills:
            folder = Path(place) / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(start, folder)
            seen, code, tries = first, None, 0
            while code is None:
                child = started(part.words, folder)
                # a run that is killed too early each time gets on by nothing: they become rarer
                wait = random.expovariate(1 / part.every) * 1.05**tries if found.kills < kills else 3600
                code = ended(child, wait)
                if code is None:
                    tries += 1
                    found.kills += 1
                    if left := kill(child, mark, RAY_ALONE if "--ray" in part.words else ALONE):
                        found.fault("lives on", ", ".join(left.values()))
                    seen = _whole(folder, good, before, seen, part, found)
            found.ends += 1
            if code:
                found.fault("does not end", f"exit code {code}: {(folder / 'log.txt').read_text()[-300:]}")
                continue
            _whole(folder, good, before, seen, part, found)
            _same_end(folder, good, expected, told, part, found)
    return found


def _run(words: str, folder: Path) -> int | None:
    return ended(started(words, folder), 3600)


def _prepare(part: Part, start: Path, base: Path) -> None:
    start.mkdir()
    shutil.copytree(MODEL, start / "model")
    for need in part.needs:
        shutil.copytree(base / need, start, dirs_exist_ok=True)
        (start / "log.txt").unlink(missing_ok=True)
    if part.before:
        value = json.loads((start / "c.json").read_text())
        for layer in value["layers"].values():
            layer["weight"] = "usq8"
        (start / "other.json").write_text(json.dumps(value))
        if _run(part.before, start):
            sys.exit((start / "log.txt").read_text()[-500:])
        (start / "log.txt").unlink()


Rows = list[tuple[str, ...]]


def _whole(
    folder: Path, good: dict[str, str], before: dict[str, str], seen: Rows, part: Part, found: Found
) -> Rows:
    """Look at what a kill left; the measurements that are there now."""
    for name, hash_ in files(folder).items():
        if not name.endswith((*TIMED, *part.timed)) and hash_ not in (good.get(name), before.get(name)):
            found.fault("half a file", f"{name} ({(folder / name).stat().st_size} bytes)")
    try:
        now = rows(folder)
    except Exception as error:
        found.fault("lost or changed", str(error))
        return seen
    if now[: len(seen)] != seen:
        found.fault("lost or changed", f"{len(seen)} measurements before, {len(now)} now")
    if len({r[:2] for r in now}) != len(now):
        found.fault("doubled", "a measurement")
    return now


def _same_end(
    folder: Path, good: dict[str, str], expected: Rows, told: dict[str, Any], part: Part, found: Found
) -> None:
    """Compare an end with that of the undisturbed run."""
    made, now, ordered = files(folder), rows(folder), sorted if part.unordered else list
    for name in sorted({*made, *good}):
        if not name.endswith((*TIMED, *part.timed)) and made.get(name) != good.get(name):
            found.fault("another end", name)
    if ordered(now) != ordered(expected):
        found.fault("another end", f"{len(now)} measurements instead of {len(expected)}, or others")
    other = facts(folder)
    for name in sorted({*told, *other}):
        if other.get(name) != told.get(name):
            found.fault("another end", f"{name} of the study")


# ---- all


def markdown(found: dict[str, Any]) -> str:
    listed = found["rows"]
    total = {kind: sum(r["faults"].get(kind, 0) for r in listed) for kind in FAULTS}
    lines = [
        "# Interruptions",
        "",
        f"{sum(r['kills'] for r in listed)} kills at random moments; made by `{found['command']}` on",
        f"{about(found['machine'])}. Seconds: of the command undisturbed. Runs: how often it came to its end",
        "between kills; each is compared with the undisturbed one. Lives on: processes that are there after",
        f"{ALONE:.0f} s, those of Ray after {RAY_ALONE:.0f} s.",
        "",
        "| command | seconds | kills | runs | " + " | ".join(FAULTS) + " |",
        "|---|---|---|---|" + "---|" * len(FAULTS),
        *(
            f"| {r['part']} | {r['seconds']:.1f} | {r['kills']} | {r['ends']} | "
            + " | ".join(str(r["faults"].get(kind, 0)) for kind in FAULTS)
            + " |"
            for r in listed
        ),
        f"| **all** | | {sum(r['kills'] for r in listed)} | {sum(r['ends'] for r in listed)} | "
        + " | ".join(str(total[kind]) for kind in FAULTS)
        + " |",
        "",
    ]
    return "\n".join(lines)


def imported() -> None:
    """Everything that a command imports, so that kills fall into its work."""
    modules: tuple[str, ...] = (
        "aquabit.workflows",
        "aquabit.reports",
        "aquabit.search.proof",
        "aquabit.quant.finetuning.finetune",
        "shap",
        "xgboost",
        "sklearn.ensemble",
    )
    for module in modules:
        __import__(module)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=40)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    imported()
    wanted = set(given.parts)
    for name in reversed(PARTS):
        wanted |= set(PARTS[name].needs) if name in wanted else set()
    with tempfile.TemporaryDirectory(prefix="aquabit-base-") as base:
        for name in (n for n in PARTS if n in wanted):
            kills = given.kills if name in given.parts else 0
            found = campaign(name, kills, given.seed, Path(base))
            if name in given.parts:
                _keep(name, found, given.results)


def _keep(name: str, found: Found, results: Path) -> None:
    """Put what was found of one part into the tables, which hold the others'."""
    row = {"part": name, "command": PARTS[name].words, **found.__dict__}
    row |= {"faults": dict(found.faults), "said": found.said[:12]}
    stored = [r for r in read(results / "interruptions.json").get("rows", []) if r["part"] != name]
    listed = sorted([*stored, row], key=lambda r: list(PARTS).index(r["part"]))
    write_results("interruptions", "python benchmarks/interruptions.py", {"rows": listed}, markdown, results)
    print(name, found.kills, found.ends, dict(found.faults), flush=True)


if __name__ == "__main__":
    main()
