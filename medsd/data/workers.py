"""Processes that may be killed: where hostile files are decoded.

A *job* is a function and its arguments; while it runs it announces its *steps* (one per file). A worker that takes too long
for one step, dies, or runs out of memory costs that step alone: the pool kills it, starts another, and says which step it was.
"""

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from medsd.runtime import DIE_WITH_PARENT

Announce = Callable[[int], None]
"""Told the number of the step that begins."""
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **{"MALLOC_TRIM_THRESHOLD_": str(2**28), "MALLOC_MMAP_THRESHOLD_": str(2**26)},
}
"""One thread a worker, and freed memory kept for the next image: else glibc hands each back and the kernel clears it anew."""
SECONDS_TO_DIE = 1.0
"""A process that hung up has this long to be gone by itself, so that its exit code can be told."""


@dataclass(frozen=True)
class Job:
    """`function(*arguments, announce)`, run in a worker; both are pickled, so the function is a module's."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its result, or the step at which it failed and why."""

    job: Job
    result: Any = None
    failure: str | None = None
    step: int | None = None


class WorkerPool:
    """`workers` processes that take jobs in their order; use it as a context manager.

    Args:
        workers: number of processes; 0 runs jobs in this process, without any protection.
        seconds: longest time for one step.
        memory: bytes of address space that a worker may add to what it starts with.
    """

    def __init__(self, workers: int, seconds: float, memory: int) -> None:
        self.count, self.seconds, self.memory = workers, seconds, memory
        self.waiting: deque[Job] = deque()
        self.workers: list[_Worker] = []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.kill()

    def submit(self, job: Job, first: bool = False) -> None:
        """Add a job, at the head of the queue where `first`."""
        (self.waiting.appendleft if first else self.waiting.append)(job)

    def outcomes(self) -> Iterator[Outcome]:
        """Each job's outcome as it is known, in any order, until no job is left. Raises what a job raised."""
        if self.count == 0:
            while self.waiting:
                yield _run_here(self.waiting.popleft())
            return
        while self.waiting or any(worker.job for worker in self.workers):
            self._hand_out()
            done = [outcome for worker in list(self.workers) if (outcome := self._look_at(worker))]
            yield from done
            if not done:
                wait([worker.connection for worker in self.workers if worker.job], timeout=1.0)

    def _hand_out(self) -> None:
        idle = [worker for worker in self.workers if worker.job is None]
        for job in [self.waiting.popleft() for _ in range(min(len(self.waiting), self.count - len(self.workers) + len(idle)))]:
            if not idle:
                self.workers.append(_Worker.start(self.memory))
                idle.append(self.workers[-1])
            idle.pop().take(job)

    def _look_at(self, worker: "_Worker") -> Outcome | None:
        """The worker's outcome, if it has one; a worker that failed is replaced when the next job comes."""
        if worker.job is None:
            return None
        outcome = worker.listen()
        if outcome is None and time.monotonic() - worker.since > self.seconds:
            outcome = Outcome(worker.job, failure=f"took longer than {self.seconds:g} s", step=worker.step)
        if outcome is not None and outcome.failure is not None:
            worker.kill()
            self.workers.remove(worker)
        return outcome


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    job: Job | None = None
    step: int | None = None
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, memory: int) -> "_Worker":
        here, there = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | ENVIRONMENT
        command = [sys.executable, "-c", "from medsd.data.workers import serve; serve()", str(there.fileno()), str(memory)]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, pass_fds=[there.fileno()], env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
        there.close()
        return cls(process, Connection(here.detach()))

    def take(self, job: Job) -> None:
        self.job, self.step, self.since = job, None, time.monotonic()
        with contextlib.suppress(ConnectionError):  # The worker is dead, which `listen` finds.
            self.connection.send_bytes(pickle.dumps(job))

    def listen(self) -> Outcome | None:
        """Read what the worker has said; its outcome if it said it, or died. Raises what its job raised."""
        while True:
            try:
                if not self.connection.poll():
                    return None
                kind, value = pickle.loads(self.connection.recv_bytes())
            except (EOFError, OSError):  # OSError also where it died in the middle of a word.
                return Outcome(self.job, failure=self._cause_of_death(), step=self.step)
            self.since = time.monotonic()
            if kind == "step":
                self.step = value
                continue
            job, self.job = self.job, None
            if kind == "error":
                raise value
            return Outcome(job, **{kind: value}, step=self.step)

    def _cause_of_death(self) -> str:
        try:
            code = self.process.wait(SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            return "ended the decoder (which hung up and went on)"
        return f"ended the decoder ({signal.Signals(-code).name})" if code < 0 else f"ended the decoder (exit code {code})"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def serve() -> None:
    """A worker's life: limits, then jobs until the pool hangs up."""
    connection, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory(memory)
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        outcome = _run(job, lambda step: connection.send_bytes(pickle.dumps(("step", step))))
        connection.send_bytes(pickle.dumps(outcome))


def _limit_memory(memory: int) -> None:
    with open("/proc/self/statm") as stream:
        most = int(stream.read().split()[0]) * resource.getpagesize() + memory
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(job: Job, announce: Announce) -> tuple[str, Any]:
    import warnings

    try:
        with warnings.catch_warnings():
            # What libraries warn about quotes headers, which may hold an identity.
            warnings.simplefilter("ignore")
            return "result", job.function(*job.arguments, announce)
    except MemoryError:
        return "failure", "needs more memory than a worker has"
    except Exception as error:
        return "error", _sendable(error)


def _sendable(error: Exception) -> Exception:
    """The error itself, unless another process could not make it again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _run_here(job: Job) -> Outcome:
    steps = [None]
    kind, value = _run(job, steps.append)
    if kind == "error":
        raise value
    return Outcome(job, **{kind: value}, step=steps[-1])
