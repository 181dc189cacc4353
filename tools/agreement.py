"""Whether two tunings of one GPU agree: the same config, or times within 1%, on at least 95% of the workloads.

    python tools/agreement.py FIRST.json SECOND.json    two documents of `patune run --json`, each with a --db of its own
    python tools/agreement.py --race FIRST SECOND       where their configs differ, by a race of both on the GPU that is here
    python tools/agreement.py LANDSCAPE.json.gz         two searches of a landscape, whose recorded noise is drawn anew

A workload counts once for each template that can run it: which one a call takes follows from both. Prints what differs; exit
status 1 if less agree.
"""

import contextlib
import json
import math
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from patune.cachedb import landscape
from patune.cachedb.store import Store
from patune.cachedb.trial import Trial
from patune.kernels.registry import template
from patune.tuner.events import Finished
from patune.tuner.fleet import Threads
from patune.tuner.gpu import GpuRunner
from patune.tuner.replay import ReplayRunner
from patune.tuner.runner import ROUNDS, Race
from patune.tuner.session import Items, tune
from patune.tuner.task import FINAL_ROUNDS, Item
from patune.workload import Key, Workload

WITHIN = 0.01
SHARE = 0.95

Found = dict[tuple[Key, Workload], tuple[dict[str, int], float]]


class Noisy(ReplayRunner):
    """Samples drawn from the recorded ones; all of a round share how far it was off, as they do on a GPU."""

    def __init__(self, recorded: landscape.Landscape, seed: int):
        super().__init__(recorded)
        self._rng = random.Random(seed)

    def measure(self, key, workload, points, reference, rounds=ROUNDS) -> Race:
        race = super().measure(key, workload, points, reference, rounds)
        drawn = [self._rng.random() for _ in range(rounds)]
        return Race([self._again(trial, drawn) for trial in race.trials], self._again(race.reference, drawn))

    def _again(self, trial: Trial, drawn: list[float]) -> Trial:
        samples = trial.samples_us
        if len(samples) > 2:  # else it was stopped early, and is again
            samples = tuple(samples[int(at * len(samples))] for at in drawn)
        return Trial(trial.config, trial.status, samples, trial.error, trial.message, trial.source_hash, trial.when)


def searched(recorded: landscape.Landscape, keys: list[Key], seed: int, trials: int = 64) -> Found:
    """One tuning with noise; the times are the recorded ones of what it chose."""
    items = [Item(template(key.kernel), key, workload) for key in keys for workload in recorded.workloads(key)]
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "a.db") as store:
        fleet = Threads([Noisy(recorded, seed)], ["replay"])
        results: list[Finished] = tune(Items(items), fleet, store, trials=trials, seed=seed, on_event=lambda event: None)
    true_us = lambda r: recorded.trials(r.key, r.workload)[tuple(r.config[name] for name in recorded.tunables(r.key))].us
    return {(result.key, result.workload): (result.config, true_us(result)) for result in results}


def read(path: Path) -> Found:
    document = json.loads(path.read_text())
    return {
        (Key(**part["key"]), Workload(**row["workload"])): (row["config"], row["us"])
        for part in document["keys"]
        for row in part["workloads"]
    }


def raced(first: Found, second: Found) -> tuple[Found, Found]:
    """The same, with times of one race where the configs differ: the clock of a GPU is not the same in two runs."""
    first, second = dict(first), dict(second)
    with contextlib.closing(GpuRunner()) as runner:
        for at in sorted(first.keys() & second.keys()):
            (one, _), (other, _) = first[at], second[at]
            if one != other:
                race = runner.measure(*at, [other], one, FINAL_ROUNDS)
                first[at], second[at] = (one, race.reference.us or math.inf), (other, race.trials[0].us or math.inf)
    return first, second


def disagreements(first: Found, second: Found) -> list[str]:
    """A line for every workload whose configs differ by more than WITHIN, or that only one of them has."""
    lines = [f"{key.kernel} {workload}: only in one" for key, workload in first.keys() ^ second.keys()]
    for at in first.keys() & second.keys():
        (one, one_us), (other, other_us) = first[at], second[at]
        if one != other and abs(one_us / other_us - 1) > WITHIN:
            lines.append(f"{at[0].kernel} {at[1]}: {one} {one_us:.2f} us, {other} {other_us:.2f} us")
    return sorted(lines)


def main() -> None:
    paths = [Path(arg) for arg in sys.argv[1:] if arg != "--race"]
    if len(paths) == 2:
        first, second = map(read, paths)
        if "--race" in sys.argv:
            first, second = raced(first, second)
    else:
        recorded = landscape.load(paths[0])
        first, second = (searched(recorded, recorded.keys(), seed) for seed in (1, 2))
    lines = disagreements(first, second)
    for line in lines:
        print(line)
    whole, differ = len(first.keys() | second.keys()), Counter(line.split()[0] for line in lines)
    for kernel, count in Counter(key.kernel for key, _ in first.keys() | second.keys()).items():
        print(f"{kernel}: {count - differ[kernel]} of {count}")
    print(f"{whole - len(lines)} of {whole} workloads agree ({1 - len(lines) / whole:.1%}, {SHARE:.0%} are asked for)")
    sys.exit(1 - len(lines) / whole < SHARE)


if __name__ == "__main__":
    main()
