"""The table that a kernel call asks: the user's configs over those that ship with patune, read once per process.

Standard library only. No state of the user's database may stop a server: one that cannot be read is left out, with one
warning.
"""

import contextlib
import functools
import json
import sqlite3
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..errors import DatabaseError
from .file import SHIPPED_TABLES, check_identity, database_path, explain
from .match import KEY_FIELDS, WORKLOAD_FIELDS, Entry, Table
from .match import provenance as provenance  # for the kernels, which know this module alone

ENTRIES_SQL = """
    SELECT k.kernel, k.gpu, k.sm_count, e.capability, k.head_dim, k.page_size, k.q_heads_per_kv, k.q_dtype,
           k.kv_dtype, k.features, w.batch_size, w.kv_len, w.q_len, w.kv_heads, w.ragged, t.config, t.us,
           c.default_us, c.evaluations, c.mode, t.measured_at AS "when", e.triton, e.torch, e.driver, t.source_hash,
           c.optimum_us
    FROM configs c
    JOIN keys k ON k.id = c.key_id
    JOIN workloads w ON w.id = c.workload_id
    JOIN trials t ON t.id = c.trial_id
    JOIN environments e ON e.id = t.environment_id
"""


@functools.cache
def table() -> Table:
    """The table of this process; the first call reads the files."""
    return load(database_path())


@functools.cache
def shipped_table() -> Table:
    """The shipped tables alone; read once per process."""
    return Table(entry for _, entry in sorted(_shipped().items()))


def reload() -> None:
    """Make the next `table()` and `shipped_table()` read the files again."""
    table.cache_clear()
    shipped_table.cache_clear()


def load(user_database: Path) -> Table:
    """The table of one database over the shipped ones. A missing database is an empty one."""
    found = _shipped()
    try:
        if user_database.exists():
            found.update((order(entry), entry) for entry in read(user_database))
    except (DatabaseError, OSError) as error:
        warnings.warn(f"patune goes on without the user's tuned configs: {error}", stacklevel=3)
    return Table(found[key] for key in sorted(found))


def _shipped() -> dict[tuple, Entry]:
    paths = sorted(SHIPPED_TABLES.glob("*.db"))
    return {order(entry): entry for path in paths for entry in read(path, shipped=True)}


def read(path: Path, *, shipped: bool = False) -> list[Entry]:
    """The entries of one database file; DatabaseError says why it cannot be read."""
    try:
        if shipped:  # with mode=ro SQLite may write a -shm file beside it, into the installed package
            return _read(path, "immutable=1")
        try:
            return _read(path, "mode=ro")
        except sqlite3.OperationalError as error:
            # A WAL file in a read-only folder opens only as immutable, and nothing there can be writing to it.
            if error.sqlite_errorcode & 0xFF not in (
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            ):
                raise
            return _read(path, "immutable=1")
    except sqlite3.Error as error:
        raise explain(error, path) from error


def _read(path: Path, mode: str) -> list[Entry]:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)) as connection:
        return entries_of(connection) if check_identity(connection, path) else []


def entries_of(
    connection: sqlite3.Connection,
    condition: str = "TRUE",
    values: Sequence[int | None] = (),
) -> list[Entry]:
    """The entries that an open database holds, all or those of an SQL condition, in a fixed order."""
    cursor = connection.execute(f"{ENTRIES_SQL} WHERE {condition}", values)
    names = [column[0] for column in cursor.description]
    entries = [dict(zip(names, row, strict=True)) for row in cursor]
    for entry in entries:
        entry["ragged"] = bool(entry["ragged"])
        entry["config"] = json.loads(entry["config"])
    return sorted(entries, key=order)


def order(entry: Entry) -> tuple:
    """Where an entry stands in a listing."""
    return tuple([entry[f] for f in ("kernel", "gpu", "sm_count", *KEY_FIELDS[1:], *WORKLOAD_FIELDS)])
