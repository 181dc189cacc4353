"""A tuning run: workloads are handed to idle devices, races run, decisions are stored. It knows neither GPUs nor terminals."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..cachedb.store import Store
from ..errors import WorkerError
from ..kernels.template import Values
from ..workload import Key, Workload
from .events import Event, Failed, Finished, Progress, Started
from .fleet import Fleet, Outcome
from .runner import ROUNDS, Race
from .search import BATCH, ENUMERATED
from .task import FINAL_ROUNDS, FINALISTS, Item, Job, Ledger, Task

LAST_RACE = FINAL_ROUNDS / ROUNDS * (FINALISTS + 2)  # what the last race costs, counted in configs of a search's races
RACE_S = 2.0  # a race should not last longer where several devices share the work
FIRST_RACE = 4  # its configs there, when nobody knows how long they take
AHEAD = 64  # workloads whose configs compile before their turn: another kernel's variants take longer than one workload's races

log = logging.getLogger(__name__)


class Work(Protocol):
    """Where the workloads of a run come from."""

    def next(self) -> Item | None:
        """The next one to tune; None if there is none now."""
        ...

    def soon(self, count: int) -> Sequence[Item]:
        """What is likely to come next."""
        ...

    def left(self) -> int:
        """How many have not been handed out."""
        ...

    def wait(self) -> bool:
        """Called with nothing to do: whether there may be something later. May take a while to answer."""
        ...

    def winners(self, key: Key) -> Iterable[tuple[Workload, Values]]:
        """What was found for workloads that are done."""
        ...

    def ledger(self, item: Item) -> Ledger | None:
        """Where other workers' trials of it are, if there are other workers."""
        ...

    def done(self, item: Item, outcome: Finished | Failed) -> None: ...

    def close(self) -> None:
        """Give back what was handed out and is not done."""
        ...


class Items:
    """A list of workloads, for one process."""

    def __init__(self, items: Sequence[Item]):
        self._items = list(items)
        self._winners: dict[Key, list[tuple[Workload, Values]]] = {}

    def next(self) -> Item | None:
        return self._items.pop(0) if self._items else None

    def soon(self, count: int) -> Sequence[Item]:
        return self._items[:count]

    def left(self) -> int:
        return len(self._items)

    def wait(self) -> bool:
        return False

    def winners(self, key: Key) -> Iterable[tuple[Workload, Values]]:
        return self._winners.get(key, ())

    def ledger(self, item: Item) -> Ledger | None:
        return None

    def done(self, item: Item, outcome: Finished | Failed) -> None:
        if isinstance(outcome, Finished):
            self._winners.setdefault(item.key, []).append((item.workload, outcome.config))

    def close(self) -> None:
        """Nobody else waits for it."""


def soonest_compiled_first(items: Iterable[Item]) -> list[Item]:
    """For one device, which waits for compilers at first: when the turn of the large kernels comes they have been compiled.

    The workloads of a template stay together, in their order, as each starts from what those before it have found.
    """
    return sorted(items, key=lambda item: item.template.source_size)


def largest_first(items: Iterable[Item]) -> list[Item]:
    """For several devices: nothing long may start when all else is nearly done."""
    sizes = lambda w: (w.q_len > 1, w.batch_size * w.q_len * w.kv_len)
    return sorted(items, key=lambda item: sizes(item.workload), reverse=True)


def tune(
    work: Work,
    fleet: Fleet,
    store: Store,
    *,
    trials: int | None,
    seed: int = 0,
    ends: float | None = None,
    on_event: Callable[[Event], None],
) -> list[Finished]:
    """Tune every workload; those that fail have no result.

    `trials` is the number of configs measured a workload, those of earlier runs included; None measures every valid one.
    Everything ends at `ends` on the fleet's clock: the time is shared out evenly, what is over by then is left out, and a race
    that runs then is lost. Every race is stored as soon as it is over.
    """
    return _Session(work, fleet, store, trials, seed, ends, on_event).run()


@dataclass(slots=True)
class _Clock:
    """The times of a task that is not done, in seconds on the fleet's clock."""

    started: float
    ends: float | None  # its share of the budget
    config_s: float | None = None  # what a config of its quickest race took
    first: int = 0  # configs of its first race
    setup_s: float = 0.0  # what the first race took beyond that: a device that comes to help makes tensors too
    spent_s: float = 0.0  # by all devices
    measured: int = 0  # configs

    def to_do_s(self, configs: int) -> float:
        """What is to come, if it is so many configs and a last race."""
        return (configs + LAST_RACE) * (self.config_s or 0.0)

    def took(self, seconds: float, configs: int) -> None:
        """Learn from a race of the search."""
        if self.config_s is None:
            self.config_s, self.first = seconds / configs, configs
        elif (config_s := seconds / configs) < self.config_s:
            self.setup_s += (self.config_s - config_s) * self.first
            self.config_s = config_s


class _Session:
    def __init__(
        self,
        work: Work,
        fleet: Fleet,
        store: Store,
        trials: int | None,
        seed: int,
        ends: float | None,
        on_event: Callable[[Event], None],
    ):
        self.work, self.fleet, self.store, self.trials, self.seed = work, fleet, store, trials, seed
        self.ends, self.on_event = ends, on_event
        self.clocks: dict[Task, _Clock] = {}  # of the tasks that are not done, in the order they were started
        self.at: dict[int, Task] = {}  # what each device last measured
        self.busy: dict[int, tuple[Task, Job, float]] = {}  # device -> what it measures, since when
        self.prepared: set[tuple[Key, Workload]] = set()
        self.results: list[Finished] = []
        self.started = 0  # tasks
        self.spent_s = 0.0  # on those that are done

    def run(self) -> list[Finished]:
        runner = self.fleet.runners[0]
        self.on_event(Started(self.work.left(), runner.environment, runner.mode, tuple(self.fleet.names)))
        idle = list(range(len(self.fleet.runners)))
        while not self._over():
            idle = [device for device in idle if not self._assign(device)]
            if not self.busy:
                if self.work.wait():
                    continue
                break
            done = self.fleet.wait(self.ends)
            if done is None:
                break
            self._take(*done)
            idle.append(done[0])
        for task in list(self.clocks):
            task.cut()
            self._report(task)
        return self.results

    def _over(self) -> bool:
        return self.ends is not None and self.fleet.now() >= self.ends

    def _assign(self, device: int) -> bool:
        """Give an idle device something to do, if there is anything."""
        found = self._find(device)
        if found is None:
            return False
        task, job = found
        self.at[device], self.busy[device] = task, (task, job, self.fleet.now())
        item = task.item
        self.fleet.submit(device, lambda runner: runner.measure(item.key, item.workload, job.points, job.reference, job.rounds))
        return True

    def _find(self, device: int) -> tuple[Task, Job] | None:
        """The workload that it is on, one that nobody is on, a share in one that would last too long, a new one, a share in any."""
        for task in self._under_way(device):
            if job := self._job(task):
                return task, job
        while (item := self.work.next()) is not None:
            task = self._start(item)
            if job := self._job(task):
                return task, job
        return None

    def _under_way(self, device: int) -> Iterator[Task]:
        if self.at.get(device) in self.clocks:
            yield self.at[device]
        yield from [task for task in self.clocks if not task.running]
        if len(self.fleet.runners) > 1:
            yield from self._stragglers()

    def _stragglers(self) -> list[Task]:
        """Those that one device would still be at when the others are done with all the rest, if help would end them sooner."""
        to_do_s = {task: clock.to_do_s(task.search.left) for task, clock in self.clocks.items()}
        mean_s = (self.spent_s + sum(clock.spent_s + to_do_s[task] for task, clock in self.clocks.items())) / max(self.started, 1)
        rest_s = mean_s * self.work.left() / len(self.fleet.runners)
        found = [
            task
            for task, clock in self.clocks.items()
            if to_do_s[task] > rest_s and task.search.left * (clock.config_s or 0.0) > 2 * clock.setup_s
        ]
        return sorted(found, key=lambda task: to_do_s[task], reverse=True)

    def _job(self, task: Task) -> Job | None:
        clock, limit = self.clocks[task], ENUMERATED
        if len(self.fleet.runners) > 1:
            first = FIRST_RACE if self.started <= len(self.fleet.runners) else ENUMERATED
            limit = max(FIRST_RACE, int(RACE_S / clock.config_s)) if clock.config_s else first
        if clock.ends is not None and clock.config_s and self.fleet.now() + clock.to_do_s(min(limit, BATCH)) > clock.ends:
            task.stop_search()
        return task.job(limit)

    def _start(self, item: Item) -> Task:
        runner, devices = self.fleet.runners[0], len(self.fleet.runners)
        for soon in [item, *self.work.soon(AHEAD)]:  # these compile while this one is measured, in this order
            if (soon.key, soon.workload) not in self.prepared:
                self.prepared.add((soon.key, soon.workload))
                default = soon.template.default(soon.key, soon.workload)
                runner.prepare(soon.key, soon.workload, [default, *soon.points()])
        task = Task(
            item, runner, self.store, trials=self.trials, seed=self.seed,
            winners=self.work.winners(item.key), ledger=self.work.ledger(item),
        )  # fmt: skip
        now = self.fleet.now()
        ends = None
        if self.ends is not None:
            ends = min(self.ends, now + (self.ends - now) * devices / (self.work.left() + len(self.clocks) + 1))
        self.clocks[task] = _Clock(now, ends)
        self.started += 1
        return task

    def _take(self, device: int, outcome: Outcome) -> None:
        task, job, since = self.busy.pop(device)
        if task not in self.clocks:  # it failed while this device helped
            return
        clock, now = self.clocks[task], self.fleet.now()
        if isinstance(outcome, Race):
            name, took_s, configs = self.fleet.names[device], now - since, len(job.points) + 1
            log.debug("%s: device %s raced %d configs in %.2f s", task.item, name, configs, took_s)
            clock.spent_s += took_s
            clock.measured += len(job.asked)
            if job.asked:
                clock.took(took_s, configs)
            try:
                task.take(job, outcome)
            except WorkerError as error:  # of a worker on another host, who has it now
                task.fail(str(error))
            if job.asked:
                self.on_event(self._progress(task, clock, device, job, outcome))
        elif isinstance(outcome, WorkerError):
            task.fail(str(outcome))
        else:
            raise outcome
        if task.outcome:
            self._close(task)

    def _progress(self, task: Task, clock: "_Clock", device: int, job: Job, race: Race) -> Progress:
        rate = clock.measured / max(self.fleet.now() - clock.started, 1e-9)
        statuses = tuple(trial.status for trial in (race.reference, *race.trials) if trial.config in job.asked)
        return Progress(
            task.key, task.workload, self.fleet.names[device], statuses,
            len(task.known), task.search.total, task.best_us, task.default_us, rate,
        )  # fmt: skip

    def _close(self, task: Task) -> None:
        self.spent_s += self.clocks.pop(task).spent_s
        assert task.outcome
        self.work.done(task.item, task.outcome)
        self._report(task)

    def _report(self, task: Task) -> None:
        if task.outcome:
            self.on_event(task.outcome)
        if isinstance(task.outcome, Finished):
            self.results.append(task.outcome)
