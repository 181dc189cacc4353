"""`patune db` looks after databases and says what it did."""

import sqlite3

from patune.cachedb import lookup
from patune.cachedb.store import Store
from patune.kernels.registry import template
from patune.workload import Workload

from .recording import KEY, WORKLOADS, record, right


def test_check_says_that_a_database_is_sound(patune, tuned):
    result = patune("db", "check", "--db", tuned)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{tuned}: sound, environments 1, keys 1, workloads 2, trials ")


def test_check_finds_what_points_nowhere_and_what_was_not_earned(patune, tuned):
    connection = sqlite3.connect(tuned)
    connection.execute("UPDATE trials SET environment_id = 99 WHERE id = 1")
    connection.execute("UPDATE trials SET status = 'timeout', us = NULL WHERE id = (SELECT trial_id FROM configs LIMIT 1)")
    connection.commit()
    connection.close()
    result = patune("db", "check", "--db", tuned)
    assert result.exit_code == 1
    assert f"{tuned}: a row of trials points to none of environments" in result.stdout
    assert f"{tuned}: the config of key 1, workload 1 was not earned by its trial " in result.stdout


def test_merge_joins_what_workers_found(patune, tmp_path, db):
    sources = []
    for n, workload in enumerate(WORKLOADS):
        landscape, source = record(tmp_path / f"{n}.gz", workloads=[workload]), tmp_path / f"{n}.db"
        assert patune("run", "--gpu", "h100", "--replay", landscape, "--db", source).exit_code == 0
        sources.append(source)
    result = patune("db", "merge", *sources, "--db", db)
    assert result.exit_code == 0
    assert result.stdout == f"{db}: 34 trials added, 2 configs new or replaced\n"  # two spaces of 17
    assert lookup.load(db).entries == [entry for source in sources for entry in lookup.load(source).entries]
    again = patune("db", "merge", db, *sources, "--db", db)
    assert again.stdout == f"{db}: 0 trials added, 0 configs new or replaced\n"


def test_prune_drops_what_no_config_comes_from_and_no_kernel_knows(patune, tuned):
    with Store.open(tuned) as store:
        (environment,) = {environment for *_, environment in store.tried("replay")}
        old = [right({"BLOCK_T": 4, "num_warps": 4}, WORKLOADS[0])] * 3
        store.add_trials(KEY, Workload(9, 9), environment, old, "measured")
        before = len(store.trials(KEY, WORKLOADS[0], source_hash=template("append").source_hash))
    served = lookup.load(tuned).entries
    result = patune("db", "prune", "--db", tuned)
    assert (result.exit_code, result.stdout.split(",")[0]) == (0, f"{tuned}: 3 trials dropped")
    assert lookup.load(tuned).entries == served
    with Store.open(tuned) as store:
        assert len(store.trials(KEY, WORKLOADS[0])) == before
        assert store.counts()["workloads"] == len(WORKLOADS)
        assert store.problems() == []
