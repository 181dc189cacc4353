"""Merging databases loses no trial, counts none twice, and may be done in any order and again."""

import itertools
from dataclasses import replace

import pytest

from patune.cachedb.merge import merge
from patune.cachedb.store import Store
from patune.workload import Workload

from .builders import CONFIG, ENVIRONMENT, KEY, WORKLOAD, entry, store_entries, trial

OTHER = Workload(1, 64)


def content(path):
    """Every trial with what it is of, once for each time that it is there; and the entries."""
    with Store.open(path) as store:
        trials = [
            (key, workload, environment, mode, sorted(t.config.items()), t.us, t.when)
            for mode in ("measured", "replay")
            for key, workload, environment in store.tried(mode)
            for t in store.trials(key, workload, mode=mode, environment=environment)
        ]
        return sorted(trials, key=repr), store.entries()


@pytest.fixture
def workers(tmp_path):
    """Three databases: two share a trial, one has another workload and driver, one a replay."""
    paths = [tmp_path / f"{name}.db" for name in "abc"]
    shared, newer = trial(10.0), replace(ENVIRONMENT, driver="580.0")
    with Store.open(paths[0]) as store:
        store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [shared, trial(11.0, config={"BLOCK_N": 1})], "measured")
        store.add_trials(KEY, OTHER, newer, [trial(3.0)], "measured")
    with Store.open(paths[1]) as store:
        store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [shared, trial(12.0, config={"BLOCK_N": 2})], "measured")
    with Store.open(paths[2]) as store:
        store.add_trials(KEY, WORKLOAD, ENVIRONMENT, [shared, shared], "replay")
    return paths


def test_every_trial_is_there_once_in_any_order_and_again(workers, tmp_path):
    found = []
    for n, order in enumerate(itertools.permutations(workers)):
        path = tmp_path / f"all{n}.db"
        with Store.open(path) as store:
            assert merge(store, list(order)) == (5, 0)
            assert merge(store, list(order)) == (0, 0)
        found.append(content(path))
    assert all(one == found[0] for one in found)
    assert [(w, mode, us) for _, w, _, mode, _, us, _ in found[0][0]] == [
        (OTHER, "measured", 3.0), (WORKLOAD, "measured", 11.0), (WORKLOAD, "measured", 12.0),
        (WORKLOAD, "measured", 10.0), (WORKLOAD, "replay", 10.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "winner"),
    [
        ({"mode": "replay", "evaluations": 99}, {"mode": "measured", "evaluations": 3}, 1),
        ({"evaluations": 64}, {"evaluations": 16, "us": 1.0}, 0),
        ({"when": "2026-01-02T03:04:05+00:00"}, {"when": "2026-01-03T03:04:05+00:00"}, 1),
    ],
)
def test_the_config_that_most_is_known_for_wins_whoever_is_merged_first(one, other, winner, tmp_path):
    slower = {"us": 6.0, "config": {**CONFIG, "num_splits": 1}}
    entries = [entry(**{"us": 5.0, **one}), entry(**{**slower, **other})]
    for n, order in enumerate(itertools.permutations((0, 1))):
        paths = []
        for i in order:
            paths.append(tmp_path / f"{n}-{i}.db")
            store_entries(paths[-1], [entries[i]])
        with Store.open(paths[0]) as store:
            merge(store, paths[1:])
            assert store.entries() == [entries[winner]]
