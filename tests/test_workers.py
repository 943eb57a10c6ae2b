"""Workers: a step that hangs, crashes or eats memory costs itself and nothing else, and no process is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medsd.data.workers import Job, WorkerPool
from medsd.errors import InputError

MEMORY = 2**29


def add(first, second, announce):
    announce(first)
    return first + second


def hang(number, announce):
    announce(number)
    time.sleep(600)


def hang_in_c(number, announce):
    """Without ever giving back control to Python."""
    announce(number)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.Signals)
    sum(range(10**12))


def abort(number, announce):
    announce(number)
    os.abort()


def quit_early(number, announce):
    announce(number)
    os._exit(3)


def hang_up(number, announce):
    """Close every file and go on."""
    announce(number)
    os.closerange(3, 100)
    time.sleep(600)


def die_in_the_middle_of_a_word(number, announce):
    announce(number)
    connection = announce.__closure__[0].cell_contents
    os.write(connection.fileno(), (1000).to_bytes(4, "big") + b"half of it")
    os._exit(1)


def eat_memory(number, announce):
    announce(number)
    held = []
    while True:
        held.append(bytearray(2**24))


def raise_os_error(announce):
    raise OSError(28, "No space left on device")


def raise_input_error(announce):
    raise InputError("a.png: a mistake")


class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raise_unsendable(announce):
    raise Unsendable("one", "two")


def print_and_warn(announce):
    import warnings

    print("Jane Roe")
    print("Jane Roe", file=sys.stderr)
    warnings.warn("Jane Roe", stacklevel=1)
    return dict(os.environ)


def steps(count, seconds, announce):
    """Each step is shorter than the limit, all of them are longer."""
    for number in range(count):
        announce(number)
        time.sleep(seconds)
    return count


def alive(process):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children():
    """This process's children, zombies among them."""
    return {int(number) for number in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before, files = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() <= before and len(os.listdir("/proc/self/fd")) <= files


def outcomes(jobs, workers=1, seconds=30.0, memory=MEMORY):
    with WorkerPool(workers, seconds, memory) as pool:
        for job in jobs:
            pool.submit(job)
        return list(pool.outcomes())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_job_has_its_outcome(workers):
    found = outcomes([Job(add, (number, 10)) for number in range(20)], workers)
    assert {outcome.job.arguments[0]: outcome.result for outcome in found} == {number: number + 10 for number in range(20)}
    assert all(outcome.failure is None and outcome.step == outcome.job.arguments[0] for outcome in found)


@pytest.mark.parametrize(
    ("function", "seconds", "why"),
    [
        (hang, 1.0, "took longer than 1 s"),
        (hang_in_c, 1.0, "took longer than 1 s"),
        (abort, 1.0, r"ended the decoder \(SIGABRT\)"),
        (quit_early, 1.0, r"ended the decoder \(exit code 3\)"),
        (die_in_the_middle_of_a_word, 1.0, r"ended the decoder \(exit code 1\)"),
        (hang_up, 1.0, r"ended the decoder \(which hung up and went on\)"),
        (eat_memory, 30.0, "needs more memory than a worker has"),  # filling it takes a busy machine more than a second
    ],
)
def test_a_step_that_fails_costs_itself_alone(function, seconds, why):
    started = time.monotonic()
    first, *others = outcomes([Job(function, (7,)), *(Job(add, (number, 1)) for number in range(3))], seconds=seconds)
    assert first.step == 7 and re.fullmatch(why, first.failure)
    assert [outcome.result for outcome in others] == [1, 2, 3]
    assert time.monotonic() - started < seconds + 5


def test_the_limit_is_for_a_step_not_for_a_job():
    (outcome,) = outcomes([Job(steps, (5, 0.3))], seconds=1.0)
    assert outcome.result == 5 and outcome.failure is None


def test_a_failed_job_can_be_done_again_first():
    with WorkerPool(1, 30.0, MEMORY) as pool:
        pool.submit(Job(abort, (1,)))
        pool.submit(Job(add, (2, 0)))
        order = []
        for outcome in pool.outcomes():
            order.append(outcome.result)
            if outcome.failure:
                pool.submit(Job(add, (1, 0)), first=True)
    assert order == [None, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [(raise_os_error, OSError, "No space left"), (raise_input_error, InputError, "^a.png: a mistake$")],
)
def test_what_a_job_raises_is_raised_here(workers, function, error, message):
    with pytest.raises(error, match=message):
        outcomes([Job(function, ())], workers)


def test_an_error_that_cannot_be_sent_is_told():
    with pytest.raises(RuntimeError, match="Unsendable: one and two"):
        outcomes([Job(raise_unsendable, ())])


def test_the_pool_goes_on_after_an_error():
    with WorkerPool(1, 30.0, MEMORY) as pool:
        pool.submit(Job(raise_os_error, ()))
        pool.submit(Job(add, (1, 2)))
        with pytest.raises(OSError, match="No space"):
            list(pool.outcomes())
        assert [outcome.result for outcome in pool.outcomes()] == [3]


def test_workers_are_silent_and_single_threaded(capfd):
    (outcome,) = outcomes([Job(print_and_warn, ())])
    assert outcome.result["OMP_NUM_THREADS"] == "1"
    assert capfd.readouterr() == ("", "")


def test_a_lower_limit_of_memory_from_outside_holds():
    """As under `ulimit -v`, which a process may not raise."""
    code = "import tests.test_workers as t; print(t.outcomes([t.Job(t.add, (1, 2))], memory=2**40)[0].result)"
    command = f"ulimit -v 4000000; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60)
    assert done.stdout.strip() == "3", done.stderr


PARENT = """
import tests.test_workers as t
from medsd.data.workers import Job, WorkerPool
with WorkerPool(2, 600.0, 2**29) as pool:
    for _ in range(2):
        pool.submit(Job({function}, (0,)))
    for job in range(2):
        pool._hand_out()
    print(*(worker.process.pid for worker in pool.workers), flush=True)
    list(pool.outcomes())
"""


@pytest.mark.parametrize(
    ("function", "number"),
    [("t.hang", signal.SIGKILL), ("t.hang_in_c", signal.SIGKILL), ("t.hang_in_c", signal.SIGTERM), ("t.hang", signal.SIGINT)],
)
def test_workers_die_with_their_parent(function, number):
    code = PARENT.format(function=function)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    time.sleep(0.3)
    parent.send_signal(number)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))
