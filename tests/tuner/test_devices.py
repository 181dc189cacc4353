"""Several devices share one run: all of them work until the end, and no config is measured twice. Time is simulated."""

import itertools

import pytest

from patune.cachedb import landscape
from patune.cachedb.store import Store
from patune.kernels.registry import template
from patune.tuner.events import Failed, Finished, Progress
from patune.tuner.replay import ReplayRunner
from patune.tuner.search import ENUMERATED
from patune.tuner.session import Items, largest_first, soonest_compiled_first, tune
from patune.tuner.task import Item
from patune.workload import Workload
from tests.tuner.formula import KEY, OPTIMUM, TEMPLATE, WORKLOAD, FormulaRunner, formula_us
from tests.tuner.simulated import CHECK_S, TENSORS_S, Simulated

H100 = landscape.load(landscape.shipped("h100"))
LLAMA = [key for key in H100.keys() if (key.head_dim, key.page_size, key.q_heads_per_kv) in ((128, 16, 4), (128, 16, 1))]


def items_of(keys) -> list[Item]:
    return [Item(template(key.kernel), key, workload) for key in keys for workload in H100.workloads(key)]


def run(path, fleet, items, **options):
    events = []
    options = {"trials": 64, **options}
    with Store.open(path) as store:
        results = tune(Items(items), fleet, store, on_event=events.append, **options)
        measured = {(item.key, item.workload): store.trials(item.key, item.workload) for item in items}
    return results, events, measured


def recorded_run(path, devices, keys=LLAMA, **options):
    """`patune run --gpu h100`, by default --model llama-3.1-8b."""
    fleet = Simulated([ReplayRunner(H100) for _ in range(devices)])
    items = (soonest_compiled_first if devices == 1 else largest_first)(items_of(keys))
    return fleet, *run(path, fleet, items, **options)


def trials_per_s(fleet, events):
    return sum(len(event.statuses) for event in events if isinstance(event, Progress)) / fleet.now()


@pytest.mark.parametrize(("devices", "keys"), [(2, LLAMA), (4, LLAMA), (8, H100.keys())], ids=["2", "4", "8"])
def test_n_devices_make_nearly_n_times_the_trials_a_second(tmp_path, devices, keys):
    """At least 0.88 N, with recorded times: one model's workloads on a few devices, all standard ones on eight."""
    one, _, events, _ = recorded_run(tmp_path / "one.db", 1, keys)
    fleet, results, many, _ = recorded_run(tmp_path / "many.db", devices, keys)
    assert len(results) == len(items_of(keys))
    assert trials_per_s(fleet, many) >= 0.88 * devices * trials_per_s(one, events)


def test_devices_that_share_a_workload_measure_no_config_twice(tmp_path):
    """Four devices on one workload: every config of the search once, and one last race when all are back."""
    fleet = Simulated([FormulaRunner(seed=i) for i in range(4)])
    (result,), _, measured = run(tmp_path / "a.db", fleet, [Item(TEMPLATE, KEY, WORKLOAD)], trials=None)
    configs = [tuple(trial.config.values()) for trial in measured[KEY, WORKLOAD]]
    finalists = 6  # the four best, champion and default at most
    assert len(set(configs)) == result.evaluations
    assert len(configs) <= result.evaluations + finalists
    assert {device for device, *_ in fleet.log} == {0, 1, 2, 3}
    last_start = max(start for *_, start, _ in fleet.log)
    assert all(end <= last_start for *_, start, end in fleet.log if start < last_start)
    assert formula_us(result.config) <= 1.05 * formula_us(OPTIMUM)


def test_the_same_seed_makes_the_same_run_on_several_devices(tmp_path):
    runs = [recorded_run(tmp_path / f"{name}.db", 3, seed=5) for name in "ab"]
    assert runs[0][1] == runs[1][1]
    assert runs[0][0].log == runs[1][0].log


def test_a_workload_that_fails_on_one_device_leaves_the_others_at_work(tmp_path):
    """Its other races come back to nobody, and all other workloads have results."""
    items = [Item(TEMPLATE, KEY, Workload(batch, 4096)) for batch in (1, 2, 4, 8)]
    fleet = Simulated([FormulaRunner() for _ in range(3)], broken=lambda device, workload: workload.batch_size == 2)
    results, events, _ = run(tmp_path / "a.db", fleet, items)
    assert sorted(result.workload.batch_size for result in results) == [1, 4, 8]
    assert [event.workload.batch_size for event in events if isinstance(event, Failed)] == [2]


def test_every_event_says_which_device_it_was(tmp_path):
    fleet = Simulated([FormulaRunner(seed=i) for i in range(2)])
    _, events, _ = run(tmp_path / "a.db", fleet, [Item(TEMPLATE, KEY, Workload(b, 64)) for b in (1, 2)])
    assert {event.device for event in events if isinstance(event, Progress)} == {"0", "1"}


@pytest.mark.parametrize(("devices", "budget_s"), list(itertools.product((1, 4), (10, 60, 200))))
def test_a_budget_is_the_time_that_a_run_takes(tmp_path, devices, budget_s):
    """It never lasts longer, uses nearly all of what it may, and shares it out over the workloads."""
    fleet, results, events, _ = recorded_run(tmp_path / "a.db", devices, ends=float(budget_s), trials=None)
    whole, *_ = recorded_run(tmp_path / "b.db", devices, trials=None)
    assert fleet.now() <= budget_s
    assert fleet.now() >= 0.8 * min(budget_s, whole.now())
    assert len(results) >= min(len(items_of(LLAMA)), devices * budget_s / 6)
    late = [event for event in events if isinstance(event, Finished) and "before its last race" in event.note]
    assert len(late) <= devices


def test_a_race_that_runs_when_the_budget_ends_is_all_that_is_lost(tmp_path):
    """What was measured before is stored, and the outcome is what had won by then."""
    fleet = Simulated([FormulaRunner(noise=0.001)])
    first_race_s = TENSORS_S + ENUMERATED * CHECK_S
    (result,), _, measured = run(
        tmp_path / "a.db", fleet, [Item(TEMPLATE, KEY, WORKLOAD)], trials=None, ends=first_race_s + 3 * CHECK_S
    )
    assert len(measured[KEY, WORKLOAD]) == result.evaluations == ENUMERATED
    assert result.note == "the budget ended before its last race"
    assert formula_us(result.config) < formula_us(TEMPLATE.default(KEY, WORKLOAD))


def test_a_workload_gets_a_race_and_a_last_race_from_a_share_that_is_too_small(tmp_path):
    """Then what is over for all of them is left out."""
    items = [Item(TEMPLATE, KEY, workload) for workload in (WORKLOAD, Workload(16, 4096), Workload(4, 64))]
    results, _, _ = run(tmp_path / "a.db", Simulated([FormulaRunner()]), items, trials=None, ends=2.0)
    assert [result.evaluations for result in results] == [ENUMERATED, ENUMERATED]
