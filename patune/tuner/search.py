"""Which configs to measure next: all of a small space, else what Optuna's TPE proposes, never the same twice."""

import logging
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from ..cachedb.trial import Trial
from ..kernels.template import Template, Values
from ..workload import Key, Workload
from .space import Point, Tunables, indices, nearest, point_of

BATCH = 8  # configs proposed together; with 16 the search saves 2 to 13 points less of the possible by 16 evaluations
ENUMERATED = 16  # configs of a space that is measured whole: nothing is learned between its batches
TRANSFERRED = 8  # proposals that come from the winners of other workloads
LEADERS = 3  # of a search: every second proposal is a neighbour of one of them
FAILED_US = 1e12  # told for a config that is not right: TPE only ranks, so any time above all others will do

log = logging.getLogger(__name__)

Sampler = Callable[[int], Any]  # from a seed; Any: importing this loads no optuna


def transferred(
    template: Template, key: Key, workload: Workload, winners: Iterable[tuple[Workload, Values]], usable: Callable[[Values], bool]
) -> list[dict[str, int]]:
    """What won on a key's other workloads, fitted to this one and as it was; the nearest workloads come first."""
    found: list[dict[str, int]] = []
    for other, config in sorted(winners, key=lambda winner: workload.distance(winner[0])):
        for candidate in (template.fit(config, key, other, workload), dict(config)):
            if usable(candidate) and candidate not in found:
                found.append(candidate)
    return found[:TRANSFERRED]


class Search:
    """Ask for a batch, measure it, tell it; an empty batch ends the search.

    `points` are the valid configs. `seeds` come first, in order; they may lie off the grid, as a default that is computed
    may. `prior` trials count as measured. `trials` is the number of configs in all, None for every one. `sampler` makes
    another one of Optuna's samplers than TPE from a seed.
    """

    def __init__(
        self,
        tunables: Tunables,
        points: Sequence[Values],
        *,
        trials: int | None,
        seed: int,
        seeds: Iterable[Values] = (),
        prior: Iterable[Trial] = (),
        sampler: Sampler | None = None,
    ):
        self.tunables = tunables
        grid = [point_of(config, tunables) for config in points]
        random.Random(seed).shuffle(grid)  # neighbours apart: a drifting clock must not look like a tunable's effect
        self.unseen = dict.fromkeys(grid)  # an ordered set
        self.seen: set[Point] = set()
        prior = list(prior)
        self._best: list[tuple[float, Point]] = []  # the fastest so far, in microseconds
        for trial in prior:
            self._take(point_of(trial.config, tunables))
            self._rank(trial)
        self._first = list(dict.fromkeys(p for p in (point_of(c, tunables) for c in seeds) if p not in self.seen))
        total = len(self.unseen) + len(self.seen) + sum(p not in self.unseen for p in self._first)
        self.total = total if trials is None else min(trials, total)
        self._tpe = None if self.total == total else _Tpe(tunables, set(grid), prior, seed, sampler)

    def ask(self, limit: int = ENUMERATED) -> list[dict[str, int]]:
        """The next batch of configs that nobody has measured, at most `limit`."""
        batch: list[Point] = []
        for _ in range(min(limit, BATCH if self._tpe else ENUMERATED, self.left)):
            if self._first:
                origin, point = "known before", self._first.pop(0)
                if self._tpe:
                    self._tpe.running(point)
            elif self._tpe and self._best and len(batch) % 2:
                origin, point = "near a leader", self._tpe.near(self._best[len(batch) // 2 % len(self._best)][1], self.unseen)
            elif self._tpe:
                origin, point = "Optuna's", self._tpe.propose(self.unseen)
            else:
                origin, point = "one of all", next(iter(self.unseen))
            log.debug("%s: %s", origin, " ".join(f"{name}={value}" for name, value in zip(self.tunables, point)))
            self._take(point)
            batch.append(point)
        return [dict(zip(self.tunables, point, strict=True)) for point in batch]

    @property
    def left(self) -> int:
        """Configs that may still be asked for."""
        return self.total - len(self.seen)

    def tell(self, trials: Iterable[Trial]) -> None:
        """The outcome of configs that were asked for."""
        if self._tpe:
            for trial in trials:
                self._tpe.tell(point_of(trial.config, self.tunables), _value(trial))
                self._rank(trial)

    def _rank(self, trial: Trial) -> None:
        self._best = sorted([*self._best, (_value(trial), point_of(trial.config, self.tunables))])[:LEADERS]

    def _take(self, point: Point) -> None:
        self.seen.add(point)
        self.unseen.pop(point, None)


class _Tpe:
    """Optuna's sampler over the index of each value, kept away from points that are invalid or measured."""

    def __init__(
        self, tunables: Tunables, grid: set[Point], prior: Sequence[Trial], seed: int, sampler: Callable[[int], Any] | None
    ):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna, self.tunables, self.grid = optuna, tunables, grid
        self.rng = random.Random(seed)
        self.study = optuna.create_study(sampler=sampler(seed) if sampler else optuna.samplers.TPESampler(seed=seed))
        self.space: dict[str, Any] = {name: optuna.distributions.IntDistribution(0, len(v) - 1) for name, v in tunables.items()}
        self.numbers: dict[Point, int] = {}  # of the trials that are running
        told = ((point_of(trial.config, tunables), _value(trial)) for trial in prior)
        self.study.add_trials([self._trial(point, value=value) for point, value in told if point in grid])

    def propose(self, unseen: Collection[Point]) -> Point:
        trial = self.study.ask(self.space)
        point = tuple(values[trial.params[name]] for name, values in self.tunables.items())
        if point in unseen:
            self.numbers[point] = trial.number
            return point
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        return self.near(point, unseen)

    def near(self, point: Point, unseen: Collection[Point]) -> Point:
        """The nearest point that nobody has measured, ties at random."""
        close = nearest(indices(point, self.tunables), (indices(p, self.tunables) for p in unseen), self.rng)
        point = tuple(values[i] for i, values in zip(close, self.tunables.values(), strict=True))
        self.running(point)
        return point

    def running(self, point: Point) -> None:
        """Let the sampler know of a point that it did not propose. One off the grid means nothing to it."""
        if point in self.grid:
            self.study.add_trial(self._trial(point, state=self.optuna.trial.TrialState.RUNNING))
            self.numbers[point] = self.study.get_trials(deepcopy=False)[-1].number

    def tell(self, point: Point, value: float) -> None:
        if (number := self.numbers.pop(point, None)) is not None:
            self.study.tell(number, value)

    def _trial(self, point: Point, **outcome: Any) -> Any:
        params = dict(zip(self.space, indices(point, self.tunables), strict=True))
        return self.optuna.trial.create_trial(params=params, distributions=self.space, **outcome)


def _value(trial: Trial) -> float:
    return trial.us if trial.status == "ok" and trial.us else FAILED_US
