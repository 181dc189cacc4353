"""Every state of the database that stops a command is one line with a way out, and exit status 1."""

import sqlite3
from pathlib import Path

import pytest
from cachedb.unprivileged import as_nobody

from patune.cachedb import file, lookup
from patune.cachedb.store import Store

LOOKUP = ("lookup", "--kernel", "append", "--head-dim", 128, "--page-size", 16, "--gpu", "h100")


def commands(recorded, tmp_path):
    return {
        "run": ("run", "--gpu", "h100", "--replay", recorded),
        "show": ("show",),
        "lookup": LOOKUP,
        "export": ("export", "--to", "json", "--out", tmp_path / "out"),
    }


def corrupt(db):
    db.write_bytes(b"this is no database" * 100)


def newer(db):
    Store.open(db).close()
    connection = sqlite3.connect(db)
    connection.execute(f"PRAGMA user_version = {file.SCHEMA_VERSION + 1}")
    connection.close()


@pytest.mark.parametrize("name", ["run", "show", "lookup", "export"])
@pytest.mark.parametrize(
    ("spoil", "message"), [(corrupt, "is not an SQLite database or is damaged"), (newer, "was written by a newer patune")]
)
def test_a_database_that_cannot_be_read_stops_every_command(name, spoil, message, patune, recorded, tmp_path, db):
    spoil(db)
    before = db.read_bytes()
    result = patune(*commands(recorded, tmp_path)[name], "--db", db)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"patune: error: {db} {message}")
    assert "another --db" in line
    assert db.read_bytes() == before


def test_a_locked_database_stops_a_run(patune, recorded, tuned, monkeypatch):
    monkeypatch.setattr(file, "BUSY_TIMEOUT_S", 0.1)
    holder = sqlite3.connect(tuned)
    holder.execute("BEGIN IMMEDIATE")
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", tuned)
    holder.close()
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"patune: error: {tuned} is locked by another process: wait for it")


def test_a_locked_database_is_still_read(patune, tuned):
    holder = sqlite3.connect(tuned)
    holder.execute("BEGIN IMMEDIATE")
    result = patune("show", "--db", tuned)
    holder.close()
    assert result.exit_code == 0
    assert "B8 L4096" in result.stdout


def test_a_read_only_database_stops_a_run_and_not_a_lookup(patune, recorded, tuned, monkeypatch):
    landscape = Path(recorded).read_bytes()

    def make(folder):
        (folder / "tuned.db").write_bytes(tuned.read_bytes())
        (folder / "landscape.gz").write_bytes(landscape)

    def act(folder):
        monkeypatch.setattr(lookup, "SHIPPED_TABLES", folder / "none")  # the folder it was is closed to other users
        db = folder / "tuned.db"
        run = patune("run", "--gpu", "h100", "--replay", folder / "landscape.gz", "--db", db)
        look = patune(*LOOKUP, "--db", db)
        return run.exit_code, run.stderr, look.exit_code, look.stdout

    run_status, run_stderr, look_status, look_stdout = as_nobody(make, act)
    assert run_status == 1
    (line,) = run_stderr.splitlines()
    assert "tuned.db or its folder is read-only: make both writable, or give another --db" in line
    assert (look_status, look_stdout.splitlines()[0]) == (0, "BLOCK_T=4 num_warps=4")


def test_a_database_that_is_named_but_not_there_is_a_wrong_command(patune, tmp_path):
    for args in (("show",), LOOKUP, ("export", "--to", "json", "--out", tmp_path / "out")):
        result = patune(*args, "--db", tmp_path / "typo.db")
        assert result.exit_code == 2
        assert "typo.db' does not exist" in result.stderr
        assert not (tmp_path / "typo.db").exists()
