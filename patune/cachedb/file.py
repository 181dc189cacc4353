"""The database file: where it lies, whether it is one of patune's, and what each of its failures means to the user.

Standard library only: kernels come here on their first call.
"""

import os
import sqlite3
from pathlib import Path

from ..errors import DatabaseError

SCHEMA_VERSION = 1  # PRAGMA user_version; one more for every migration in schema.py
APPLICATION_ID = 0x7061_7475  # PRAGMA application_id, "patu"
BUSY_TIMEOUT_S = 10.0  # how long a writer waits for another one

SHIPPED_TABLES = Path(__file__).parents[1] / "tables"


def database_path() -> Path:
    """The user's database: `$PATUNE_DB`, else patune/patune.db in the user's data folder."""
    if named := os.environ.get("PATUNE_DB"):
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):  # the XDG rule: relative paths are ignored
        data = os.path.expanduser("~/.local/share")
    return Path(data, "patune", "patune.db")


def check_identity(connection: sqlite3.Connection, path: Path) -> int:
    """The file's schema version, 0 if it is empty; DatabaseError if it is another program's or a newer patune's."""
    # In this order: another process may be making the tables and setting the ids, in one transaction, right now.
    has_tables = connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if has_tables and application != APPLICATION_ID:
        raise DatabaseError(f"{path} is the SQLite database of another program: give another --db or PATUNE_DB")
    if version > SCHEMA_VERSION:
        raise DatabaseError(
            f"{path} was written by a newer patune (schema {version}, this one knows {SCHEMA_VERSION}): "
            "upgrade patune or give another --db or PATUNE_DB"
        )
    return version


def explain(error: sqlite3.Error, path: Path) -> DatabaseError:
    """What an SQLite error means, in one line with the way out."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code; the rest says which variant
    meaning = MEANINGS.get(code, f"failed ({error}): try again")
    return DatabaseError(f"{path} {meaning}, or give another --db or PATUNE_DB")


MEANINGS = {
    sqlite3.SQLITE_BUSY: "is locked by another process: wait for it",
    sqlite3.SQLITE_LOCKED: "is locked by another process: wait for it",
    sqlite3.SQLITE_READONLY: "or its folder is read-only: make both writable",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: see that it is a file and its folder writable",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database or is damaged: move it away",
    sqlite3.SQLITE_CORRUPT: "is damaged: move it away",
    sqlite3.SQLITE_IOERR: "cannot be read or written: see that it is a file on a sound disk",
    sqlite3.SQLITE_FULL: "cannot grow, the disk is full: free some space",
}
