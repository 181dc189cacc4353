"""A workload is in a landscape with all of its configs or not at all."""

from dataclasses import replace

import pytest

from patune.cachedb import landscape
from patune.cachedb.store import Store
from patune.cachedb.trial import Environment, Trial
from patune.errors import PatuneError
from patune.kernels.registry import template
from patune.tuner.record import record
from patune.tuner.space import valid_points
from patune.workload import Key, Workload

H100 = Environment("NVIDIA H100 80GB HBM3", 132, "9.0", "570.86", "3.6.0", "2.11.0")
KEY, WORKLOAD = Key("append", H100.gpu, 132, 128, 16, 1), Workload(8, 4096)
KERNEL = template("append")
POINTS = valid_points(KERNEL, KEY, WORKLOAD)


def trial(config, us, rounds=7, source_hash=KERNEL.source_hash):
    return Trial(config, "ok", (us,) * rounds, 0.0, source_hash=source_hash, when="2026-11-22T12:00:00+00:00")


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "trials.db") as store:
        yield store


def test_every_config_is_there_once_with_its_longest_measurement(store, tmp_path):
    store.add_trials(KEY, WORKLOAD, H100, [trial(config, 5.0) for config in POINTS], "measured")
    store.add_trials(KEY, WORKLOAD, H100, [trial(POINTS[0], 4.0, rounds=15)], "measured")
    assert record(store, tmp_path / "l.json.gz", "c0ffee") == []
    recorded = landscape.load(tmp_path / "l.json.gz")
    assert len(recorded.trials(KEY, WORKLOAD)) == len(POINTS)
    assert recorded.commit == "c0ffee"
    assert recorded.environment == H100
    assert recorded.optimum(KEY, WORKLOAD).config == POINTS[0]
    assert len(recorded.optimum(KEY, WORKLOAD).samples_us) == 15


def test_a_workload_with_a_hole_is_left_out_and_named(store, tmp_path):
    store.add_trials(KEY, WORKLOAD, H100, [trial(config, 5.0) for config in POINTS], "measured")
    other = replace(WORKLOAD, batch_size=16)
    store.add_trials(KEY, other, H100, [trial(config, 5.0) for config in valid_points(KERNEL, KEY, other)[2:]], "measured")
    (line,) = record(store, tmp_path / "l.json.gz", "")
    assert line.startswith(f"append {other}: 2 of ")
    assert landscape.load(tmp_path / "l.json.gz").workloads(KEY) == [WORKLOAD]


def test_nothing_is_written_where_no_workload_is_complete(store, tmp_path):
    store.add_trials(KEY, WORKLOAD, H100, [trial(config, 5.0) for config in POINTS[2:]], "measured")
    with pytest.raises(PatuneError, match=f"run --trials all first: .* 2 of {len(POINTS)} configs have no trial"):
        record(store, tmp_path / "l.json.gz", "")
    assert not (tmp_path / "l.json.gz").exists()


def test_trials_of_another_kernel_source_do_not_count(store, tmp_path):
    store.add_trials(KEY, WORKLOAD, H100, [trial(config, 5.0, source_hash="old") for config in POINTS], "measured")
    with pytest.raises(PatuneError, match="have no trial with this kernel"):
        record(store, tmp_path / "l.json.gz", "")


def test_two_sets_of_versions_are_not_mixed(store, tmp_path):
    newer = Environment(H100.gpu, 132, "9.0", "570.86", "3.7.1", "2.13.0")
    store.add_trials(KEY, WORKLOAD, H100, [trial(config, 5.0) for config in POINTS], "measured")
    store.add_trials(KEY, WORKLOAD, newer, [trial(POINTS[0], 5.0)], "measured")
    with pytest.raises(PatuneError, match=r"one set of versions, .* has 2"):
        record(store, tmp_path / "l.json.gz", "")
