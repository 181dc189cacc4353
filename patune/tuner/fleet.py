"""The devices of one run. Each measures in a thread of its own, so that one thread can decide for all of them."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from .runner import Race, Runner

Call = Callable[[Runner], Race]
Outcome = Race | BaseException


class Fleet(Protocol):
    runners: Sequence[Runner]  # one a device
    names: Sequence[str]  # of the devices, for people

    def now(self) -> float:
        """Seconds on the clock that the devices' work takes time on."""
        ...

    def submit(self, device: int, call: Call) -> None:
        """Start a race on an idle device."""
        ...

    def wait(self, until: float | None) -> tuple[int, Outcome] | None:
        """The next device that is done, and what came of its race; None if none is by `until`."""
        ...

    def close(self) -> None:
        """End the runners, idle or not."""
        ...


class Threads:
    """A Fleet that measures in real time."""

    def __init__(self, runners: Sequence[Runner], names: Sequence[str]):
        self.runners, self.names = runners, names
        self._done: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()

    def now(self) -> float:
        return time.monotonic()

    def submit(self, device: int, call: Call) -> None:
        threading.Thread(target=self._run, args=(device, call), name=f"patune-device-{device}", daemon=True).start()

    def wait(self, until: float | None) -> tuple[int, Outcome] | None:
        try:
            return self._done.get(timeout=None if until is None else max(0.0, until - self.now()))
        except queue.Empty:
            return None

    def close(self) -> None:
        with ThreadPoolExecutor(len(self.runners)) as ending:  # a GPU takes its time to be freed
            list(ending.map(lambda runner: runner.close(), self.runners))

    def _run(self, device: int, call: Call) -> None:
        try:
            outcome: Outcome = call(self.runners[device])
        except BaseException as error:  # noqa: BLE001  the thread that waits raises it
            outcome = error
        self._done.put((device, outcome))
