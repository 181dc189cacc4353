"""Joining databases: every trial of all of them once, and for every workload the config that most is known for."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..workload import Key, Workload
from .match import Entry
from .store import Store
from .trial import Environment, Trial


def merge(into: Store, sources: list[Path]) -> tuple[int, int]:
    """Add what `sources` have to `into`; (trials, configs) that were added or changed. Twice the same changes nothing.

    A trial is the same if all that is known of it is. Where both have a config for a workload, a measured one goes before a
    replayed one, then the one of more evaluations, then the newer.
    """
    trials = configs = 0
    for path in sources:
        with Store.open(path) as source:
            trials += _add_trials(into, source)
            configs += _add_configs(into, source)
    return trials, configs


def _add_trials(into: Store, source: Store) -> int:
    added = 0
    for mode in ("measured", "replay"):
        for key, workload, environment in source.tried(mode):
            there = {_identity(trial) for trial in into.trials(key, workload, mode=mode, environment=environment)}
            found = {_identity(trial): trial for trial in source.trials(key, workload, mode=mode, environment=environment)}
            fresh = [trial for identity, trial in found.items() if identity not in there]
            into.add_trials(key, workload, environment, fresh, mode)
            added += len(fresh)
    return added


def _add_configs(into: Store, source: Store) -> int:
    changed = 0
    for entry in source.entries():
        key, workload = _of(entry, Key), _of(entry, Workload)
        mine = into.incumbent(key, workload)
        if mine is not None and _rank(mine) >= _rank(entry):
            continue
        mode = entry["mode"]
        trials = into.trials(key, workload, source_hash=entry["source_hash"], mode=mode, environment=_of(entry, Environment))
        earned = next(t for t in trials if (t.config, t.us, t.when) == (entry["config"], entry["us"], entry["when"]))
        assert earned.id is not None
        into.set_config(key, workload, earned.id, entry["default_us"], entry["evaluations"], mode, entry["optimum_us"])
        changed += 1
    return changed


T = TypeVar("T", Key, Workload, Environment)


def _of(entry: Entry, kind: type[T]) -> T:
    return kind(**{field.name: entry[field.name] for field in fields(kind)})


def _rank(entry: Entry) -> tuple[bool, int, str]:
    return entry["mode"] == "measured", entry["evaluations"], entry["when"]


def _identity(trial: Trial) -> tuple[Any, ...]:
    config = tuple(sorted(trial.config.items()))
    return config, trial.status, trial.samples_us, trial.error, trial.message, trial.source_hash, trial.when
