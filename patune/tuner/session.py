"""One tuning run over the workloads of a key: search, race, accept, store. It knows neither GPUs nor terminals."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..cachedb.store import Store
from ..cachedb.trial import Environment, Trial
from ..errors import WorkerError
from ..kernels.template import Template, Values
from ..workload import Key, Workload
from .accept import replaces
from .runner import Race, Runner
from .search import Search, transferred
from .space import Point, point_of, valid_points

FINALISTS = 4  # of the search that run in the last race, besides what was there before and the default
FINAL_ROUNDS = 15
DRIFT = 0.05  # of the incumbent's time since the search: the GPU was busy or its clock moved. Seen once in 38 races: 18%.
FINAL_RACES = 3  # at most, while there is drift


@dataclass(frozen=True, slots=True)
class Started:
    key: Key
    workloads: tuple[Workload, ...]
    environment: Environment
    mode: str  # "measured" or "replay"


@dataclass(frozen=True, slots=True)
class Progress:
    workload: Workload
    done: int  # configs measured, those of earlier runs included
    total: int
    best_us: float | None  # None until a config is right
    default_us: float | None
    trials_per_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    workload: Workload
    config: dict[str, int]
    us: float
    default_us: float | None  # None if the default config is not right
    evaluations: int  # configs measured, those of earlier runs included
    optimum_us: float | None  # known in a replay only
    regret: float | None  # us over the optimum's, minus 1


@dataclass(frozen=True, slots=True)
class Failed:
    workload: Workload
    message: str


Event = Started | Progress | Finished | Failed


def tune(
    template: Template,
    key: Key,
    workloads: Sequence[Workload],
    runner: Runner,
    store: Store,
    *,
    trials: int | None,
    seed: int = 0,
    budget_s: float | None = None,
    on_event: Callable[[Event], None],
) -> list[dict[str, Any]]:
    """Tune every workload; one result each, as `patune run --json` prints it. A workload that fails has none.

    `trials` is the number of configs measured a workload, those of earlier runs included; None measures every valid one.
    `budget_s` seconds are shared out evenly; what is over when they end is left out. Every batch is stored as soon as it
    is measured.
    """
    on_event(Started(key, tuple(workloads), runner.environment, runner.mode))
    ends = None if budget_s is None else time.monotonic() + budget_s
    results: list[dict[str, Any]] = []
    winners: list[tuple[Workload, Values]] = []
    for n, workload in enumerate(workloads):
        left = None if ends is None else ends - time.monotonic()
        if left is not None and left <= 0:
            break
        for soon in workloads[n : n + 2]:  # the next one compiles while this one is measured
            runner.prepare(key, soon, [template.default(key, soon), *valid_points(template, key, soon)])
        task = _Task(template, key, workload, runner, store, on_event)
        try:
            search = task.search(trials, seed, winners)
            task.run(search, None if left is None else time.monotonic() + left / (len(workloads) - n))
            finished = task.finish()
        except WorkerError as error:
            finished = Failed(workload, str(error))
        on_event(finished)
        if isinstance(finished, Finished):
            winners.append((workload, finished.config))
            results.append(_result(finished))
    return results


class _Task:
    """One workload being tuned."""

    def __init__(
        self,
        template: Template,
        key: Key,
        workload: Workload,
        runner: Runner,
        store: Store,
        on_event: Callable[[Event], None],
    ):
        self.key, self.workload, self.runner, self.store, self.on_event = key, workload, runner, store, on_event
        self.template, self.tunables = template, template.tunables
        self.points = valid_points(template, key, workload)
        self.default = template.default(key, workload)
        self.allowed = {self._point(config) for config in [*self.points, self.default]}
        entry = store.incumbent(key, workload)
        self.incumbent = entry["config"] if entry and self._usable(entry["config"]) else self.default
        self.champion: Values = self.incumbent  # and what has beaten it since
        environment = runner.environment
        self.known: dict[Point, Trial] = {}
        if runner.mode == "measured":  # a replay costs nothing, so it never leaves one half done
            earlier = store.trials(key, workload, source_hash=template.source_hash, triton=environment.triton, mode=runner.mode)
            self.known = {self._point(trial.config): trial for trial in earlier if self._usable(trial.config)}

    def search(self, trials: int | None, seed: int, winners: Iterable[tuple[Workload, Values]]) -> Search:
        elsewhere = transferred(self.template, self.key, self.workload, winners, self._usable)
        seeds = [self.default, self.incumbent, *elsewhere]
        prior = self.known.values()
        return Search(self.tunables, self.points, trials=trials, seed=seed, seeds=seeds, prior=prior)

    def run(self, search: Search, ends: float | None) -> None:
        """Measure what the search asks for, at least one batch, until it ends or the time does."""
        started, measured = time.monotonic(), 0
        while batch := search.ask():
            points = [config for config in batch if config != self.champion]
            race = self.runner.measure(self.key, self.workload, points, self.champion)
            fresh = [trial for trial in (race.reference, *race.trials) if trial.config in batch]
            search.tell(fresh)
            self._keep(race, fresh)
            measured += len(fresh)
            rate = measured / max(time.monotonic() - started, 1e-9)
            best_us = min((_us(trial) for trial in self._right()), default=None)
            self.on_event(Progress(self.workload, len(self.known), search.total, best_us, self._default_us(), rate))
            if ends is not None and time.monotonic() >= ends:
                break

    def finish(self) -> Finished | Failed:
        """The last race decides between what was there before the run, the default and the best that was found."""
        best = sorted(self._right(), key=_us)[:FINALISTS]
        points: list[Values] = []
        for config in [*(trial.config for trial in best), self.champion, self.default]:
            if config != self.incumbent and config not in points:
                points.append(config)
        race = self._last_race(points)
        trials = [race.reference, *race.trials]
        default = next(trial for trial in trials if trial.config == self.default)
        right = sorted((trial for trial in race.trials if trial.status == "ok"), key=_us)
        winner = next((trial for trial in right if replaces(trial, race.reference)), race.reference)
        if replaces(default, winner):  # an old incumbent may have become slower than the default
            winner = default
        ids = self.store.add_trials(self.key, self.workload, self.runner.environment, trials, self.runner.mode)
        if winner.us is None:
            return Failed(self.workload, f"no config of {self.key.kernel} {self.workload} is right: {winner.message}")
        optimum_us = self.runner.optimum_us(self.key, self.workload)
        self._set_config(ids[trials.index(winner)], default.us, optimum_us)
        regret = None if optimum_us is None else winner.us / optimum_us - 1
        return Finished(self.workload, winner.config, winner.us, default.us, len(self.known), optimum_us, regret)

    def _last_race(self, points: Sequence[Values]) -> Race:
        """Raced again while the incumbent is far from its own earlier time: pairs stay fair then, stored times would not."""
        before = self.known.get(self._point(self.incumbent))
        for _ in range(FINAL_RACES):
            race = self.runner.measure(self.key, self.workload, points, self.incumbent, FINAL_ROUNDS)
            if before is None or not before.us or not race.reference.us or abs(race.reference.us / before.us - 1) <= DRIFT:
                break
        return race

    def _keep(self, race: Race, fresh: Sequence[Trial]) -> None:
        """Store a batch, and its winner if it beat the champion in their race: an interrupted run leaves that much."""
        ids = self.store.add_trials(self.key, self.workload, self.runner.environment, fresh, self.runner.mode)
        self.known.update((self._point(trial.config), trial) for trial in fresh)
        right = [trial for trial in race.trials if replaces(trial, race.reference)]
        if right:
            best = min(right, key=_us)
            self.champion = best.config
            self._set_config(ids[fresh.index(best)], self._default_us(), None)

    def _set_config(self, trial_id: int, default_us: float | None, optimum_us: float | None) -> None:
        self.store.set_config(
            self.key, self.workload, trial_id, default_us, len(self.known), self.runner.mode, optimum_us=optimum_us
        )

    def _right(self) -> Iterator[Trial]:
        return (trial for trial in self.known.values() if trial.status == "ok" and trial.us is not None)

    def _default_us(self) -> float | None:
        trial = self.known.get(self._point(self.default))
        return trial.us if trial and trial.status == "ok" else None

    def _point(self, config: Values) -> Point:
        return point_of(config, self.tunables)

    def _usable(self, config: Mapping[str, int]) -> bool:
        """Whether a config from elsewhere has a place here: the same tunables, valid for this workload."""
        return config.keys() == self.tunables.keys() and self._point(config) in self.allowed


def _us(trial: Trial) -> float:
    return math.inf if trial.us is None else trial.us


def _result(finished: Finished) -> dict[str, Any]:
    result = asdict(finished)
    if finished.optimum_us is None:
        del result["optimum_us"], result["regret"]
    return result
