"""A replay gives back what was recorded and nothing else."""

import dataclasses

import pytest

from patune.cachedb import landscape
from patune.errors import PatuneError
from patune.tuner.replay import ReplayRunner
from patune.workload import Workload
from tests.tuner.formula import ENVIRONMENT, KEY, OPTIMUM, WHEN, WORKLOAD
from tests.tuner.recording import record


@pytest.fixture
def runner(tmp_path):
    return ReplayRunner(landscape.load(record(tmp_path / "h100.landscape.json.gz")))


def test_trials_are_the_recorded_ones(runner):
    """A replayed trial carries the samples, the source hash and the time of the measurement."""
    default = {"BLOCK_N": 32, "num_warps": 2, "num_splits": 4}
    race = runner.measure(KEY, WORKLOAD, [OPTIMUM], default)
    assert [trial.config for trial in (race.reference, *race.trials)] == [default, OPTIMUM]
    assert len(race.trials[0].samples_us) == 7
    assert race.trials[0].when == WHEN
    assert runner.environment == ENVIRONMENT
    assert runner.optimum_us(KEY, WORKLOAD) == runner.landscape.optimum(KEY, WORKLOAD).us


@pytest.mark.parametrize("config", [{**OPTIMUM, "num_splits": 7}, {**OPTIMUM, "num_stages": 3}, {"BLOCK_N": 64}])
def test_missing_point_is_an_error_that_names_it(runner, config):
    """A time is never made up: a point or tunable that was not recorded is an error."""
    named = " ".join(f"{name}={value}" for name, value in config.items())
    with pytest.raises(PatuneError, match=f"no trial of decode B8 L4096 with {named}"):
        runner.measure(KEY, WORKLOAD, [config], OPTIMUM)


@pytest.mark.parametrize(("key", "workload"), [(KEY, Workload(3, 77)), (dataclasses.replace(KEY, head_dim=64), WORKLOAD)])
def test_missing_workload_is_an_error_that_names_it(runner, key, workload):
    """A key or workload that was not recorded is an error that says what to do."""
    with pytest.raises(PatuneError, match=f"has no decode {workload} with head_dim={key.head_dim}.*: measure it on the GPU"):
        runner.measure(key, workload, [], OPTIMUM)
