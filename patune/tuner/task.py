"""One workload being tuned: which races it wants next, and what each outcome changes. It knows neither clocks nor devices."""

import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..cachedb import lookup
from ..cachedb.store import Store
from ..cachedb.trial import Trial
from ..kernels.config import find
from ..kernels.defaults import query_of
from ..kernels.template import Template, Values
from ..workload import Key, Workload
from .accept import replaces
from .events import Failed, Finished
from .runner import ROUNDS, Race, Runner
from .search import Search, transferred
from .space import Point, point_of, valid_points

FINALISTS = 4  # of the search that run in the last race, besides what was there before and the default
FINAL_ROUNDS = 15
DRIFT = 0.05  # of the incumbent's time since the search: the GPU was busy or its clock moved. Seen once in 38 races: 18%.
FINAL_RACES = 3  # at most, while there is drift
NOISE = 0.03  # standard deviation over mean of the incumbent's rounds in the last race that is worth a word

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Item:
    """A workload that is to be tuned."""

    template: Template
    key: Key
    workload: Workload

    def points(self) -> list[dict[str, int]]:
        return valid_points(self.template, self.key, self.workload)

    def __str__(self) -> str:
        return f"{self.key.kernel} {self.workload}"


@dataclass(frozen=True, slots=True)
class Job:
    """One race that a task wants."""

    points: list[Values]
    reference: Values
    rounds: int
    asked: list[dict[str, int]]  # the configs that the search waits for; empty in the last race


class Ledger(Protocol):
    """Where several workers keep the trials of a workload together."""

    def trials(self) -> list[Trial]:
        """Those that any worker has measured."""
        ...

    def running(self, configs: Iterable[Values]) -> None: ...

    def tell(self, trials: Iterable[Trial]) -> None: ...


class Task:
    """Ask for a `job`, run it, `take` its race, until there is an `outcome`. Several jobs may run at once."""

    def __init__(
        self,
        item: Item,
        runner: Runner,
        store: Store,
        *,
        trials: int | None,
        seed: int,
        winners: Iterable[tuple[Workload, Values]],
        ledger: Ledger | None = None,
    ):
        self.item, self.runner, self.store, self.ledger = item, runner, store, ledger
        self.key, self.workload, self.tunables = item.key, item.workload, item.template.tunables
        self.running = 0  # jobs
        self.outcome: Finished | Failed | None = None
        self._closing = False
        self._finals = 0
        points = item.points()
        self.default = item.template.default(self.key, self.workload)
        self._allowed = {self._point(config) for config in [*points, self.default]}
        self.incumbent = next(filter(self._usable, self._served()), self.default)
        self.champion: Values = self.incumbent  # and what has beaten it since
        self.known = self._known()
        self._level_us = {point: trial.us for point, trial in self.known.items() if trial.us}  # see _leveled
        elsewhere = transferred(item.template, self.key, self.workload, winners, self._usable)
        seeds, prior = [self.default, self.incumbent, *elsewhere], self.known.values()
        log.debug(
            "%s: %d configs are valid, %d measured; %d come from other workloads", item, len(points), len(prior), len(elsewhere)
        )
        self.search = Search(self.tunables, points, trials=trials, seed=seed, seeds=seeds, prior=prior)

    def job(self, limit: int) -> Job | None:
        """The next race, of at most `limit` new configs; None if there is none, or none before those that run are over."""
        if not self._closing:
            if batch := self.search.ask(limit):
                if self.ledger:
                    self.ledger.running(batch)
                self.running += 1
                return Job([config for config in batch if config != self.champion], self.champion, ROUNDS, batch)
            self._closing = True
        if self.running or self.outcome:
            return None
        self.running += 1
        self._finals += 1
        return Job(self._finalists(), self.incumbent, FINAL_ROUNDS, [])

    def take(self, job: Job, race: Race) -> None:
        self.running -= 1
        if job.asked:
            self._learn(job, race)
            return
        drift = self._drift(race)
        if abs(drift) > DRIFT and self._finals < FINAL_RACES:
            log.debug("%s: raced again, the incumbent's time has moved by %+.0f%% since the search", self.item, 100 * drift)
        else:
            self._conclude(race, drift)

    def stop_search(self) -> None:
        """Measure nothing new; what is left is the last race."""
        self._closing = True

    def cut(self) -> None:
        """End without a last race: the outcome is what has won its races so far, if there was one."""
        trial = self.known.get(self._point(self.champion))
        if trial is None or trial.us is None:
            return
        if trial.id is not None:
            self._set_config(trial.id, self._default_us(), self._optimum_us())
        self._finish(trial, self._default_us(), "the budget ended before its last race")

    def fail(self, message: str) -> None:
        self.outcome = Failed(self.key, self.workload, message)

    @property
    def best_us(self) -> float | None:
        return min((_us(trial) for trial in self._right()), default=None)

    @property
    def default_us(self) -> float | None:
        return self._default_us()

    def _served(self) -> Iterator[Values]:
        """What calls run before this: the database's own config, else what the tables that ship with patune answer.

        A replay starts from the default: the tables are what its landscape was searched for.
        """
        if entry := self.store.incumbent(self.key, self.workload):
            yield entry["config"]
        if self.runner.mode == "measured":
            query = query_of(self.key, self.workload) | {"capability": self.runner.environment.capability}
            yield dict(find(query, table=lookup.shipped_table()))

    def _known(self) -> dict[Point, Trial]:
        """What was measured before: in a replay only what others share, as a replay costs nothing and is never half done."""
        found: list[Trial] = []
        if self.runner.mode == "measured":
            triton, source_hash = self.runner.environment.triton, self.item.template.source_hash
            found += self.store.trials(self.key, self.workload, source_hash=source_hash, triton=triton, mode=self.runner.mode)
        known = {self._point(trial.config): trial for trial in found if self._usable(trial.config)}
        if self.ledger:
            others = {self._point(t.config): t for t in self.ledger.trials() if self._usable(t.config)}
            fresh = [trial for point, trial in others.items() if point not in known]
            mine = [trial for point, trial in known.items() if point not in others]
            known |= {self._point(trial.config): trial for trial in self._stored(fresh)}
            self.ledger.tell(mine)
        return known

    def _learn(self, job: Job, race: Race) -> None:
        """Store a batch, and its winner if it beat the champion in their race: an interrupted run leaves that much."""
        raced = [race.reference, *race.trials]
        fresh = self._stored([trial for trial in raced if trial.config in job.asked])
        self.search.tell(self._leveled(fresh, race.reference))
        if self.ledger:
            self.ledger.tell(fresh)
        self.known.update((self._point(trial.config), trial) for trial in fresh)
        right = [t for t in fresh if t.config != job.reference and replaces(t, race.reference)]
        if right and job.reference == self.champion:  # another batch may have found a new one since this began
            best = min(right, key=_us)
            log.debug("%s: %s takes the place of %s, %.2f us", self.item, _text(best.config), _text(self.champion), _us(best))
            self.champion = best.config
            assert best.id is not None
            self._set_config(best.id, self._default_us(), None)

    def _leveled(self, trials: list[Trial], reference: Trial) -> list[Trial]:
        """Trials of one race as the others would have seen them: scaled by what its reference took in a race before.

        Between races the clock of a GPU moves, or the race is another GPU's: in a recording of prefill on an H100 a tenth of the
        configs that were timed twice differ by 4.8% or more. Stored are the times as they were.
        """
        before = self._level_us.get(self._point(reference.config))
        scale = before / reference.us if before and reference.us else 1.0
        leveled = [replace(trial, samples_us=tuple(us * scale for us in trial.samples_us)) for trial in trials]
        self._level_us.update((self._point(trial.config), trial.us) for trial in leveled if trial.us)
        return leveled

    def _finalists(self) -> list[Values]:
        """What was there before the run is the reference; the default and the best that was found race it."""
        best = sorted(self._right(), key=lambda trial: self._level_us[self._point(trial.config)])[:FINALISTS]
        points: list[Values] = []
        for config in [*(trial.config for trial in best), self.champion, self.default]:
            if config != self.incumbent and config not in points:
                points.append(config)
        return points

    def _drift(self, race: Race) -> float:
        """How far the incumbent is from its own earlier time: pairs stay fair then, stored times would not."""
        before = self.known.get(self._point(self.incumbent))
        return race.reference.us / before.us - 1 if before and before.us and race.reference.us else 0.0

    def _conclude(self, race: Race, drift: float) -> None:
        trials = self._stored([race.reference, *race.trials])
        reference = trials[0]
        default = next(trial for trial in trials if trial.config == self.default)
        right = sorted((trial for trial in trials[1:] if trial.status == "ok"), key=_us)
        winner = next((trial for trial in right if replaces(trial, reference)), reference)
        if replaces(default, winner):  # an old incumbent may have become slower than the default
            winner = default
        if winner.us is None:
            message = f"no config of {self.item} is right: {winner.message}"
            self.outcome = Failed(self.key, self.workload, message)
            return
        kept = "stays" if winner is reference else f"takes the place of {_text(reference.config)}"
        log.debug("%s: the last race is over, %s %s, %.2f us", self.item, _text(winner.config), kept, winner.us)
        assert winner.id is not None
        self._set_config(winner.id, default.us, self._optimum_us())
        self._finish(winner, default.us, _unsteady(drift, reference))

    def _finish(self, winner: Trial, default_us: float | None, note: str) -> None:
        optimum_us = self._optimum_us()
        assert winner.us is not None
        regret = None if optimum_us is None else winner.us / optimum_us - 1
        self.outcome = Finished(
            self.key, self.workload, dict(winner.config), winner.us, default_us, len(self.known), optimum_us, regret, note
        )

    def _stored(self, trials: list[Trial]) -> list[Trial]:
        ids = self.store.add_trials(self.key, self.workload, self.runner.environment, trials, self.runner.mode)
        return [replace(trial, id=i) for trial, i in zip(trials, ids)]

    def _set_config(self, trial_id: int, default_us: float | None, optimum_us: float | None) -> None:
        self.store.set_config(
            self.key, self.workload, trial_id, default_us, len(self.known), self.runner.mode, optimum_us=optimum_us
        )

    def _optimum_us(self) -> float | None:
        return self.runner.optimum_us(self.key, self.workload)

    def _right(self) -> Iterator[Trial]:
        return (trial for trial in self.known.values() if trial.status == "ok" and trial.us is not None)

    def _default_us(self) -> float | None:
        trial = self.known.get(self._point(self.default))
        return trial.us if trial and trial.status == "ok" else None

    def _point(self, config: Values) -> Point:
        return point_of(config, self.tunables)

    def _usable(self, config: Mapping[str, int]) -> bool:
        """Whether a config from elsewhere has a place here: the same tunables, valid for this workload."""
        return config.keys() == self.tunables.keys() and self._point(config) in self._allowed


def _unsteady(drift: float, reference: Trial) -> str:
    """What the last race says of the GPU, if that is worth a word."""
    said = []
    if abs(drift) > DRIFT:
        said.append(f"the GPU was busy or its clock moved: the same config took {drift:+.0%} since the search")
    samples = reference.samples_us
    if len(samples) > 1 and (noise := statistics.stdev(samples) / statistics.fmean(samples)) > NOISE:
        said.append(f"times were noisy, {noise:.1%} from round to round")
    return "; ".join(said)


def _us(trial: Trial) -> float:
    return math.inf if trial.us is None else trial.us


def _text(config: Values) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())
