"""Writing and reading the tuning database. Importing this loads sqlite_utils: kernels use `lookup` instead."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlite_utils import Database

from ..errors import DatabaseError
from ..workload import Key, Workload
from . import file
from .lookup import entries_of
from .match import Entry
from .schema import migrate
from .trial import Environment, Trial

TABLES = ("environments", "keys", "workloads", "trials", "configs")

TRIALS_SQL = """
    SELECT t.id, t.config, t.status, t.samples_us, t.error, t.message, t.source_hash, t.measured_at
    FROM trials t JOIN environments e ON e.id = t.environment_id
    WHERE t.key_id = :key AND t.workload_id = :workload
      AND (:source_hash IS NULL OR t.source_hash = :source_hash)
      AND (:triton IS NULL OR e.triton = :triton)
      AND (:mode IS NULL OR t.mode = :mode)
      AND (:environment IS NULL OR t.environment_id = :environment)
    ORDER BY t.id
"""


TRIED_SQL = """
    SELECT DISTINCT k.*, w.*, e.gpu AS measured_on, e.sm_count AS measured_sms, e.capability, e.driver, e.triton, e.torch
    FROM trials t JOIN keys k ON k.id = t.key_id JOIN workloads w ON w.id = t.workload_id
    JOIN environments e ON e.id = t.environment_id WHERE t.mode = :mode ORDER BY k.id, w.id"""


EARNED_SQL = """
    SELECT c.key_id, c.workload_id, c.trial_id FROM configs c JOIN trials t ON t.id = c.trial_id
    WHERE t.status <> 'ok' OR t.us IS NULL OR t.key_id <> c.key_id OR t.workload_id <> c.workload_id OR t.mode <> c.mode"""

PRUNE_SQL = """
    DELETE FROM trials WHERE key_id IN (SELECT id FROM keys WHERE kernel = ?) AND source_hash <> ?
    AND id NOT IN (SELECT trial_id FROM configs)"""


class Store:
    """One open database. Several processes may write to the same file; each opens its own Store."""

    def __init__(self, db: Database, path: Path):
        self._db = db
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a database for writing, made or brought up to date if need be; DatabaseError says why it cannot be."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(f"{path} cannot be made ({error.strerror}): give another --db or PATUNE_DB") from error
        with contextlib.ExitStack() as undo:
            try:
                connection = undo.enter_context(contextlib.closing(sqlite3.connect(path, timeout=file.BUSY_TIMEOUT_S)))
                file.check_identity(connection, path)
                _use_wal(connection)
                connection.execute("PRAGMA foreign_keys = ON")
            except sqlite3.Error as error:
                raise file.explain(error, path) from error
            store = cls(Database(connection, execute_plugins=False), path)
            with store._writing():
                migrate(store._db)
            undo.pop_all()
        return store

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_trials(
        self,
        key: Key,
        workload: Workload,
        environment: Environment,
        trials: Sequence[Trial],
        mode: str,
    ) -> list[int]:
        """Keep trials, all or none; returns their ids. `mode` is "measured" or "replay"."""
        with self._writing():
            of = {
                "key_id": self._id("keys", asdict(key)),
                "workload_id": self._id("workloads", asdict(workload)),
                "environment_id": self._id("environments", asdict(environment)),
                "mode": mode,
            }
            return [self._insert("trials", {**of, **_row(trial)}) for trial in trials]

    def trials(
        self,
        key: Key,
        workload: Workload,
        *,
        source_hash: str | None = None,
        triton: str | None = None,
        mode: str | None = None,
        environment: Environment | None = None,
    ) -> list[Trial]:
        """The trials of a workload, oldest first: those of this source hash, Triton version, mode and environment, where given."""
        wanted = {"source_hash": source_hash, "triton": triton, "mode": mode}
        with self._explained():
            of = {
                "environment": None if environment is None else self._find("environments", asdict(environment)) or -1,
                "key": self._find("keys", asdict(key)),
                "workload": self._find("workloads", asdict(workload)),
            }
            return [_trial(row) for row in self._db.query(TRIALS_SQL, {**of, **wanted})]

    def set_config(
        self,
        key: Key,
        workload: Workload,
        trial_id: int,
        default_us: float | None,
        evaluations: int,
        mode: str,
        optimum_us: float | None = None,
    ) -> None:
        """Make a stored trial the one that lookups serve. Times are in microseconds; the optimum is a replay's."""
        with self._writing():
            self._db.table("configs").upsert(
                {
                    "key_id": self._id("keys", asdict(key)),
                    "workload_id": self._id("workloads", asdict(workload)),
                    "trial_id": trial_id,
                    "default_us": None if default_us is None else float(default_us),
                    "evaluations": evaluations,
                    "mode": mode,
                    "optimum_us": None if optimum_us is None else float(optimum_us),
                },
                pk=("key_id", "workload_id"),
            )

    def incumbent(self, key: Key, workload: Workload) -> Entry | None:
        """The entry that this database holds for a workload."""
        with self._explained():
            ids = (
                self._find("keys", asdict(key)),
                self._find("workloads", asdict(workload)),
            )
            found = entries_of(self._db.conn, "c.key_id = ? AND c.workload_id = ?", ids)
            return found[0] if found else None

    def tried(self, mode: str = "measured") -> list[tuple[Key, Workload, Environment]]:
        """What there are trials of, and where they were measured."""
        with self._explained():
            return [_tried(row) for row in self._db.query(TRIED_SQL, {"mode": mode})]

    def entries(self) -> list[Entry]:
        """Every entry, in a fixed order."""
        with self._explained():
            return entries_of(self._db.conn)

    def problems(self) -> list[str]:
        """What is wrong with the content, in lines; nothing if all is well."""
        with self._explained():
            found = [row[0] for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            found += [f"a row of {row[0]} points to none of {row[2]}" for row in self._db.execute("PRAGMA foreign_key_check")]
            unearned = self._db.execute(EARNED_SQL)
            return found + [f"the config of key {key}, workload {w} was not earned by its trial {t}" for key, w, t in unearned]

    def prune(self, current: Mapping[str, str]) -> int:
        """Drop trials of other versions of these kernels, by their source hashes, that no config comes from; how many."""
        with self._writing():
            before = self._db.table("trials").count
            for kernel, source_hash in current.items():
                self._db.conn.execute(PRUNE_SQL, (kernel, source_hash))
            for table, reference in (("environments", "environment_id"), ("keys", "key_id"), ("workloads", "workload_id")):
                self._db.conn.execute(f"DELETE FROM {table} WHERE id NOT IN (SELECT {reference} FROM trials)")
            dropped = before - self._db.table("trials").count
        with self._explained():
            self._db.conn.execute("VACUUM")
        return dropped

    def counts(self) -> dict[str, int]:
        """Rows in each table."""
        with self._explained():
            return {name: self._db.table(name).count for name in TABLES}

    def _id(self, table: str, row: dict[str, Any]) -> int:
        """The id of a row, which is added if it is new. Only inside a write, so that no one else adds it meanwhile."""
        found = self._find(table, row)
        return self._insert(table, row) if found is None else found

    def _insert(self, table: str, row: dict[str, Any]) -> int:
        added: Any = self._db.table(table).insert(row).last_pk
        return int(added)

    def _find(self, table: str, row: dict[str, Any]) -> int | None:
        same = " AND ".join(f"{column} = :{column}" for column in row)
        found = self._db.execute(f"SELECT id FROM {table} WHERE {same}", row).fetchone()
        return found[0] if found else None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction that takes the write lock first: SQLite lets a reader that turns writer fail at once."""
        with self._explained():
            self._db.conn.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.conn.execute("COMMIT")
            except BaseException:
                self._db.conn.rollback()
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise file.explain(error, self.path) from error


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch a new file to WAL. SQLite does not wait its busy timeout here if another process has it open, so we do."""
    deadline = time.monotonic() + file.BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _row(trial: Trial) -> dict[str, Any]:
    # int() and float() turn numpy's numbers, which SQLite would store as bytes, into Python's.
    return {
        "config": json.dumps({name: int(value) for name, value in sorted(trial.config.items())}),
        "status": trial.status,
        "us": None if trial.us is None else float(trial.us),
        "samples_us": json.dumps([float(us) for us in trial.samples_us]),
        "error": None if trial.error is None else float(trial.error),
        "message": trial.message,
        "source_hash": trial.source_hash,
        "measured_at": trial.when,
    }


def _trial(row: dict[str, Any]) -> Trial:
    return Trial(
        config=json.loads(row["config"]),
        status=row["status"],
        samples_us=tuple(json.loads(row["samples_us"])),
        error=row["error"],
        message=row["message"],
        source_hash=row["source_hash"],
        when=row["measured_at"],
        id=row["id"],
    )


def _tried(row: dict[str, Any]) -> tuple[Key, Workload, Environment]:
    key = Key(**{field.name: row[field.name] for field in fields(Key)})
    workload = Workload(**{field.name: row[field.name] for field in fields(Workload)})
    of = {name: row[name] for name in ("capability", "driver", "triton", "torch")}
    return (
        key,
        replace(workload, ragged=bool(workload.ragged)),
        Environment(row["measured_on"], row["measured_sms"], **of),
    )
