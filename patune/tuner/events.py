"""What a tuning run tells whoever watches it."""

from dataclasses import dataclass

from ..cachedb.trial import Environment
from ..workload import Key, Workload


@dataclass(frozen=True, slots=True)
class Started:
    workloads: int  # to be tuned, over all keys
    environment: Environment
    mode: str  # "measured" or "replay"
    devices: tuple[str, ...]  # the names of those that measure


@dataclass(frozen=True, slots=True)
class Progress:
    key: Key
    workload: Workload
    device: str  # that measured the batch
    statuses: tuple[str, ...]  # of the batch's configs
    done: int  # configs measured, those of earlier runs included
    total: int
    best_us: float | None  # None until a config is right
    default_us: float | None
    trials_per_s: float  # of all devices together, on this workload


@dataclass(frozen=True, slots=True)
class Finished:
    key: Key
    workload: Workload
    config: dict[str, int]
    us: float
    default_us: float | None  # None if the default config is not right
    evaluations: int  # configs measured, those of earlier runs included
    optimum_us: float | None = None  # known in a replay only
    regret: float | None = None  # us over the optimum's, minus 1
    note: str = ""  # what is to be known of the measurement: an unsteady GPU, no time for a last race


@dataclass(frozen=True, slots=True)
class Failed:
    key: Key
    workload: Workload
    message: str


Event = Started | Progress | Finished | Failed
