"""What a device's time goes to."""

import time
from collections.abc import Sequence

PHASES = ("compilers", "tensors", "checks", "races")  # waiting for the first; checks include capturing graphs
MEASURING = ("checks", "races")
STARTUP_S = 15.0  # of a run: loading torch, starting processes, compiling what is measured first


class Phases:
    """The spans of time that one device spent in each phase of its races, on the clock of `time.monotonic`."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []
        self._now: tuple[str, float] | None = None

    def enter(self, phase: str | None) -> None:
        """End the phase that runs and begin another one; None between races."""
        now = time.monotonic()
        if self._now:
            self.spans.append((*self._now, now))
        self._now = (phase, now) if phase else None

    def seconds(self, phase: str, since: float = 0.0) -> float:
        return sum(max(0.0, end - max(start, since)) for name, start, end in self.spans if name == phase)


def measuring_share(devices: Sequence[Phases], began: float, ended: float) -> float | None:
    """Of the time of all devices after the first STARTUP_S of a run, the part in which they measured; None if that is no time."""
    since = began + STARTUP_S
    if ended <= since:
        return None
    measured = sum(device.seconds(phase, since) for device in devices for phase in MEASURING)
    return measured / (ended - since) / len(devices)
