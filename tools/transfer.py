"""What the table of one GPU loses on another: its configs there, by the recorded times, over the best ones that were recorded.

    python tools/transfer.py patune/tables/h100.db patune/tables/h200.landscape.json.gz

A call counts once: where two templates can make it, the table chooses between them too.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from patune.cachedb import landscape, lookup
from patune.cachedb.landscape import Landscape
from patune.cachedb.match import Table
from patune.kernels.config import find, find_either
from patune.kernels.defaults import query_of
from patune.kernels.registry import OF_KERNEL
from patune.workload import Key, Workload


class Loss(NamedTuple):
    key: Key  # of the kernel that is called
    workload: Workload
    us: float | None  # of the table's config; None where it was not recorded or did not run
    best_us: float


def losses(table: Table, recorded: Landscape) -> Iterator[Loss]:
    """Of every call that was recorded. The table is that of the other GPU alone."""
    for kernel, templates in OF_KERNEL.items():
        for key in dict.fromkeys(replace(key, kernel=kernel) for key in recorded.keys() if key.kernel in templates):
            # the one for Hopper first, as calls prefer it
            keys = [k for name in reversed(templates) if (k := replace(key, kernel=name)) in recorded.keys()]
            for workload in sorted(set.intersection(*(set(recorded.workloads(k)) for k in keys))):
                queries = [query_of(k, workload) for k in keys]
                two = len(keys) == 2
                name, config = find_either(*queries, table=table) if two else (keys[0].kernel, find(*queries, table=table))
                taken = replace(key, kernel=name)
                point = tuple(config[tunable] for tunable in recorded.tunables(taken))
                trial = recorded.trials(taken, workload).get(point)
                us = trial.us if trial is not None and trial.status == "ok" else None
                yield Loss(key, workload, us, min(recorded.optimum(k, workload).us for k in keys))


def table_of(path: Path) -> Table:
    return Table(lookup.read(path, shipped=True))


def main() -> None:
    table, recorded = table_of(Path(sys.argv[1])), landscape.load(Path(sys.argv[2]))
    found = list(losses(table, recorded))
    for loss in found:
        at = f"{loss.key.kernel} d{loss.key.head_dim} p{loss.key.page_size} {loss.workload}"
        print(f"{at}: {f'{loss.us:.1f}' if loss.us else 'not recorded'}, best {loss.best_us:.1f} us")
    ratios = [loss.us / loss.best_us for loss in found if loss.us]
    print(f"x{statistics.geometric_mean(ratios):.3f} over {len(ratios)} of {len(found)} calls")


if __name__ == "__main__":
    main()
