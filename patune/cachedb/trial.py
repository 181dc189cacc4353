"""One measured config and the machine that it was measured on."""

import statistics
from dataclasses import dataclass, field

# Landscape files store the index of a status: append to this, never reorder it.
STATUSES = (
    "ok",
    "invalid",
    "compile_failed",
    "out_of_resources",
    "wrong_answer",
    "illegal_access",
    "timeout",
    "out_of_memory",
    "worker_died",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What happened when one config met one workload."""

    config: dict[str, int]
    status: str  # one of STATUSES
    samples_us: tuple[float, ...] = ()  # one a round of the race, in microseconds; empty unless it was timed
    error: float | None = None  # relative Frobenius error against the fp32 reference; None if it was not checked
    message: str = ""  # why the status is not "ok", in one line
    source_hash: str = ""  # of the kernel template that was measured
    when: str = ""  # ISO date and time, UTC, of the measurement
    id: int | None = field(default=None, compare=False)  # row in the database, if it came from there

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}, not one of {', '.join(STATUSES)}")

    @property
    def us(self) -> float | None:
        """Median of the samples in microseconds; None if it was not timed."""
        return statistics.median(self.samples_us) if self.samples_us else None


@dataclass(frozen=True, slots=True)
class Environment:
    """What a time depends on besides the config, the workload and the kernel's source."""

    gpu: str  # the device name as the driver gives it
    sm_count: int
    capability: str  # compute capability, such as "9.0"
    driver: str
    triton: str
    torch: str
