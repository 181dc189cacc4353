"""Make a table that ships with patune: the winning trials of tuning databases, and nothing else, in one read-only file.

    python tools/ship_table.py patune/tables/h100.db tuned.db [more.db ...]

Later databases win where two hold the same workload. Only measured configs ship.
"""

import sqlite3
import sys
import tempfile
from pathlib import Path

from patune.cachedb.store import Store


def ship(out: Path, sources: list[Path]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "table.db"
        with Store.open(draft) as table:
            for source in sources:
                with Store.open(source) as store:
                    _copy_winners(store, table)
            count = len(table.entries())
        connection = sqlite3.connect(draft)  # a WAL file cannot be opened from a read-only folder
        connection.execute("PRAGMA journal_mode = delete")
        connection.execute("VACUUM")
        connection.close()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(draft.read_bytes())
    return count


def _copy_winners(store: Store, table: Store) -> None:
    for key, workload, environment in store.tried():
        entry = store.incumbent(key, workload)
        if entry is None or entry["mode"] != "measured":
            continue
        same = [t for t in store.trials(key, workload, mode="measured") if t.config == entry["config"] and t.us == entry["us"]]
        (trial_id,) = table.add_trials(key, workload, environment, same[-1:], "measured")
        table.set_config(key, workload, trial_id, entry["default_us"], entry["evaluations"], "measured")


if __name__ == "__main__":
    out, *sources = map(Path, sys.argv[1:])
    print(f"{out}: {ship(out, sources)} configs")
