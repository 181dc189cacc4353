"""What a search runs on: a GPU, or a recording of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..cachedb.trial import Environment, Trial
from ..kernels.template import Values
from ..workload import Key, Workload
from .phases import Phases

ROUNDS = 7  # of a race between the configs of a batch


@dataclass(frozen=True, slots=True)
class Race:
    """Configs timed in turn: sample n of each comes from round n, so samples can be compared in pairs."""

    trials: list[Trial]  # in the order of the points
    reference: Trial  # of what they raced against; it is timed in every round, a slow point only in the first ones


class Runner(Protocol):
    mode: Literal["measured", "replay"]
    environment: Environment
    phases: Phases  # of its device; empty in a replay

    def prepare(self, key: Key, workload: Workload, points: Sequence[Values]) -> None:
        """These points will be measured soon; returns at once."""
        ...

    def measure(self, key: Key, workload: Workload, points: Sequence[Values], reference: Values, rounds: int = ROUNDS) -> Race:
        """Check and race the points and the reference. A point that fails costs nothing but its own trial."""
        ...

    def optimum_us(self, key: Key, workload: Workload) -> float | None:
        """The best time there is, in microseconds, if it is known."""
        ...

    def close(self) -> None: ...
