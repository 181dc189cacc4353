"""The measuring process is real; its kernel is interpreted, so all of this runs without a GPU."""

import time

import pytest

from patune.errors import WorkerError
from patune.tuner.fleet import Threads
from patune.tuner.gpu import GpuRunner
from patune.workload import Key, Workload
from tests.tuner import templates
from tests.tuner.templates import KEY, config

WORKLOAD = Workload(1, 64)


@pytest.fixture(scope="module")
def runner():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        runner = GpuRunner(timeout_s=5)
        yield runner
        runner.close()


def statuses(race):
    return [race.reference.status, *(trial.status for trial in race.trials)]


def test_right_configs_are_raced_with_the_reference(runner):
    """Every right config has one time a round, paired with the reference's, and all that a trial must know."""
    race = runner.measure(KEY, WORKLOAD, [config(32), config(64)], config(16), rounds=5)
    assert statuses(race) == ["ok"] * 3
    assert [trial.config for trial in race.trials] == [config(32), config(64)]
    assert len(race.reference.samples_us) >= 5
    assert {len(trial.samples_us) for trial in race.trials} <= {2, len(race.reference.samples_us)}  # 2: it was slow
    for trial in (race.reference, *race.trials):
        assert trial.error == 0
        assert trial.samples_us and min(trial.samples_us) > 0
        assert trial.source_hash == templates.TOY.source_hash
        assert trial.when.endswith("+00:00")
    assert runner.environment.triton and runner.environment.torch


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (templates.RAISES, "compile_failed", "ValueError: planted"),
        (templates.WRONG, "wrong_answer", "relative error 0.5, 1e-06 is allowed"),
        (templates.OUT_OF_MEMORY, "out_of_memory", "OutOfMemoryError: planted"),
        (templates.DIES, "worker_died", "the measuring process ended with exit code 7"),
        (templates.HANGS, "timeout", "no sign of life for 5 s"),
    ],
)
def test_failure_costs_only_its_config(runner, fault, status, message):
    """Whatever a config does, its own trial says so and its neighbours are timed as if it were not there."""
    race = runner.measure(KEY, WORKLOAD, [config(32), config(32, fault), config(64)], config(16))
    assert statuses(race) == ["ok", "ok", status, "ok"]
    assert race.trials[1].message == message
    assert not race.trials[1].samples_us
    assert race.trials[2].samples_us


def test_failing_reference_stops_nobody(runner):
    """If the config to race against is wrong, the others are still timed."""
    race = runner.measure(KEY, WORKLOAD, [config(32)], config(16, templates.WRONG))
    assert statuses(race) == ["wrong_answer", "ok"]
    assert len(race.trials[0].samples_us) >= 7


def test_illegal_access_is_told_from_a_death(runner, monkeypatch):
    """If the worker saw the GPU fail for good, its config is an illegal access, and the rest runs in a new worker."""
    worker = runner._worker
    reports = iter([("problem",), ("running", 0), ("checked", 0, "ok", 0.0, ""), ("running", 1),
                    ("checked", 1, "illegal_access", None, "CUDA error: an illegal memory access")])  # fmt: skip
    monkeypatch.setattr(worker, "receive", lambda timeout_s: next(reports))
    race = runner.measure(KEY, WORKLOAD, [config(32), config(64)], config(16))
    assert statuses(race) == ["ok", "illegal_access", "ok"]
    assert runner._worker is not worker
    assert race.reference.samples_us


def test_death_in_a_race_ends_it_for_all_in_it(runner, monkeypatch):
    """Nobody can be blamed for a death while several race, so none of them gets a time."""
    worker, reports = runner._worker, [("problem",)]
    for i in range(2):
        reports += [("running", i), ("checked", i, "ok", 0.0, "")]
    reports.append(("racing",))

    def receive(timeout_s):
        if not reports:
            worker._process.kill()
            raise worker._dead()
        return reports.pop(0)

    monkeypatch.setattr(worker, "receive", receive)
    race = runner.measure(KEY, WORKLOAD, [config(32)], config(16))
    assert statuses(race) == ["worker_died"] * 2
    assert runner.measure(KEY, WORKLOAD, [], config(16)).reference.status == "ok"


def test_workload_without_tensors_is_named(runner):
    """A workload too large for the memory is an error that names it, and the next one is measured."""
    key = Key("tests.tuner.templates:NO_TENSORS", "interpreter", 1, head_dim=16, page_size=16, q_heads_per_kv=1)
    with pytest.raises(WorkerError, match=r"no tensors for .*NO_TENSORS B1 L64: OutOfMemoryError: planted"):
        runner.measure(key, WORKLOAD, [], config(16))
    assert runner.measure(KEY, WORKLOAD, [], config(16)).reference.status == "ok"


def test_no_gpu_is_said_in_one_line(monkeypatch):
    """Without a GPU and without the interpreter there is nothing to measure on, and the error gives the way out."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(WorkerError, match="no GPU is visible to measure on: replay a landscape"):
        GpuRunner()


def test_a_runner_that_is_closed_in_the_middle_of_a_race_ends_at_once(monkeypatch):
    """The race comes back as an error, no worker is left, and none is started."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    runner = GpuRunner()
    fleet = Threads([runner], ["0"])
    fleet.submit(0, lambda runner: runner.measure(KEY, WORKLOAD, [config(32, templates.HANGS)], config(16)))
    time.sleep(1)
    process = runner._worker._process
    fleet.close()
    device, outcome = fleet.wait(fleet.now() + 10)
    assert not process.is_alive()  # asked when no other thread is waiting for it: only one of two learns that it has ended
    assert (device, str(outcome)) == (0, "the runner is closed")
    assert runner._worker._process is process
