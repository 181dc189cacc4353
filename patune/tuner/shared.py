"""One search by several workers, on any hosts: an Optuna storage holds what is to do, who does it, and every trial.

A queue, one study for each kernel, has one trial for each workload: waiting; running while a worker tunes it, who shows by
Optuna's heartbeat that he lives; complete with its result. Beside it every workload has a study with one trial for each
config: running in a race; complete with its time, or pruned if it is not right; failed if its worker was lost. Only the
worker that has a workload adds to its study, and a trial changes its state once, so none is measured or counted twice.
"""

import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.storages._heartbeat import get_heartbeat_thread, is_heartbeat_enabled  # Study.optimize beats, ask and tell do not
from optuna.trial import FrozenTrial, TrialState

from ..cachedb.trial import Environment, Trial
from ..errors import UsageError, WorkerError
from ..kernels.template import Template, Values
from ..workload import Key, Workload
from . import storage as storages
from .events import Failed, Finished
from .task import Item

POLL_S = 2.0  # between two looks at what the others do
QUEUE = "patune queue: "  # how the names of queues begin

log = logging.getLogger(__name__)


class SharedWork:
    """What is left of a plan that several workers have, as a session takes it. Close it, also after an error."""

    def __init__(
        self, storage: optuna.storages.BaseStorage, items: Sequence[Item], environment: Environment, mode: str, trials: int | None
    ):
        """Adds what nobody has asked for yet. UsageError if the storage is another GPU's."""
        self._storage, self._environment, self._mode, self._trials = storage, environment, mode, trials
        self._templates = {item.key.kernel: item.template for item in items}
        self._claims: dict[tuple[Key, Workload], _Claim] = {}
        self._seen: dict[tuple[str, int], tuple[tuple, float]] = {}  # of other workers' trials in the queues: progress, since when
        self._refuse_another_gpu()
        self._queues = {kernel: self._queue(kernel, template) for kernel, template in self._templates.items()}
        self._enqueue(items)

    def next(self) -> Item | None:
        for queue in self._queues.values():
            optuna.storages.fail_stale_trials(queue)
            while queue.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                trial = queue.ask()
                if "key" not in trial.user_attrs:  # somebody was quicker, and there was none left to take
                    queue.tell(trial, state=TrialState.FAIL)
                elif self._is_double(queue, trial):
                    queue.tell(trial, state=TrialState.PRUNED)
                else:
                    item = self._item(trial.user_attrs)
                    trial.set_user_attr("worker", _worker())
                    self._claims[item.key, item.workload] = _Claim(queue, trial, self._storage)
                    log.debug("%s: taken from the storage", item)
                    return item
        return None

    def soon(self, count: int) -> Sequence[Item]:
        return [self._item(trial.user_attrs) for trial in self._waiting()][:count]

    def left(self) -> int:
        return len(list(self._waiting()))

    def wait(self) -> bool:
        """Until the last workload is done: its worker may die, and then it is somebody else's."""
        unfinished = (TrialState.WAITING, TrialState.RUNNING)
        others = [
            (queue, trial) for queue in self._queues.values() for trial in queue.get_trials(deepcopy=False, states=unfinished)
        ]
        if not others:
            return False
        time.sleep(POLL_S)
        for queue, trial in others:
            if trial.state == TrialState.RUNNING and "key" in trial.user_attrs:
                self._fail_silent(queue, trial)
        return True

    def winners(self, key: Key) -> Iterable[tuple[Workload, Values]]:
        for trial in self._complete(self._queues[key.kernel]):
            if Key(**trial.user_attrs["key"]) == key:
                yield Workload(**trial.user_attrs["workload"]), trial.user_attrs["result"]["config"]

    def ledger(self, item: Item) -> "SharedTrials":
        return SharedTrials(self._storage, self._study_name(item.key, item.workload), item.template)

    def done(self, item: Item, outcome: Finished | Failed) -> None:
        claim = self._claims.pop((item.key, item.workload))
        if isinstance(outcome, Finished):
            result = {name: getattr(outcome, name) for name in ("config", "us", "default_us", "evaluations")}
            claim.finish("result", result, value=outcome.us)
        else:
            claim.finish("message", outcome.message, state=TrialState.PRUNED)

    def close(self) -> None:
        """Give back what is not done."""
        for claim in self._claims.values():
            claim.release()
        self._claims.clear()

    def _refuse_another_gpu(self) -> None:
        mine = _gpu(self._environment)
        for study in self._storage.get_all_studies():
            if study.study_name.startswith(QUEUE) and (theirs := study.user_attrs.get("gpu", mine)) != mine:
                raise UsageError(f"--storage: its search is for {theirs}, and the GPU here is {mine}: use another storage for it")

    def _queue(self, kernel: str, template: Template) -> optuna.Study:
        e = self._environment
        name = f"{QUEUE}{kernel} {template.source_hash} on {_gpu(e)}, {self._versions()}"
        sampler = optuna.samplers.RandomSampler()  # asked for nothing
        queue = optuna.create_study(storage=self._storage, study_name=name, sampler=sampler, load_if_exists=True)
        queue.set_user_attr("gpu", _gpu(e))
        return queue

    def _versions(self) -> str:
        e = self._environment
        return f"{self._mode}, driver {e.driver}, triton {e.triton}, torch {e.torch}"

    def _study_name(self, key: Key, workload: Workload) -> str:
        shape = f"d{key.head_dim} p{key.page_size} g{key.q_heads_per_kv} {key.q_dtype}/{key.kv_dtype}"
        of = " ".join(filter(None, (key.kernel, shape, key.features)))
        source_hash = self._templates[key.kernel].source_hash
        return f"{of}, {workload} h{workload.kv_heads}, {source_hash} on {_gpu(self._environment)}, {self._versions()}"

    def _enqueue(self, items: Sequence[Item]) -> None:
        """Two workers that start at once may both add a workload: `_is_double` drops one of them."""
        there = {kernel: [t.user_attrs for t in self._alive(queue)] for kernel, queue in self._queues.items()}
        for item in items:
            attrs = {"key": asdict(item.key), "workload": asdict(item.workload), "trials": self._trials}
            if not any(_covers(other, attrs) for other in there[item.key.kernel]):
                self._queues[item.key.kernel].enqueue_trial({}, user_attrs=attrs)

    def _is_double(self, queue: optuna.Study, trial: optuna.Trial) -> bool:
        """Whether the same is waiting, running or done under a lower number. A retry has a higher one than what it repeats."""
        return any(other.number < trial.number and _covers(other.user_attrs, trial.user_attrs) for other in self._alive(queue))

    def _alive(self, queue: optuna.Study) -> Iterator[FrozenTrial]:
        dropped = (TrialState.FAIL, TrialState.PRUNED)
        return (t for t in queue.get_trials(deepcopy=False) if t.state not in dropped and "key" in t.user_attrs)

    def _complete(self, queue: optuna.Study) -> Iterator[FrozenTrial]:
        return iter(queue.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def _waiting(self) -> Iterator[FrozenTrial]:
        for queue in self._queues.values():
            yield from queue.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _item(self, attrs: Mapping[str, Any]) -> Item:
        key = Key(**attrs["key"])
        return Item(self._templates[key.kernel], key, Workload(**attrs["workload"]))

    def _fail_silent(self, queue: optuna.Study, trial: FrozenTrial) -> None:
        """Where the storage has no heartbeats, a worker that starts and ends no race for as long as the grace is taken for dead."""
        if is_heartbeat_enabled(self._storage):
            return
        item = self._item(trial.user_attrs)
        study = optuna.create_study(
            storage=self._storage, study_name=self._study_name(item.key, item.workload), load_if_exists=True
        )
        progress = tuple((t.number, t.state) for t in study.get_trials(deepcopy=False))
        at = queue.study_name, trial.number
        if at not in self._seen or self._seen[at][0] != progress:
            self._seen[at] = progress, time.monotonic()
        elif time.monotonic() - self._seen[at][1] > storages.GRACE_S:
            log.debug("%s: its worker %s is silent, it is free again", item, trial.user_attrs.get("worker"))
            _retry(queue, trial)


@dataclass(frozen=True)
class _Known:
    """A running trial in a workload's study."""

    number: int
    trial_id: int


class SharedTrials:
    """The trials of one workload, for the worker that has it: a Ledger."""

    def __init__(self, storage: optuna.storages.BaseStorage, name: str, template: Template):
        self._storage, self._tunables = storage, template.tunables
        self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self._running: dict[frozenset, _Known] = {}
        for lost in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._end(lost.number, state=TrialState.FAIL)  # of a worker that had the workload before

    def trials(self) -> list[Trial]:
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return [_trial(t) for t in self._study.get_trials(deepcopy=False, states=ended)]

    def running(self, configs: Iterable[Values]) -> None:
        running = TrialState.RUNNING
        self._study.add_trials([self._optuna_trial(config, state=running) for config in configs])
        for t in self._study.get_trials(deepcopy=False, states=(running,)):
            self._running[frozenset(t.params.items())] = _Known(t.number, t._trial_id)

    def tell(self, trials: Iterable[Trial]) -> None:
        """WorkerError if another worker has the workload by now."""
        pruned = TrialState.PRUNED
        for trial in trials:
            outcome: dict[str, Any] = {"value": trial.us} if trial.status == "ok" and trial.us else {"state": pruned}
            known = self._running.pop(frozenset(trial.config.items()), None)
            if known is None:  # measured before there was a storage
                self._study.add_trial(self._optuna_trial(trial.config, user_attrs=_attrs(trial), **outcome))
                continue
            try:
                for name, value in _attrs(trial).items():
                    self._storage.set_trial_user_attr(known.trial_id, name, value)
            except optuna.exceptions.UpdateFinishedTrialError as error:
                raise WorkerError("another worker has taken it over: this one was silent for too long") from error
            self._end(known.number, **outcome)

    def _end(self, number: int, state: Any = None, value: float | None = None) -> None:
        self._study.tell(number, value, state=state, skip_if_finished=True)

    def _optuna_trial(self, config: Values, **how: Any) -> FrozenTrial:
        """Values themselves, not their indices: a tunable may get more of them later."""
        ranges = {name: [*self._tunables[name], value] for name, value in config.items()}  # a computed default may lie outside
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.IntDistribution(min(values), max(values)) for name, values in ranges.items()
        }
        return optuna.trial.create_trial(params=dict(config), distributions=distributions, **how)


class _Claim:
    """A workload that this worker has, as a running trial of the queue that beats."""

    def __init__(self, queue: optuna.Study, trial: optuna.Trial, storage: optuna.storages.BaseStorage):
        self._queue, self._trial = queue, trial
        self._beat = get_heartbeat_thread(trial._trial_id, storage)
        self._beat.start()

    def finish(self, name: str, what: Any, value: float | None = None, state: Any = None) -> None:
        self._beat.join()
        try:
            self._trial.set_user_attr(name, what)
            self._queue.tell(self._trial, value, state=state)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            log.debug("the storage has given %s to another worker meanwhile", self._trial.user_attrs)

    def release(self) -> None:
        self._beat.join()
        _retry(self._queue, self._queue.get_trials()[self._trial.number])


def _retry(queue: optuna.Study, trial: FrozenTrial) -> None:
    """Fail what its worker does not finish, and add it again."""
    before = queue.get_trials(deepcopy=False)[trial.number].state
    if before == TrialState.RUNNING:
        queue.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        attrs = {name: value for name, value in trial.user_attrs.items() if name != "worker"}
        queue.enqueue_trial({}, user_attrs=attrs)


def _covers(other: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether it is for the same workload and as many trials."""
    same = all(other[name] == wanted[name] for name in ("key", "workload"))
    return same and (other["trials"] is None or (wanted["trials"] is not None and other["trials"] >= wanted["trials"]))


def _attrs(trial: Trial) -> dict[str, Any]:
    return {
        "status": trial.status,
        "samples_us": list(trial.samples_us),
        "error": trial.error,
        "message": trial.message,
        "source_hash": trial.source_hash,
        "when": trial.when,
        "worker": _worker(),
    }


def _trial(trial: FrozenTrial) -> Trial:
    of = {name: value for name, value in trial.user_attrs.items() if name != "worker"}
    return Trial(**{**of, "config": dict(trial.params), "samples_us": tuple(of["samples_us"])})


def _gpu(environment: Environment) -> str:
    return f"{environment.gpu} with {environment.sm_count} SMs"


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
