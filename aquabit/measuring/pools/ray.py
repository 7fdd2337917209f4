"""Ray: the same tasks on the machines of a cluster; one actor for each GPU, or for each CPU slot, holds
the model and its bank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aquabit.measuring.tasks import LOWER, Answer, Begin, Result, Task, WorkerFault
from aquabit.scheme import AquabitError

SAME = ("aquabit", "torch", "diffusers", "numpy")  # what every machine must have in the driver's version
# workers that one task may cost: machines are taken away, but a task that kills each of them is no accident
TRIES = 4
STARTS = 3  # workers in a row that do not even start
ANSWER_SECONDS = 60  # for a cluster to answer at its address
START_SECONDS = 600  # for the first worker to find a free slot
POLL_SECONDS = 2.0  # between looks at whether machines joined
PIECE = 32 << 20  # bytes of a model's file that are sent at once


def versions() -> dict[str, str]:
    """The packages that results depend on, without the build that a version names (cpu, cu130)."""
    return {name: version(name).partition("+")[0] for name in SAME}


@dataclass(frozen=True)
class _Job:
    """A task, its place among those asked for, and how many workers it was given to."""

    place: int
    task: Task[Any]
    attempt: int = 1


class Seat:
    """The actor: one worker of a cluster. Tasks and answers cross as the values they are (Ray pickles them,
    inside one trusted cluster), and the files of a model that its machine lacks."""

    def __init__(self) -> None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = "1"  # before torch and numpy are there: results do not depend on cores
        from aquabit.measuring.responder import Responder

        self._respond = Responder()
        self._received: tempfile.TemporaryDirectory[str] | None = None

    def receive(self, name: str, piece: bytes) -> None:
        """A piece of a file of the model's folder, after those before it."""
        if self._received is None:
            self._received = tempfile.TemporaryDirectory(prefix="aquabit-model-")
        path = Path(self._received.name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(piece)

    def begin(self, task: Begin, folder: bool, wanted: dict[str, str]) -> Answer:
        """Load the model, a folder or a name; the result is whether it is there, or its folder must be sent
        first. An error where versions are not ``wanted``, and where the model is not the driver's."""
        node, own = socket.gethostname(), versions()
        differing = [name for name in SAME if own[name] != wanted[name]]
        if differing:
            said = ", ".join(f"{name} {own[name]} instead of {wanted[name]}" for name in differing)
            return Answer(error=f"the worker on {node} has {said}; install the driver's versions there")
        if self._received is not None:
            task = replace(task, model=self._received.name)
        elif folder and not Path(task.model).is_dir():
            return Answer(False)
        answer = self._respond(task)
        if answer != Answer():
            return answer
        from aquabit.quant.model import fingerprint

        found = fingerprint(self._respond.evaluator.adapter.network)
        if found == task.fingerprint:
            return Answer(True)
        return Answer(
            error=f"the model {task.model} is {found} on {node}, and {task.fingerprint} here; give all"
            " machines the same files"
        )

    def ask(self, task: Task[Any]) -> Answer:
        """The answer to a task, see ``worker.Responder``."""
        return self._respond(task)


class RayPool:
    """Runs tasks on a Ray cluster; ``begin`` is the first task each worker gets.

    A worker or machine that is lost costs the task it was at, which another gets; machines that join are
    used. Raises AquabitError for an address where no cluster answers, for one without a free slot, and for
    workers of other versions.
    """

    def __init__(self, address: str, begin: Begin):
        self.ray: Any = _ray()
        self.kind = "GPU" if begin.device.startswith("cuda") else "CPU"
        if ":" in begin.device:
            raise AquabitError(
                f"device {begin.device} names one GPU; on a cluster each worker has its own: give --device"
                " cuda"
            )
        self.folder = Path(begin.model).is_dir()
        self.begin = replace(begin, model=os.path.abspath(begin.model)) if self.folder else begin
        self.address, self._ours = address, _connect(self.ray, address)
        slot = {f"num_{self.kind.lower()}s": 1}
        self._seat = self.ray.remote(Seat).options(**slot, max_restarts=0, max_task_retries=0)
        self._idle: list[Any] = []
        # answer -> (actor, its task; None while it begins)
        self._pending: dict[Any, tuple[Any, _Job | None]] = {}
        self._stray: set[Any] = set()  # answers that nobody waits for any more
        self._bad_starts, self._since, self._started = 0, time.monotonic(), False
        if not self.slots():
            self.close()
            raise AquabitError(
                f"the Ray cluster at {address} has no {self.kind}; use --device"
                f" {'cpu' if self.kind == 'GPU' else 'cuda'}"
            )

    def slots(self) -> int:
        """GPUs or CPU slots of the cluster as it is now."""
        return int(self.ray.cluster_resources().get(self.kind, 0))

    @property
    def workers(self) -> int:
        return max(1, self.slots())

    def run(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        """In order of completion. A task that costs several workers raises AquabitError."""
        waiting = deque(_Job(place, task) for place, task in enumerate(tasks))
        owed = len(waiting)
        try:
            while owed:
                self._staff(owed)
                while waiting and self._idle:
                    self._give(self._idle.pop(), waiting.popleft())
                for answer in self._ready():
                    seat, job = self._pending.pop(answer)
                    try:
                        said: Answer = self.ray.get(answer)
                    except self.ray.exceptions.RayTaskError as error:
                        raise WorkerFault(str(error)) from error
                    except self.ray.exceptions.RayError as error:  # the worker or its machine is gone
                        self._lost(answer, seat, job, waiting, error)
                        continue
                    if job is None:
                        self._begun(seat, said)
                        continue
                    self._idle.append(seat)
                    if answer in self._stray:
                        self._stray.discard(answer)
                    else:
                        owed -= 1
                        yield job.place, said.value()
        finally:
            self._stray = {answer for answer, (_, job) in self._pending.items() if job is not None}

    def _ready(self) -> list[Any]:
        """The next answer, or none where there is none yet."""
        if self._pending:
            return list(self.ray.wait(list(self._pending), num_returns=1, timeout=POLL_SECONDS)[0])
        time.sleep(POLL_SECONDS)
        return []

    def _give(self, seat: Any, job: _Job) -> None:
        self._pending[seat.ask.remote(job.task)] = seat, job

    def _start(self, seat: Any) -> None:
        self._pending[seat.begin.remote(self.begin, self.folder, versions())] = seat, None

    def _staff(self, owed: int) -> None:
        """Start workers where slots are free, no more than there are tasks."""
        slots, here = self.slots(), len(self._idle) + len(self._pending)
        if here and self._started:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > START_SECONDS:
            what = "are all taken by others" if slots else "are gone"
            raise AquabitError(
                f"no worker started on the Ray cluster at {self.address} in {START_SECONDS} s: its"
                f" {self.kind} slots {what}; what was measured is kept: run the same command again"
            )
        for _ in range(min(slots, owed) - here):
            self._start(self._seat.remote())

    def _begun(self, seat: Any, said: Answer) -> None:
        """A worker has loaded the model, or needs its files."""
        if not said.value():
            try:
                for name, piece in _pieces(Path(self.begin.model)):
                    self.ray.get(seat.receive.remote(name, piece))
            except self.ray.exceptions.RayError:
                return  # lost: another takes its place
            self._start(seat)
            return
        self._bad_starts, self._started = 0, True
        self._idle.append(seat)

    def _lost(self, answer: Any, seat: Any, job: _Job | None, waiting: deque[_Job], error: Exception) -> None:
        """A worker is gone: its task goes to another."""
        if job is None:
            self._bad_starts += 1
            if self._bad_starts >= STARTS:
                lines = str(error).splitlines()
                reason = next((line.strip() for line in reversed(lines) if "Error" in line), lines[0])
                raise AquabitError(
                    f"{STARTS} workers in a row died on starting at {self.address} ({reason}); is the same"
                    f" aquabit installed on every machine, and does the model fit into its memory? {LOWER}"
                ) from error
        elif answer in self._stray:
            self._stray.discard(answer)
        elif job.attempt >= TRIES:
            raise AquabitError(
                f"{TRIES} workers of the cluster died on the same task, most likely out of memory; {LOWER}"
            ) from error
        else:
            waiting.appendleft(replace(job, attempt=job.attempt + 1))

    def close(self) -> None:
        for seat in [*self._idle, *(seat for seat, _ in self._pending.values())]:
            self.ray.kill(seat)
        self._idle, self._pending = [], {}
        if self._ours:
            self.ray.shutdown()


def _pieces(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file of a folder, in pieces."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            yield name, file.read(PIECE)
            while piece := file.read(PIECE):
                yield name, piece


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours reports to nobody
    # what Ray does in future, without its warning
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        version("ray")
        import ray
    except (PackageNotFoundError, ImportError) as error:
        raise AquabitError("--ray needs Ray, which is not installed; pip install 'aquabit[ray]'") from error
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Join the cluster at ``address`` as Ray takes it (auto, local, host:port, ray://host:port); whether
    the connection is ours to end."""
    if ray.is_initialized():
        own = ray.get_runtime_context().gcs_address
        if address not in ("auto", own):
            raise AquabitError(
                f"this process is connected to the Ray cluster at {own}; it cannot join {address} as well"
            )
        return False
    if address != "local":
        _check(address)
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level="ERROR",
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except Exception as error:  # Ray raises many types: all mean that there is no cluster to use
        raise _unanswered(address, str(error)) from error
    if hasattr(ray._private.worker, "_worker_logs_enabled"):
        # Ray prints what it says of lost workers to standard output, which is ours
        ray._private.worker._worker_logs_enabled = False
    return True


def _check(address: str) -> None:
    """Raise AquabitError where no cluster answers in time: Ray itself may wait for minutes, or end the
    process that asks."""
    place = address.rpartition("://")[2]
    if address != "auto":
        host, _, port = place.rpartition(":")
        if not host or not port.isdigit():
            raise AquabitError(f"Ray address {address!r} must be auto, local, host:port or ray://host:port")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise _unanswered(address, str(error)) from error
    code = (
        "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"
    )
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise _unanswered(address, f"nothing in {ANSWER_SECONDS} s") from error
    if tried.returncode:
        lines = [line.strip() for line in tried.stderr.splitlines() if line.strip()]
        raise _unanswered(address, lines[-1] if lines else f"exit code {tried.returncode}")


def _unanswered(address: str, reason: str) -> AquabitError:
    said = " ".join(reason.split())[:200] or "no reason given"
    return AquabitError(
        f"no Ray cluster answers at {address!r} ({said}); start one with `ray start --head`, or use --ray"
        " local"
    )
