"""Stopping when asked to: SIGINT and SIGTERM end a run at once, or save it first where it trains.

Outside training, what is finished is on disk already. A thread reads the signals, so a run ends
within a second even if XLA is busy, when no Python handler would run. With several processes,
the one that is asked tells the others.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from robust_jax.devices import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KEY = "robust_jax/stop"


class _State:
    """Which signal was received, and whether a caller has to save before the process ends."""

    def __init__(self):
        self.watched = False
        self.saving = False
        self.asked: int | None = None  # known to the thread
        self.signals = 0  # that reached this process, which may also be told by another
        self.noted = 0  # known to the main thread, between two of its steps


_state = _State()


class Stop:
    """For a training loop: whether it was asked to stop, and the exit code, 128 + the signal."""

    exit_code = 0

    def asked(self, *, agree: bool = True) -> bool:
        """Whether to stop; without agree, several processes do not consult and none stops."""
        number = _state.noted or _state.asked or 0
        if jax.process_count() > 1:
            if not agree:
                return False
            number = processes.largest(number)
        self.exit_code = 128 + number if number else 0
        return number > 0


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends the process when asked to, with one line of output and exit code 128 + the signal."""
    if _state.watched or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = {number: signal.signal(number, _note) for number in _SIGNALS}
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _state.watched, _state.asked, _state.noted, _state.signals = True, None, 0, 0
    threads = [threading.Thread(target=_read, args=(reader,), daemon=True)]
    if jax.process_count() > 1:
        threads.append(threading.Thread(target=_listen, daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        _state.watched = False
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        for thread in threads:
            thread.join()
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def saving() -> Iterator[Stop]:
    """When asked to stop, lets the caller save and exit; when asked twice, ends at once."""
    with watched():
        _state.saving = True
        try:
            yield Stop()
        finally:
            # The thread may hear of a signal after the caller, who is about to exit because of it.
            _state.saving = _state.noted != 0


def _note(number: int, _: Any) -> None:
    _state.noted = number


def _read(reader: int) -> None:
    while number := os.read(reader, 1)[0]:
        if number in _SIGNALS:
            _state.signals += 1
            _ask(number)


def _listen() -> None:
    """Waits until another process is asked to stop, through JAX's coordinator."""
    client = _client()
    while _state.watched and client is not None:
        try:
            number = int(client.blocking_key_value_get(_KEY, 500))
        except Exception:  # noqa: BLE001 - nobody said anything within half a second
            time.sleep(0.1)
            continue
        _ask(number)
        return


def _ask(number: int) -> None:
    first, _state.asked = _state.asked is None, number
    name = signal.Signals(number).name
    if first:
        with contextlib.suppress(Exception):  # another process was first
            if (client := _client()) is not None:
                client.key_value_set(_KEY, str(number))
    if _state.saving and _state.signals < 2:
        if first:
            _say(f"{name}: saving at the end of this step; once more stops without saving")
        return
    kept = "the last checkpoint" if _state.saving else "what is finished"
    _say(f"{name}: stopped; {kept} is kept, and the same command continues from there")
    if jax.process_count() > 1 and processes.is_first():
        time.sleep(1)  # the others hear it from this coordinator
    sys.stdout.flush()
    os._exit(128 + number)


def _say(line: str) -> None:
    if processes.is_first():
        print(f"\n{line}", file=sys.stderr, flush=True)


def _client() -> Any:
    from jax._src import distributed  # no public name; orbax and others use it too

    return distributed.global_state.client
