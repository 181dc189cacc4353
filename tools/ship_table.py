"""Make a table that ships with patune: the winning trials of tuning databases, and nothing else, in one read-only file.

    python tools/ship_table.py patune/tables/h100.db tuned.db [more.db ...]

Later databases win where two hold the same workload. Only measured configs ship, and only those that this machine's
Triton compiles as the tuner would accept it as well: a table serves more versions than the one it was measured with. Where the
winner is not, the next fastest trial that is takes its place.
"""

import sqlite3
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

from patune.cachedb.store import Store
from patune.cachedb.trial import Environment, Trial
from patune.tuner.compile import CompilePool
from patune.workload import Key, Workload


def ship(out: Path, sources: list[Path]) -> int:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        draft = Path(folder) / "table.db"
        with Store.open(draft) as table:
            last: dict[tuple[Key, Workload], tuple[Store, Environment]] = {}
            for source in sources:
                store = opened.enter_context(Store.open(source))
                last |= {(key, workload): (store, environment) for key, workload, environment in store.tried()}
            _copy_winners(last, table)
            count = len(table.entries())
        with closing(sqlite3.connect(draft)) as connection:  # a WAL file cannot be opened from a read-only folder
            connection.execute("PRAGMA journal_mode = delete")
            connection.execute("VACUUM")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(draft.read_bytes())
    return count


def _copy_winners(sources: Mapping[tuple[Key, Workload], tuple[Store, Environment]], table: Store) -> None:
    pools: dict[str, CompilePool] = {}
    winners = []
    for (key, workload), (store, environment) in sources.items():
        entry = store.incumbent(key, workload)
        if entry is None or entry["mode"] != "measured":
            continue
        if environment.capability not in pools:
            pools[environment.capability] = CompilePool(environment.capability)
        pools[environment.capability].submit(key, workload, [entry["config"]])  # all of them at once
        winners.append((key, workload, store, environment, entry))
    for key, workload, store, environment, entry in winners:
        trial = _fastest_that_compiles(store, key, workload, entry, pools[environment.capability])
        (trial_id,) = table.add_trials(key, workload, environment, [trial], "measured")
        default_us = entry["default_us"]
        if default_us is not None and trial.us > default_us:
            default_us = None  # it was faster than what is left, so it is refused here like the winner
        table.set_config(key, workload, trial_id, default_us, entry["evaluations"], "measured")
    for pool in pools.values():
        pool.close()


def _fastest_that_compiles(store: Store, key: Key, workload: Workload, entry: dict, pool: CompilePool) -> Trial:
    right = [trial for trial in store.trials(key, workload, mode="measured") if trial.status == "ok"]
    by_time = sorted(right, key=lambda trial: trial.us)
    winner = next(trial for trial in reversed(right) if trial.config == entry["config"] and trial.us == entry["us"])
    for trial in [winner, *by_time]:
        pool.submit(key, workload, [trial.config])
        if pool.build(key, workload, trial.config).status == "ok":
            if trial is not winner:
                print(f"{key.kernel} {workload}: {winner.config}, {winner.us:.2f} us, is refused here;")
                print(f"    ships {trial.config}, {trial.us:.2f} us")
            return trial
    raise SystemExit(f"{key.kernel} {workload}: no config compiles here")


if __name__ == "__main__":
    out, *sources = map(Path, sys.argv[1:])
    print(f"{out}: {ship(out, sources)} configs")
