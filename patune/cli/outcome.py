"""What came of a `patune run`: its rows, what became of its configs, what failed, where its time went."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..workload import Key
from .plan import Plan

if TYPE_CHECKING:
    from ..tuner.events import Event, Finished
    from ..tuner.phases import Phases


class Tally:
    """What came of the configs that were measured, and which workloads failed and why."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.failed: list[str] = []

    def on_event(self, event: "Event") -> None:
        from ..tuner.events import Failed, Progress

        if isinstance(event, Progress):
            self.statuses.update(event.statuses)
        elif isinstance(event, Failed):
            self.failed.append(f"{event.key.kernel} {event.workload}: {event.message}")

    def __str__(self) -> str:
        return ", ".join(f"{count} {status}" for status, count in self.statuses.most_common())


def by_key(plan: Plan, results: "Sequence[Finished]") -> list[dict[str, Any]]:
    """The "keys" of the document, in the order of the plan; after it what a shared search had for this worker besides."""
    found = {(result.key, result.workload): _row(result) for result in results}
    order = dict.fromkeys([*((key, w) for key, workloads in plan.items() for w in workloads), *found])
    keys: dict[Key, list[dict[str, Any]]] = {key: [] for key, _ in order}
    for key, workload in order:
        if (key, workload) in found:
            keys[key].append(found[key, workload])
    return [{"key": asdict(key), "workloads": rows} for key, rows in keys.items()]


def times(devices: "Sequence[Phases]", began: float) -> dict[str, Any]:
    """The "time" of the document: seconds of the run and of all its devices, and the share of it that they measured."""
    from ..tuner.phases import PHASES, measuring_share

    ended = time.monotonic()
    spent = {f"{phase}_s": round(sum(device.seconds(phase) for device in devices), 2) for phase in PHASES}
    return {"seconds": round(ended - began, 2), "measuring_share": measuring_share(devices, began, ended), **spent}


def times_line(spent: Mapping[str, Any]) -> str:
    from ..tuner.phases import PHASES, STARTUP_S

    share = spent["measuring_share"]
    measuring = "" if share is None else f", {share:.0%} of it measuring after the first {STARTUP_S:.0f} s"
    return f"{spent['seconds']:.1f} s{measuring}: " + ", ".join(f"{phase} {spent[phase + '_s']:.1f} s" for phase in PHASES)


def _row(found: "Finished") -> dict[str, Any]:
    row = asdict(found)
    for name in ("key", "note", *(("optimum_us", "regret") if found.optimum_us is None else ())):
        del row[name]
    return row
