import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from patune.cachedb import file, lookup
from patune.cachedb.store import Store
from patune.errors import DatabaseError

from .builders import ENVIRONMENT, KEY, WORKLOAD, entry, query, store_entries, trial
from .unprivileged import as_nobody


def test_importing_the_lookup_loads_nothing_heavy():
    code = "import sys, json, patune.cachedb.lookup; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    for heavy in (
        "optuna",
        "sqlite_utils",
        "rich",
        "torch",
        "triton",
        "numpy",
        "click",
        "statistics",
    ):
        assert heavy not in loaded


def test_a_stored_config_is_what_a_lookup_finds(tmp_path):
    store_entries(tmp_path / "a.db", [entry()])
    assert lookup.load(tmp_path / "a.db").find(query()) == (entry(), "measured")


def test_the_users_entries_replace_shipped_ones_of_the_same_key_and_workload(tmp_path, shipped_folder):
    store_entries(shipped_folder / "h100.db", [entry(us=20.0), entry(kv_len=64)])
    store_entries(tmp_path / "a.db", [entry(us=10.0)])
    assert lookup.load(tmp_path / "a.db").entries == [entry(kv_len=64), entry(us=10.0)]


def test_without_a_database_the_shipped_tables_answer_without_a_warning(tmp_path, shipped_folder):
    store_entries(shipped_folder / "h100.db", [entry()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup.table().find(query()) == (entry(), "measured")


def test_an_empty_file_is_an_empty_database(tmp_path):
    (tmp_path / "a.db").touch()
    assert lookup.read(tmp_path / "a.db") == []


def test_reading_shipped_tables_leaves_no_file_beside_them(shipped_folder):
    store_entries(shipped_folder / "h100.db", [entry()])
    lookup.table()
    assert [path.name for path in shipped_folder.iterdir()] == ["h100.db"]


def test_the_files_are_read_once_until_a_reload(tmp_path, monkeypatch):
    monkeypatch.setenv("PATUNE_DB", str(tmp_path / "a.db"))
    assert lookup.table().entries == []
    store_entries(tmp_path / "a.db", [entry()])
    assert lookup.table().entries == []
    lookup.reload()
    assert lookup.table().entries == [entry()]


def test_a_lookup_sees_what_an_open_store_has_just_written(tmp_path):
    with Store.open(tmp_path / "a.db") as store:
        (trial_id,) = store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [trial()], "measured")
        store.set_config(KEY, WORKLOAD, trial_id, 14.0, 64, "measured")
        assert lookup.read(tmp_path / "a.db") == [entry()]


def newer(path: Path) -> None:
    with Store.open(path) as store:
        store._db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.write_bytes(b"not a database" * 100),
            "is not an SQLite database or is damaged",
        ),
        (lambda path: path.mkdir(), "see that it is a file"),
        (newer, "written by a newer patune (schema 99, this one knows 1)"),
    ],
)
def test_a_database_that_cannot_be_read_costs_one_warning_and_not_the_shipped_tables(
    tmp_path, shipped_folder, monkeypatch, spoil, message
):
    store_entries(shipped_folder / "h100.db", [entry()])
    path = tmp_path / "a.db"
    spoil(path)
    monkeypatch.setenv("PATUNE_DB", str(path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [lookup.table().find(query()) for _ in range(2)]
    assert answers == [(entry(), "measured")] * 2
    (warning,) = caught
    text = str(warning.message)
    assert message in text and str(path) in text and "PATUNE_DB" in text and "\n" not in text
    with pytest.raises(DatabaseError):
        lookup.read(path)


def test_a_database_in_a_read_only_folder_is_read():
    def make(folder):
        store_entries(folder / "a.db", [entry()])

    assert as_nobody(make, lambda folder: lookup.read(folder / "a.db")) == [entry()]


def test_the_database_is_patune_db_else_in_the_users_data_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("PATUNE_DB", "/else/where.db")
    assert file.database_path() == Path("/else/where.db")
    monkeypatch.delenv("PATUNE_DB")
    assert file.database_path() == Path("/data/patune/patune.db")
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    assert file.database_path() == Path("/home/someone/.local/share/patune/patune.db")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert file.database_path() == Path("/home/someone/.local/share/patune/patune.db")
