"""What came of a `patune run`: its rows, what became of its configs, what failed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .plan import Plan

if TYPE_CHECKING:
    from ..tuner.events import Event, Finished


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
    """The "keys" of the document, in the order of the plan."""
    rows = {(found.key, found.workload): _row(found) for found in results}
    return [
        {"key": asdict(key), "workloads": [rows[key, w] for w in workloads if (key, w) in rows]} for key, workloads in plan.items()
    ]


def _row(found: "Finished") -> dict[str, Any]:
    row = asdict(found)
    for name in ("key", "note", *(("optimum_us", "regret") if found.optimum_us is None else ())):
        del row[name]
    return row
