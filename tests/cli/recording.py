"""Small landscape files of the real templates, with times of a formula. For tests only: what ships is measured."""

from collections.abc import Callable, Iterable
from pathlib import Path

from patune.cachedb import landscape
from patune.cachedb.trial import Environment, Trial
from patune.kernels.registry import template
from patune.tuner.space import valid_points
from patune.workload import Key, Workload

H100 = Environment("NVIDIA H100 80GB HBM3", 132, "9.0", "570.86", "3.6.0", "2.11.0")
KEY = Key("append", H100.gpu, H100.sm_count, 128, 16, 1)  # the smallest search space
WORKLOADS = [Workload(1, 1024), Workload(8, 4096)]
BEST = {"BLOCK_T": 4, "num_warps": 4}
WHEN = "2026-11-22T12:00:00+00:00"


def formula_us(config: dict[str, int], workload: Workload) -> float:
    return 5.0 + workload.batch_size + sum(abs(config[name] - BEST[name]) for name in BEST)


def right(config: dict[str, int], workload: Workload) -> Trial:
    us = formula_us(config, workload)
    return Trial(config, "ok", tuple(us + 0.001 * n for n in range(15)), 0.0)


def wrong(config: dict[str, int], workload: Workload) -> Trial:
    return Trial(config, "wrong_answer", error=0.5)


def record(
    path: Path,
    key: Key = KEY,
    workloads: Iterable[Workload] = WORKLOADS,
    *,
    trial: Callable[[dict[str, int], Workload], Trial] = right,
    environment: Environment = H100,
    source_hash: str | None = None,
) -> Path:
    """A landscape file with every valid point of these workloads."""
    kernel = template(key.kernel)
    recordings = [
        landscape.Recording(
            key,
            workload,
            source_hash or kernel.source_hash,
            dict(kernel.tunables),
            kernel.default(key, workload),
            [trial(config, workload) for config in valid_points(kernel, key, workload)],
        )
        for workload in workloads
    ]
    landscape.write(path, environment, recordings, recorded=WHEN, commit="0" * 40)
    return path
