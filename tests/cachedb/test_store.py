import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patune.cachedb import file
from patune.cachedb.schema import migrations
from patune.cachedb.store import TABLES, Store
from patune.cachedb.trial import STATUSES, Trial
from patune.errors import DatabaseError
from patune.workload import Workload

from .builders import CONFIG, ENVIRONMENT, KEY, WORKLOAD, entry, trial
from .unprivileged import as_nobody

US = st.floats(min_value=0.1, max_value=1e6)
TRIALS = st.builds(
    Trial,
    config=st.dictionaries(st.text(min_size=1), st.integers(-(2**31), 2**31), max_size=4),
    status=st.sampled_from(STATUSES),
    samples_us=st.lists(US, max_size=5).map(tuple),
    error=st.none() | st.floats(min_value=0, allow_nan=False),
    message=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    source_hash=st.text("0123456789abcdef", max_size=12),
    when=st.just("2026-01-02T03:04:05+00:00"),
)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new folder" / "a.db"


@given(trials=st.lists(TRIALS, max_size=4))
@settings(deadline=None, max_examples=50)
def test_trials_come_back_as_they_were(tmp_path_factory, trials):
    with Store.open(tmp_path_factory.mktemp("db") / "a.db") as store:
        ids = store.add_trials(KEY, WORKLOAD, ENVIRONMENT, trials, "measured")
        stored = store.trials(KEY, WORKLOAD)
        assert stored == trials
        assert [t.id for t in stored] == ids


def test_numpys_numbers_are_stored_as_numbers(path):
    np = pytest.importorskip("numpy")
    odd = trial(
        config={"BLOCK_N": np.int64(64)},
        samples_us=(np.float32(2.5),),
        error=np.float32(0.5),
    )
    with Store.open(path) as store:
        store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [odd], "measured")
        assert store.trials(KEY, WORKLOAD) == [trial(config={"BLOCK_N": 64}, samples_us=(2.5,), error=0.5)]


def test_a_trial_counts_only_for_its_source_triton_mode_and_workload(path):
    old = trial(source_hash="old")
    with Store.open(path) as store:
        store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [trial(), old], "measured")
        store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [trial(9.0)], "replay")
        assert store.trials(KEY, WORKLOAD, source_hash="old") == [old]
        assert store.trials(KEY, WORKLOAD, mode="measured") == [trial(), old]
        assert store.trials(KEY, WORKLOAD, mode="replay") == [trial(9.0)]
        assert store.trials(KEY, WORKLOAD, triton="3.6.0") == [trial(), old, trial(9.0)]
        assert store.trials(KEY, WORKLOAD, triton="3.7.1") == []
        assert store.trials(KEY, Workload(1, 64)) == []


def test_an_entry_is_the_trial_that_earned_it(path):
    with Store.open(path) as store:
        assert store.incumbent(KEY, WORKLOAD) is None
        first, second = store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [trial(), trial(11.0)], "replay")
        store.set_config(KEY, WORKLOAD, first, 14.0, 64, "replay", 10.0)
        assert store.incumbent(KEY, WORKLOAD) == entry(mode="replay", optimum_us=10.0)
        store.set_config(KEY, WORKLOAD, second, None, 128, "measured")
        assert store.entries() == [entry(us=11.0, default_us=None, evaluations=128)]
        assert store.counts() == {
            "environments": 1,
            "keys": 1,
            "workloads": 1,
            "trials": 2,
            "configs": 1,
        }


def test_a_batch_of_trials_is_kept_whole_or_not_at_all(path):
    with Store.open(path) as store:
        with pytest.raises(ValueError, match="invalid literal for int"):
            store.add_trials(
                KEY,
                WORKLOAD,
                ENVIRONMENT,
                [trial(), trial(config={"BLOCK_N": "x"})],
                "measured",
            )
        with pytest.raises(DatabaseError):
            store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [trial()], "guessed")
        assert set(store.counts().values()) == {0}
        assert store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [trial()], "measured") == [1]


def test_a_config_needs_a_trial(path):
    with Store.open(path) as store, pytest.raises(DatabaseError, match="FOREIGN KEY"):
        store.set_config(KEY, WORKLOAD, 7, None, 1, "measured")


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="fine"):
        Trial(CONFIG, "fine")


def test_every_migration_raises_the_schema_version_by_one():
    assert len(migrations._migrations) == file.SCHEMA_VERSION


def test_every_table_is_strict(path):
    with Store.open(path) as store:
        assert all(store._db.table(name).strict for name in TABLES)


def write(path: Path, start, batches: int) -> None:
    start.wait()
    with Store.open(path) as store:
        for i in range(batches):
            (*_, last) = store.add_trials(KEY, Workload(1, i + 1), ENVIRONMENT, [trial()] * 3, "measured")
            store.set_config(KEY, Workload(1, i + 1), last, None, 3, "measured")


@pytest.mark.parametrize("writers", [2, 4])
def test_processes_that_start_and_write_at_once_lose_nothing(path, writers):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(writers)
    processes = [context.Process(target=write, args=(path, start, 20)) for _ in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * writers
    with Store.open(path) as store:
        counts = store.counts()
        assert counts == {
            "environments": 1,
            "keys": 1,
            "workloads": 20,
            "trials": writers * 60,
            "configs": 20,
        }


def fails(path: Path, message: str) -> None:
    """Opening the database raises one line that has the message, the file and the way out."""
    with pytest.raises(DatabaseError) as raised:
        Store.open(path).close()
    text = str(raised.value)
    assert message in text and str(path) in text and "--db" in text and "\n" not in text


def test_a_locked_database_says_so(path, monkeypatch):
    monkeypatch.setattr(file, "BUSY_TIMEOUT_S", 0.1)
    Store.open(path).close()
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    fails(path, "is locked by another process")
    other.close()
    Store.open(path).close()


def test_a_file_that_is_no_database_says_so(path):
    path.parent.mkdir()
    path.write_text("hello " * 1000)
    fails(path, "is not an SQLite database")
    assert path.read_text() == "hello " * 1000


def test_a_database_with_a_damaged_page_says_so(path):
    with Store.open(path) as store:
        store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [trial()] * 200, "measured")
    content = bytearray(path.read_bytes())
    content[200:] = b"\xff" * (len(content) - 200)
    path.write_bytes(content)
    fails(path, "is damaged")


def test_a_database_of_another_program_is_left_as_it_is(path):
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE recipes (id)")
    other.close()
    before = path.read_bytes()
    fails(path, "is the SQLite database of another program")
    assert path.read_bytes() == before


def test_a_database_of_a_newer_patune_says_so(path):
    with Store.open(path) as store:
        store._db.execute("PRAGMA user_version = 99")
    fails(
        path,
        "was written by a newer patune (schema 99, this one knows 1): upgrade patune",
    )


def test_a_folder_in_the_place_of_the_file_says_so(path):
    path.mkdir(parents=True)
    fails(path, "cannot be opened")


def test_a_file_in_the_place_of_the_folder_says_so(path):
    path.parent.touch()
    fails(path, "cannot be made")


@pytest.mark.parametrize("folder_mode", [0o555, 0o777])
def test_a_read_only_database_says_so(folder_mode):
    def make(folder):
        Store.open(folder / "a.db").close()

    def act(folder):
        Store.open(folder / "a.db").close()

    with pytest.raises(
        DatabaseError,
        match=r"a\.db or its folder is read-only: make both writable, or give another",
    ):
        as_nobody(make, act, folder_mode)


def test_a_folder_that_cannot_be_written_says_so():
    with pytest.raises(DatabaseError, match=r"new/a\.db cannot be made \(Permission denied\)"):
        as_nobody(
            lambda folder: None,
            lambda folder: Store.open(folder / "new" / "a.db").close(),
        )
