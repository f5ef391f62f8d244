"""SIGINT and SIGTERM stop a process with one line, and at once if there is nothing to save."""

import signal
import socket
import subprocess
import sys

import pytest

from robust_jax.devices import stopping
from tests.conftest import REPOSITORY, environment_of

AT_WORK = """
import sys, time
from robust_jax.devices import stopping
with stopping.watched():
    print("at work", flush=True)
    time.sleep(60)
"""
# Busy in C++, where Python's handlers do not run, as XLA may be for minutes.
IN_XLA = AT_WORK.replace("import sys, time", "import sys, time, re").replace(
    "time.sleep(60)", "import jax.numpy as jnp; jnp.linalg.svd(jnp.ones((3000, 3000)))"
)
SAVING = """
import time
from robust_jax.devices import stopping
with stopping.watched(), stopping.saving() as stop:
    print("at work", flush=True)
    while not stop.asked():
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep({seconds})
print("saved", flush=True)
raise SystemExit(stop.exit_code)
"""


def begun(code):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment_of(1),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def started(code):
    process = begun(code)
    assert process.stdout.readline() == "at work\n", process.communicate()[1]
    return process


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [AT_WORK, IN_XLA], ids=["python", "xla"])
def test_outside_training_a_process_ends_at_once_with_a_line(kind, code):
    process = started(code)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + kind
    assert errors.strip() == (
        f"{kind.name}: stopped; what is finished is kept, and the same command continues from there"
    )


@pytest.mark.parametrize("asked", [0, 1])
def test_outside_training_the_other_processes_end_as_well(asked):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    join = "from robust_jax.devices import processes; processes.initialize('{},2,{}')\n"
    both = [begun(join.format(address, i) + AT_WORK) for i in range(2)]
    for process in both:
        assert process.stdout.readline() == "at work\n", process.communicate()[1]
    both[asked].send_signal(signal.SIGINT)
    for process in both:
        process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_training_is_given_time_to_save(kind):
    process = started(SAVING.format(seconds=0))
    process.send_signal(kind)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + kind
    assert printed == "saving\nsaved\n"
    assert errors.strip() == (
        f"{kind.name}: saving at the end of this step; once more stops without saving"
    )


def test_a_second_signal_does_not_wait():
    process = started(SAVING.format(seconds=60))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT and not printed
    assert "SIGINT: stopped; the last checkpoint is kept" in errors


def test_handlers_are_those_before_when_it_is_over():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stopping.saving() as stop:
        assert not stop.asked()
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked() and stop.exit_code == 143
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stopping.saving() as stop:
        assert not stop.asked()
