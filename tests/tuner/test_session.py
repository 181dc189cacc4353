"""A tuning run keeps what it measured, never makes a workload slower, and moves nothing for noise."""

import random
from dataclasses import replace

import pytest

from patune.cachedb import landscape, lookup
from patune.cachedb.store import Store
from patune.cachedb.trial import Trial
from patune.errors import WorkerError
from patune.kernels.registry import NAMES, template
from patune.tuner import task
from patune.tuner.events import Failed, Finished, Progress, Started
from patune.tuner.fleet import Threads
from patune.tuner.replay import ReplayRunner
from patune.tuner.runner import Race
from patune.tuner.search import BATCH, transferred
from patune.tuner.session import Items, soonest_compiled_first, tune
from patune.tuner.space import valid_points
from patune.tuner.task import Item
from patune.workload import Workload
from tests.tuner.formula import KEY, OPTIMUM, TEMPLATE, WORKLOAD, FormulaRunner, formula_us
from tests.tuner.recording import record

DEFAULT = TEMPLATE.default(KEY, WORKLOAD)
OTHER = Workload(16, 4096)
SIZE = len(valid_points(TEMPLATE, KEY, WORKLOAD))


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "patune.db") as store:
        yield store


def run(store, runner, workloads=(WORKLOAD,), *, trials=48, **options):
    events = []
    work = Items([Item(TEMPLATE, KEY, workload) for workload in workloads])
    results = tune(work, Threads([runner], ["0"]), store, trials=trials, on_event=events.append, **options)
    return results, events


def test_search_finds_a_better_config_and_stores_it(store):
    """The result is faster than the default, and the database serves it with its own times."""
    (result,), events = run(store, FormulaRunner())
    assert formula_us(result.config) <= 1.1 * formula_us(OPTIMUM) < formula_us(DEFAULT)
    assert result.us < result.default_us
    assert result.evaluations == 48
    assert (result.optimum_us, result.regret, result.note) == (None, None, "")
    (entry,) = store.entries()
    for name in ("config", "us", "default_us", "evaluations", "optimum_us"):
        assert entry[name] == getattr(result, name)
    assert entry["mode"] == "measured"
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert [e.done for e in events if isinstance(e, Progress)] == list(range(BATCH, 49, BATCH))


def test_exhaustive_run_measures_every_point_once(store):
    """With no limit every valid config has a trial, and the best one wins."""
    runner = FormulaRunner(noise=0.001)
    (result,), _ = run(store, runner, trials=None)
    assert result.config == OPTIMUM
    assert result.evaluations == SIZE
    searched = [frozenset(c.items()) for batch in runner.batches[:-1] for c in batch[1:]]
    assert len(searched) == len(set(searched)) == SIZE - 1  # the default was the first reference
    assert runner.prepared == [(WORKLOAD, SIZE + 1)]


class MovingClock(FormulaRunner):
    """Times of a race are all longer by one factor, another one for each race."""

    def measure(self, key, workload, points, reference, rounds=7):
        factor, race = self.rng.uniform(1.0, 1.3), super().measure(key, workload, points, reference, rounds)
        slower = lambda trial: replace(trial, samples_us=tuple(us * factor for us in trial.samples_us))
        return Race([slower(trial) for trial in race.trials], slower(race.reference))


def test_a_clock_that_moves_between_races_hides_no_optimum(tmp_path):
    """Configs of different races are compared by what the reference took in each; stored are the times that were measured."""
    for seed in range(30):
        with Store.open(tmp_path / f"{seed}.db") as store:
            (result,), _ = run(store, MovingClock(noise=0.02, seed=seed), trials=None, seed=seed)
            assert result.config == OPTIMUM
            us = [trial.us / formula_us(trial.config) for trial in store.trials(KEY, WORKLOAD)]
            assert max(us) > 1.1 * min(us)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_nothing(store, seed):
    """Where all configs are equally fast the default stays."""
    flat = FormulaRunner(us=lambda config, workload: 10.0, noise=0.03, seed=seed)
    (result,), _ = run(store, flat, seed=seed)
    assert result.config == DEFAULT


def test_incumbent_stays_unless_beaten(store):
    """A second run races against what the first one found, and keeps it if nothing is clearly faster."""
    (first,), _ = run(store, FormulaRunner(noise=0.001), trials=None)
    runner = FormulaRunner(noise=0.03, seed=9)
    (second,), _ = run(store, runner, trials=None)
    assert second.config == first.config
    assert runner.batches[0][0] == first.config


def test_what_ships_is_the_incumbent_where_the_database_has_none(store, tmp_path, monkeypatch):
    """Tuning must not make a call slower than it was without: the shipped config stays unless it is beaten. A replay knows none."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(lookup, "SHIPPED_TABLES", folder)
    lookup.reload()
    item = Item(TEMPLATE, replace(KEY, kernel="mine:TEMPLATE"), WORKLOAD)

    def first_reference(runner, store):
        (result,) = tune(Items([item]), Threads([runner], ["0"]), store, trials=16, on_event=lambda event: None)
        return runner.batches[0][0], result

    assert first_reference(FormulaRunner(), store)[0] == DEFAULT
    with Store.open(folder / "h100.db") as shipped:
        tune(Items([item]), Threads([FormulaRunner(noise=0.001)], ["0"]), shipped, trials=None, on_event=lambda event: None)
    lookup.reload()
    with Store.open(tmp_path / "fresh.db") as fresh:
        reference, result = first_reference(FormulaRunner(noise=0.03), fresh)
    assert reference == result.config == OPTIMUM
    replayed = FormulaRunner()
    replayed.mode = "replay"
    with Store.open(tmp_path / "replay.db") as fresh:
        assert first_reference(replayed, fresh)[0] == DEFAULT


def test_incumbent_slower_than_the_default_goes(store):
    """If the world has changed under an incumbent, the default takes its place."""
    run(store, FormulaRunner(noise=0.001), trials=None)
    turned = FormulaRunner(us=lambda c, workload: 10.0 if c == DEFAULT else 14.0, noise=0.001)
    (result,), _ = run(store, turned, trials=None)
    assert result.config == DEFAULT


class Interrupted(FormulaRunner):
    def __init__(self, after):
        super().__init__(noise=0.001)
        self.left = after

    def measure(self, *args, **kwargs):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().measure(*args, **kwargs)


def test_interrupted_run_keeps_what_it_measured_and_goes_on(store):
    """After Ctrl-C every finished batch and the best config of it are stored; the next run measures only the rest."""
    with pytest.raises(KeyboardInterrupt):
        run(store, Interrupted(after=2), trials=64)
    kept = store.trials(KEY, WORKLOAD)
    assert len(kept) == 2 * BATCH
    assert formula_us(store.incumbent(KEY, WORKLOAD)["config"]) < formula_us(DEFAULT)
    runner = FormulaRunner(noise=0.001)
    (result,), _ = run(store, runner, trials=64)
    searched = [c for batch in runner.batches[:-1] for c in batch[1:]]
    assert len(searched) == 64 - 2 * BATCH
    assert not any(trial.config in searched for trial in kept)
    assert result.evaluations == 64


def test_wrong_config_never_wins(store):
    """A config with a wrong answer is recorded as such and never chosen, though it may be the fastest."""
    runner = FormulaRunner(us=lambda c, workload: None if c["num_splits"] >= 8 else formula_us(c))
    (result,), _ = run(store, runner, trials=None)
    assert result.config["num_splits"] < 8
    assert {trial.status for trial in store.trials(KEY, WORKLOAD)} == {"ok", "wrong_answer"}


def test_wrong_default_is_replaced_by_any_right_config(store):
    """Where the default gives wrong answers it has no time, and the best right config wins."""
    (result,), _ = run(store, FormulaRunner(us=lambda c, w: None if c == DEFAULT else formula_us(c), noise=0.001), trials=None)
    assert result.config == OPTIMUM
    assert result.default_us is None


def test_failed_workload_does_not_stop_the_others(store):
    """A workload that cannot be measured, or has no right config, is reported; the others get their results."""

    class Partly(FormulaRunner):
        def measure(self, key, workload, *args, **kwargs):
            if workload == WORKLOAD:
                raise WorkerError("no tensors")
            return super().measure(key, workload, *args, **kwargs)

    runner = Partly(us=lambda c, w: None if w.batch_size == 99 else formula_us(c))
    results, events = run(store, runner, [WORKLOAD, Workload(99, 4096), OTHER])
    assert [result.workload for result in results] == [OTHER]
    failed = [event for event in events if isinstance(event, Failed)]
    assert failed[0].message == "no tensors"
    assert failed[1].message.startswith("no config of decode B99 L4096 is right")


def test_first_batch_holds_what_is_known(store):
    """Default, incumbent and the winners of the key's other workloads are measured before anything else."""
    run(store, FormulaRunner(noise=0.001), [OTHER], trials=None)
    runner = FormulaRunner(noise=0.001)
    (winner, _), _ = run(store, runner, [Workload(4, 4096), OTHER], trials=32)
    first_of_other = next(batch for batch in runner.batches[3:] if batch[0] == store.incumbent(KEY, OTHER)["config"])
    assert winner.config in first_of_other
    assert DEFAULT in runner.batches[0]


def test_what_comes_compiles_while_the_first_is_measured(store):
    """When a run begins to measure, all its configs are on their way to the compilers, once, in the order of the workloads."""
    workloads = [WORKLOAD, OTHER, Workload(4, 4096)]
    prepared = []

    class Watched(FormulaRunner):
        def measure(self, *args):
            prepared.append([workload for workload, _ in self.prepared])
            return super().measure(*args)

    run(store, Watched(), workloads, trials=None)
    assert prepared and all(at == workloads for at in prepared)


def test_replay_decides_like_the_measurement_it_replays(store, tmp_path):
    """A replay knows the optimum, comes close to it, invents nothing and says what it is."""
    workloads = [WORKLOAD, OTHER]
    recorded = landscape.load(record(tmp_path / "h100.landscape.json.gz", workloads))
    results, _ = run(store, ReplayRunner(recorded), workloads, trials=64)
    for result, workload in zip(results, workloads):
        assert result.optimum_us == recorded.optimum(KEY, workload).us
        assert 0 <= result.regret < 0.08
        assert result.regret == result.us / result.optimum_us - 1
    for entry in store.entries():
        assert entry["mode"] == "replay"
        assert entry["source_hash"] == recorded.source_hash(KEY)
    again, _ = run(store, ReplayRunner(recorded), workloads, trials=None)
    assert all(after.us <= before.us for before, after in zip(results, again))


def test_prior_trials_of_another_source_do_not_count(store):
    """Trials of an edited kernel are measured again."""
    runner = FormulaRunner()
    trial = runner.trial(OPTIMUM, WORKLOAD, 7)
    stale = Trial(trial.config, "ok", trial.samples_us, source_hash="another", when=trial.when)
    store.add_trials(KEY, WORKLOAD, runner.environment, [stale], "measured")
    (result,), _ = run(store, runner, trials=None)
    assert random.choice([c for batch in runner.batches for c in batch if c == OPTIMUM]) == OPTIMUM
    assert result.evaluations == SIZE


class DriftingRunner(FormulaRunner):
    """The GPU is 20% slower during the first `busy` races of 15 rounds."""

    def __init__(self, busy):
        super().__init__()
        self.busy = busy

    def measure(self, key, workload, points, reference, rounds=7):
        slow = rounds == task.FINAL_ROUNDS and self.busy > 0
        self.busy -= slow
        self.us = lambda config, workload: formula_us(config, workload) * (1.2 if slow else 1.0)
        return super().measure(key, workload, points, reference, rounds)


@pytest.mark.parametrize(("busy", "finals"), [(0, 1), (1, 2), (2, 3), (99, 3)])
def test_a_last_race_on_a_busy_gpu_is_run_again_a_few_times(store, busy, finals):
    """Times that are stored come from a GPU as quiet as the search had, if it gets quiet again."""
    runner = DriftingRunner(busy)
    (result,), _ = run(store, runner)
    assert len(runner.batches) == 48 // BATCH + finals
    slowed = 1.2 if busy == 99 else 1.0
    assert ("the GPU was busy or its clock moved" in result.note) == (busy == 99)
    assert result.default_us == pytest.approx(formula_us(DEFAULT) * slowed, rel=0.02)


def test_a_neighbour_s_winner_is_tried_fitted_to_this_workload():
    """The nearest workload's comes first, its splits fitted by the template; what cannot be used is left out."""
    near, far = Workload(16, 4096), Workload(256, 4096)
    fit = lambda config, key, of, to: config | {"num_splits": config["num_splits"] * of.batch_size // to.batch_size}
    template = replace(TEMPLATE, fit=fit)
    first, last = {"BLOCK_N": 64, "num_warps": 4, "num_splits": 6}, {"BLOCK_N": 128, "num_warps": 8, "num_splits": 1}
    usable = lambda config: config["num_splits"] in TEMPLATE.tunables["num_splits"]
    found = transferred(template, KEY, Workload(8, 4096), [(far, last), (near, first)], usable)
    assert found == [first | {"num_splits": 12}, first, last | {"num_splits": 32}, last]


def test_kernels_of_little_source_are_measured_first_and_their_workloads_stay_in_order():
    """They compile while nothing else can be measured; a workload starts from what those of its key before it have found."""
    templates = [template(name) for name in NAMES]
    items = [Item(t, replace(KEY, kernel=t.name), Workload(batch, 512, 512)) for t in templates for batch in (8, 1, 4)]
    ordered = soonest_compiled_first(items)
    sizes = [item.template.source_size for item in ordered]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(NAMES)
    for t in templates:
        assert [item for item in ordered if item.template is t] == [item for item in items if item.template is t]
