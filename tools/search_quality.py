"""How quickly the search finds a config that is truly best: replayed on a recorded landscape, against random search.

    python tools/search_quality.py patune/tables/h100.landscape.json.gz OUT.json [--seeds 30] [--jobs 2]

For every key, seed and strategy all workloads are searched in the order that `patune run` takes. OUT has, per key and strategy,
the regret (the best found over the optimum, minus 1) of every workload and seed after 8, 16, 32 and 64 evaluations, and
the fraction of optimum as Kernel Tuner's community counts it: (default - found) / (default - optimum), in time saved.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from patune.cachedb import landscape
from patune.cachedb.trial import Trial
from patune.kernels.registry import template
from patune.tuner.search import Search, transferred
from patune.tuner.space import point_of, valid_points
from patune.workload import Key, Workload

AFTER = (8, 16, 32, 64)


def tpe(recorded, key: Key, workload: Workload, seed: int, winners: list[tuple[Workload, dict]]) -> Iterator[Trial]:
    """The search that `patune run` makes."""
    kernel = template(key.kernel)
    points, trials = valid_points(kernel, key, workload), recorded.trials(key, workload)
    seeds = [recorded.default(key, workload), *transferred(kernel, key, workload, winners, lambda config: config in points)]
    search = Search(kernel.tunables, points, trials=max(AFTER), seed=seed, seeds=seeds)
    while batch := search.ask():
        told = [trials[point_of(config, kernel.tunables)] for config in batch]
        search.tell(told)
        yield from told


def random_search(recorded, key: Key, workload: Workload, seed: int, winners: list[tuple[Workload, dict]]) -> Iterator[Trial]:
    """Valid points without repeats, after the default."""
    kernel = template(key.kernel)
    default = recorded.default(key, workload)
    points = [c for c in valid_points(kernel, key, workload) if c != default]
    random.Random(f"{seed} {workload}").shuffle(points)
    for config in [default, *points][: max(AFTER)]:
        yield recorded.trials(key, workload)[point_of(config, kernel.tunables)]


STRATEGIES = {"patune": tpe, "random": random_search}


def one(path: Path, key: Key, strategy: str, seed: int) -> list[dict]:
    """Best time of every workload after each number of evaluations, in microseconds."""
    recorded = landscape.load(path)
    rows, winners = [], []
    for workload in recorded.workloads(key):
        best, best_us, us = None, float("inf"), {}
        for spent, trial in enumerate(STRATEGIES[strategy](recorded, key, workload, seed, winners), start=1):
            if trial.status == "ok" and trial.us < best_us:
                best, best_us = trial.config, trial.us
            if spent in AFTER:
                us[spent] = best_us
        winners.append((workload, best))
        rows.append({"workload": str(workload), "us": {str(n): us.get(n, best_us) for n in AFTER}})
    return rows


def summary(recorded, key: Key, runs: list[list[dict]]) -> dict:
    workloads = recorded.workloads(key)
    optimum = [recorded.optimum(key, w).us for w in workloads]
    default = [recorded.trials(key, w)[point_of(recorded.default(key, w), recorded.tunables(key))].us for w in workloads]
    out = {}
    for n in map(str, AFTER):
        regrets = [[row["us"][n] / best - 1 for row, best in zip(run, optimum)] for run in runs]
        saved = [
            sum(d - row["us"][n] for row, d in zip(run, default)) / sum(d - o for d, o in zip(default, optimum)) for run in runs
        ]
        out[n] = {
            "median_regret": statistics.median(r for run in regrets for r in run),
            "worst_workload_median_regret": max(statistics.median(run[i] for run in regrets) for i in range(len(workloads))),
            "p90_regret": statistics.quantiles([r for run in regrets for r in run], n=10)[8],
            "fraction_of_optimum": statistics.median(saved),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("landscape", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    recorded = landscape.load(args.landscape)
    source = asdict(recorded.environment) | {"recorded": recorded.recorded, "commit": recorded.commit}
    document: dict = {"landscape": source, "seeds": args.seeds, "keys": []}
    with ProcessPoolExecutor(args.jobs) as pool:
        for key in list(recorded.keys()):
            part = {"key": asdict(key), "workloads": len(recorded.workloads(key)), "source_hash": recorded.source_hash(key)}
            for strategy in STRATEGIES:
                part[strategy] = summary(
                    recorded, key, list(pool.map(partial(one, args.landscape, key, strategy), range(args.seeds)))
                )
                medians = "  ".join(f"{n}: {v['median_regret']:.2%}" for n, v in part[strategy].items())
                print(f"{key.kernel} d{key.head_dim} p{key.page_size} g{key.q_heads_per_kv} {strategy:7s} {medians}", flush=True)
            document["keys"].append(part)
            args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
