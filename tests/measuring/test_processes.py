"""Worker processes: what they answer, half of it, and where their modules come from."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from aquabit.measuring import pipe
from aquabit.measuring.pools.processes import _Worker
from aquabit.measuring.tasks import Answer


@pytest.mark.parametrize("said", ["", '{"$Answer": {"res', '{"$Answer": {}}'])
def test_a_worker_that_dies_while_it_answers_is_dead(said: str) -> None:
    worker = _Worker.__new__(_Worker)
    worker.process = SimpleNamespace(stdin=io.StringIO(), stdout=io.StringIO(said))  # type: ignore[assignment]
    with pytest.raises(EOFError):
        worker.ask(Answer())  # type: ignore[arg-type]


def test_names_that_look_like_marks_cross_the_pipe() -> None:
    answer = Answer({"$Scheme": 1.5, "plain": {"$tuple": [1, 2]}, "$dict": {"$bytes": "x"}})
    assert pipe.value(pipe.text(answer)) == answer


START = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from aquabit.measuring.pools.processes import _Worker
sys.path.insert(0, "")  # as python -c and notebooks have it; workers must not
from aquabit.measuring import pipe
import subprocess
real = subprocess.Popen
def popen(command, **more):
    print(*command, flush=True)
    return real(command, **more)
subprocess.Popen = popen
worker = _Worker.__new__(_Worker)
worker.ask = lambda begin: None
worker.__init__(None)
print(worker.process.pid, flush=True)
time.sleep(float(sys.argv[1]))
worker.process.stdin.close()
print("ended", worker.process.wait(30))
"""


def test_modules_of_the_folder_one_stands_in_do_not_run(tmp_path: Path) -> None:
    for name in ("base64", "queue", "json"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nraise ImportError\n")
    (tmp_path / "start").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", START, "0"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ended 0" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "ran").exists() and "Traceback" not in done.stderr


def test_ctrl_c_shows_nothing_of_workers(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", START, "20"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout and parent.stderr
        parent.stdout.readline()
        worker = int(parent.stdout.readline())
        os.killpg(parent.pid, signal.SIGINT)
        _, said = parent.communicate(timeout=60)
    assert said.count("Traceback") == 1  # of the parent, which is this test's program
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its parent")


def test_a_worker_watches_its_parent_before_it_imports_what_takes_long() -> None:
    code = (
        "import os, sys, threading\n"
        "import aquabit.measuring.worker as worker\n"
        "threading.Thread.start = lambda self: os._exit(7 if 'torch' in sys.modules else 5)\n"
        "worker.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 5
