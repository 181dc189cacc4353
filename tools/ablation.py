"""What makes the search good: the same search with one part taken out, other samplers, and pruners, on a recorded landscape.

    pip install cmaes scipy && python tools/ablation.py patune/tables/h100.landscape.json.gz results/h100/ablation.json

Only keys with a workload whose space is larger than the evaluations are searched, and only such workloads count. OUT has,
per variant, the fraction of optimum over evaluations as Kernel Tuner's community counts it, (default - found) / (default -
optimum), and how many kernels were compiled; and per pruner the share of rounds that it leaves, and what that costs.
"""

import argparse
import functools
import json
import random
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from search_quality import random_search

from patune.cachedb import landscape
from patune.cachedb.landscape import Landscape
from patune.cachedb.trial import Trial
from patune.kernels.registry import template
from patune.tuner.runner import ROUNDS
from patune.tuner.search import Search, transferred
from patune.tuner.space import point_of, valid_points, variant
from patune.tuner.timing import FIRST_ROUNDS, SLOW
from patune.workload import Key, Workload

AFTER = (4, 8, 16, 32, 64)
RACED = 64  # configs that a pruner sees of a workload, in any order

Winners = list[tuple[Workload, dict]]


class NoNeighbours(Search):
    """Knows no leaders, so every proposal is the sampler's."""

    def _rank(self, trial: Trial) -> None:
        pass


def search(kind: type[Search], warm: bool, sampler: Callable[[int], Any] | None) -> Callable[..., Iterator[Trial]]:
    def run(recorded: Landscape, key: Key, workload: Workload, seed: int, winners: Winners) -> Iterator[Trial]:
        kernel = template(key.kernel)
        points, trials = valid_points(kernel, key, workload), recorded.trials(key, workload)
        elsewhere = transferred(kernel, key, workload, winners, lambda config: config in points) if warm else []
        seeds = [recorded.default(key, workload), *elsewhere]
        asking = kind(kernel.tunables, points, trials=max(AFTER), seed=seed, seeds=seeds, sampler=sampler)
        while batch := asking.ask():
            told = [trials[point_of(config, kernel.tunables)] for config in batch]
            asking.tell(told)
            yield from told

    return run


def cma_es(seed: int) -> Any:
    return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


def gp(seed: int) -> Any:
    return optuna.samplers.GPSampler(seed=seed)


VARIANTS = {
    "patune": search(Search, True, None),
    "without other workloads' winners": search(Search, False, None),
    "without the leaders' neighbours": search(NoNeighbours, True, None),
    "TPE alone": search(NoNeighbours, False, None),
    "CMA-ES alone": search(NoNeighbours, False, cma_es),
    "random": random_search,
}
SLOW_VARIANTS = {"GP alone": search(NoNeighbours, False, gp)}  # with --gp: a fifth of a second a proposal


def large(recorded: Landscape, key: Key) -> list[Workload]:
    """The workloads of a key that are not measured whole."""
    return [w for w in recorded.workloads(key) if len(valid_points(template(key.kernel), key, w)) > max(AFTER)]


def one(path: Path, job: tuple[Key, str, int]) -> dict:
    """Of one key, variant and seed: microseconds saved after each number of evaluations, all that can be, and kernels compiled."""
    (key, name, seed), recorded = job, landscape.load(path)
    saved, possible, winners, variants, counted = dict.fromkeys(AFTER, 0.0), 0.0, [], [], large(recorded, key)
    for workload in recorded.workloads(key):
        default = recorded.trials(key, workload)[point_of(recorded.default(key, workload), recorded.tunables(key))].us
        trials = list({**VARIANTS, **SLOW_VARIANTS}[name](recorded, key, workload, seed, winners))
        if workload in counted:
            possible += default - recorded.optimum(key, workload).us
            for n in AFTER:
                saved[n] += default - min(trial.us for trial in trials[:n] if trial.status == "ok")
        best = min((trial for trial in trials if trial.status == "ok"), key=lambda trial: trial.us)
        winners.append((workload, best.config))
        variants.append({variant(template(key.kernel), trial.config) for trial in trials})
    return {
        "saved": saved, "possible": possible,
        "compiled": len(set().union(*variants)), "compiled_if_not_shared": sum(map(len, variants)),
    }  # fmt: skip


def summary(runs: list[list[dict]]) -> dict:
    """`runs` by seed, then by key."""
    total = lambda run, name, *at: sum(part[name][at[0]] if at else part[name] for part in run)
    fraction = {n: statistics.median(total(run, "saved", n) / total(run, "possible") for run in runs) for n in AFTER}
    compiled = {name: statistics.median(total(run, name) for run in runs) for name in ("compiled", "compiled_if_not_shared")}
    return {"fraction_of_optimum": fraction, **compiled}


PRUNERS: dict[str, Callable[[], Any]] = {
    "none": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=1),
    "successive halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2),
    "Wilcoxon": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.1),
}


def prune(path: Path, job: tuple[Key, str, int]) -> dict:
    """Of one key, pruner and seed: rounds measured, and the best config's time over that without a pruner."""
    (key, name, seed), recorded = job, landscape.load(path)
    rounds, regrets = 0, []
    for workload in recorded.workloads(key):
        trials = [t for t in recorded.trials(key, workload).values() if t.status == "ok"]
        trials = random.Random(f"{seed} {workload}").sample(trials, min(RACED, len(trials)))
        samples = [[*t.samples_us, *[t.samples_us[-1]] * ROUNDS][:ROUNDS] for t in trials]  # a slow one was stopped when recorded
        kept = _own(samples) if name == "patune" else _optuna(samples, PRUNERS[name]())
        rounds += sum(len(taken) for taken in kept)
        found = min(range(len(trials)), key=lambda i: statistics.median(kept[i]) if len(kept[i]) == ROUNDS else float("inf"))
        regrets.append(trials[found].us / min(trial.us for trial in trials) - 1)
    return {"rounds": rounds, "regrets": regrets}


def _own(samples: list[list[float]]) -> list[list[float]]:
    """As `patune.tuner.timing.race` does: in batches, out after two rounds if SLOW times over the best of the batch."""
    kept = []
    for start in range(0, len(samples), 8):
        batch = samples[start : start + 8]
        limit = SLOW * min(min(taken[:FIRST_ROUNDS]) for taken in batch)
        kept += [taken if min(taken[:FIRST_ROUNDS]) <= limit else taken[:FIRST_ROUNDS] for taken in batch]
    return kept


def _optuna(samples: list[list[float]], pruner: Any) -> list[list[float]]:
    """One config after the other, a report a round."""
    study, kept = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler()), []
    for taken in samples:
        trial, n = study.ask(), 0
        for n, us in enumerate(taken, start=1):
            trial.report(us, n)
            if trial.should_prune():
                break
        pruned = n < len(taken)
        study.tell(trial, None if pruned else statistics.median(taken), optuna.trial.TrialState.PRUNED if pruned else None)
        kept.append(taken[:n])
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("landscape", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--gp", action="store_true", help="Optuna's Gaussian process as well: an hour")
    args = parser.parse_args()
    recorded = landscape.load(args.landscape)
    counted = {key: large(recorded, key) for key in recorded.keys()}
    keys = [key for key, workloads in counted.items() if workloads]
    document: dict = {
        "landscape": asdict(recorded.environment) | {"recorded": recorded.recorded, "commit": recorded.commit},
        "source_hash": {key.kernel: recorded.source_hash(key) for key in keys},
        "seeds": args.seeds, "keys": len(keys), "workloads": sum(map(len, counted.values())),
        "variants": {}, "pruners": {},
    }  # fmt: skip
    seeds = range(args.seeds)
    with ProcessPoolExecutor(args.jobs, initializer=optuna.logging.set_verbosity, initargs=(optuna.logging.ERROR,)) as pool:
        for name in {**VARIANTS, **(SLOW_VARIANTS if args.gp else {})}:
            runs = [list(pool.map(functools.partial(one, args.landscape), [(key, name, seed) for key in keys])) for seed in seeds]
            document["variants"][name] = found = summary(runs)
            print(f"{name:34s}", {n: round(v, 3) for n, v in found["fraction_of_optimum"].items()}, flush=True)
        for name in ("patune", *PRUNERS):
            done = list(pool.map(functools.partial(prune, args.landscape), [(key, name, seed) for seed in seeds for key in keys]))
            regret = statistics.fmean(regret for part in done for regret in part["regrets"])
            rounds = sum(part["rounds"] for part in done)
            document["pruners"][name] = {"rounds": rounds, "mean_regret": regret}
            print(f"{name:34s} {rounds} rounds, mean regret {regret:.3%}", flush=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
