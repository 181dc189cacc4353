"""Configs that are wrong, crash, hang or ask for too much on a real GPU: each costs its own trial, and the search goes on."""

import pytest

from patune.cachedb.store import Store
from patune.tuner.events import Progress
from patune.tuner.fleet import Threads
from patune.tuner.gpu import GpuRunner
from patune.tuner.session import Items, tune
from patune.tuner.task import Item
from patune.workload import Key, Workload
from tests.tuner import templates
from tests.tuner.templates import PLANTED, config

pytestmark = pytest.mark.gpu

WORKLOAD = Workload(1, 1 << 20)
STATUS = {
    templates.NONE: "ok",
    templates.WRONG: "wrong_answer",
    templates.NAN: "wrong_answer",
    templates.ILLEGAL: "illegal_access",
    templates.HANGS: "timeout",
    templates.TOO_BIG: "out_of_resources",
    templates.OUT_OF_MEMORY: "out_of_memory",
    templates.BREAKS_COMPILER: "compile_failed",
}


@pytest.fixture(scope="module")
def runner():
    runner = GpuRunner(timeout_s=5)
    yield runner
    runner.close()


def key_of(runner) -> Key:
    return Key(PLANTED.name, runner.environment.gpu, runner.environment.sm_count, head_dim=1, page_size=1, q_heads_per_kv=1)


@pytest.mark.parametrize("fault", STATUS, ids=STATUS.get)
def test_a_failure_is_its_own_status_and_its_neighbours_are_timed(runner, fault):
    """Whatever one config does to the GPU, the others of its race have times as if it were not there."""
    race = runner.measure(key_of(runner), WORKLOAD, [config(32), config(32, fault), config(64)], config(16))
    assert [trial.status for trial in race.trials] == ["ok", STATUS[fault], "ok"]
    assert race.reference.status == "ok" and len(race.reference.samples_us) >= 7
    assert race.trials[0].samples_us and race.trials[2].samples_us
    if fault != templates.NONE:
        assert race.trials[1].message and not race.trials[1].samples_us


def test_a_search_over_all_of_them_counts_each_and_finds_a_right_one(runner, tmp_path):
    """Three configs of every kind in one search: the statuses are counted, and only a right one can win."""
    events = []
    with Store.open(tmp_path / "a.db") as store:
        work = Items([Item(PLANTED, key_of(runner), WORKLOAD)])
        (result,) = tune(work, Threads([runner], ["0"]), store, trials=None, on_event=events.append)
    counted = [status for event in events if isinstance(event, Progress) for status in event.statuses]
    assert sorted(counted) == sorted(3 * list(STATUS.values()))
    assert result.config["FAULT"] == templates.NONE and result.evaluations == 24
