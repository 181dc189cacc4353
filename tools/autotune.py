"""`patune run` beside triton.autotune: the same kernels, configs and workloads, each from an empty Triton cache, on a GPU host.

    python tools/autotune.py OUT.json [--seconds 300] [--gpu h100] [--model llama-3.1-8b] [--kernel all] [--commit HASH] [--run RUN]

triton.autotune is used as it comes: it compiles a config when its turn is there, times it with its own benchmark, and keeps the
fastest, for every new value of its key, which is the workload; the rules of the template prune its configs. It wraps one
kernel, but a call may be more than one (the two stages of a decode), so what it wraps here makes all the launches of a call:
to time stage 1 alone would hide what splits cost. They are prepared once a config, not once a launch.

The whole of it takes long, so it gets SECONDS, each template an equal part of what those of smaller spaces left; workloads of few
configs come first, so that many are finished. What the rest would take is estimated from what was measured, under "extrapolated"
in OUT and nowhere else. The winners of finished workloads are raced against patune's as patune measures.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Set
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from patune.kernels.registry import template
from patune.kernels.template import Launch, Template, Values
from patune.tuner.gpu import GpuRunner
from patune.tuner.space import valid_points
from patune.tuner.task import FINAL_ROUNDS
from patune.workload import Key, Workload

Benchmark = Callable[..., list[float]]
Kernels = Callable[[list[Launch]], Set]


class TimeIsUp(Exception):
    """Raised before an evaluation, out of triton.autotune."""


class Evaluation(NamedTuple):
    workload: Workload
    config: Values
    seconds: float  # compiling, if it had to be, and timing
    new: bool  # it had to be compiled


def compiled_kernels(launches: list[Launch]) -> Set:
    """What tells the kernels of these launches from others, as Triton's JIT does."""
    found = set()
    for launch in launches:
        *_, bind = launch.fn.device_caches[driver.active.get_current_device()]
        _, specialization, options = bind(**launch.args)
        found.add((launch.fn, str(specialization), str(options)))
    return found


class Call(KernelInterface):
    """A call of a template as a kernel that triton.autotune can wrap, with a log of what that evaluates until `ends`."""

    arg_names = ("workload",)

    def __init__(
        self, key: Key, *, device: str, ends: float, benchmark: Benchmark | None = None, kernels: Kernels = compiled_kernels
    ):
        self.key, self.template = key, template(key.kernel)
        self.fn = self.template.jit_functions[-1]  # triton.autotune wants the name of a function
        self.ends, self.benchmark, self.kernels = ends, benchmark, kernels
        self.log: list[Evaluation] = []
        self.repeated_s: float | None = None  # of one that had been evaluated before
        self.problem = functools.lru_cache(maxsize=1)(lambda workload: self.template.problem(key, workload, device=device, sets=1))
        self._compiled: set = set()
        self._prepared: tuple[Workload, Values] | None = None
        self._launches: list[Launch] = []

    def run(self, workload: Workload, *, grid: Any, warmup: bool, **meta: Any) -> None:
        at = workload, {name: meta[name] for name in self.template.tunables}
        if at != self._prepared:
            self._launches, self._prepared = self.problem(workload).launches(at[1]), at
        for launch in self._launches:
            launch.run()

    def bench(self, call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        """Triton's own benchmark, by the clock."""
        if time.monotonic() >= self.ends:
            raise TimeIsUp
        benchmark = self.benchmark or driver.active.get_benchmarker()
        began = time.monotonic()
        try:
            return benchmark(call, quantiles=quantiles)
        finally:
            assert self._prepared
            workload, config = self._prepared
            seconds, kernels = time.monotonic() - began, self.kernels(self._launches)
            self.log.append(Evaluation(workload, config, seconds, not kernels <= self._compiled))
            self._compiled |= kernels

    def repeat(self) -> None:
        """The last evaluation once more, which compiles nothing."""
        last, self.ends = self.log[-1], math.inf
        self.bench(lambda: self.run(last.workload, grid=None, warmup=False, **last.config), quantiles=(0.5, 0.2, 0.8))
        self.repeated_s = self.log.pop().seconds


def autotuned(call: Call, workloads: Iterable[Workload]) -> Any:
    """The call under triton.autotune."""
    points = {workload: valid_points(call.template, call.key, workload) for workload in workloads}
    configs = {workload: {_config(values) for values in found} for workload, found in points.items()}
    every = dict.fromkeys(_config(values) for found in points.values() for values in found)

    def valid(every: list, named: dict, **_: Any) -> list:
        return [config for config in every if config in configs[named["workload"]]]

    decorate = triton.autotune([*every], key=["workload"], prune_configs_by={"early_config_prune": valid}, do_bench=call.bench)
    return decorate(call)


def _config(values: Values) -> triton.Config:
    own = {name: value for name, value in values.items() if name in ("num_warps", "num_stages")}
    return triton.Config({name: value for name, value in values.items() if name not in own}, **own)


def _values(config: triton.Config, of: Template) -> Values:
    return {name: config.all_kwargs()[name] for name in of.tunables}


@dataclass
class Tuning:
    """What triton.autotune did."""

    seconds: float
    calls: list[Call]
    winners: dict[tuple[Key, Workload], Values]  # of the workloads that it finished


def turns(plan: dict[Key, list[Workload]]) -> list[tuple[Key, list[Workload]]]:
    """The plan in the order in which it is tuned: keys and workloads of few configs first."""
    sizes = {key: {w: len(valid_points(template(key.kernel), key, w)) for w in workloads} for key, workloads in plan.items()}
    return [(key, sorted(plan[key], key=sizes[key].__getitem__)) for key in sorted(plan, key=lambda key: sum(sizes[key].values()))]


def tune(plan: dict[Key, list[Workload]], seconds: float) -> Tuning:
    # Which configs are valid is known before, as triton.autotune's users know theirs: 2 s an enumeration for the main job.
    order = turns(plan)
    calls = {key: Call(key, device="cuda", ends=math.inf) for key in plan}
    tuners = {key: autotuned(calls[key], workloads) for key, workloads in plan.items()}
    winners: dict[tuple[Key, Workload], Values] = {}
    began = time.monotonic()
    for left, (key, workloads) in zip(range(len(order), 0, -1), order):
        call, now = calls[key], time.monotonic()
        call.ends = now + (began + seconds - now) / left
        with contextlib.suppress(TimeIsUp):
            for workload in workloads:
                call.problem(workload)  # the tensors are the user's, not part of tuning
                tuners[key][None](workload)
                winners[key, workload] = _values(tuners[key].best_config, call.template)
                print(f"triton.autotune: {key.kernel} {workload}, {time.monotonic() - began:.0f} s", flush=True)
        if call.log and all(evaluation.new for evaluation in call.log):
            call.repeat()
    return Tuning(time.monotonic() - began, list(calls.values()), winners)


def kernel_summary(call: Call, workloads: Iterable[Workload]) -> dict:
    """Evaluations and seconds of one template, measured; `extrapolated_rest_s` is what is left at these rates.

    None if there is no rate: no evaluation that compiled. Where every evaluation compiled, one of them was repeated for what the
    others take.
    """
    points = [(workload, config) for workload in workloads for config in valid_points(call.template, call.key, workload)]
    compiled: set = set()
    to_compile = 0  # evaluations
    for workload, config in points:
        kernels = call.kernels(call.problem(workload).launches(config))
        to_compile += not kernels <= compiled
        compiled |= kernels
    first, later = ([e.seconds for e in call.log if e.new is new] for new in (True, False))
    if call.repeated_s is not None:
        later.append(call.repeated_s)
    rest_new = max(0, to_compile - len(first))
    rest_old = len(points) - len(call.log) - rest_new
    first_s, later_s = statistics.fmean(first) if first else None, statistics.median(later) if later else None
    known = not (rest_new and first_s is None) and not (rest_old and later_s is None)
    return {
        "evaluations": len(call.log), "of": len(points), "compiled": len(first), "of_compiled": to_compile,
        "seconds": sum(evaluation.seconds for evaluation in call.log),
        "mean_s_with_compiling": first_s, "median_s_without": later_s,
        "extrapolated_rest_s": rest_new * (first_s or 0.0) + rest_old * (later_s or 0.0) if known else None,
    }  # fmt: skip


def race(runner: GpuRunner, winners: dict[tuple[Key, Workload], Values], patunes: dict[tuple[Key, Workload], Values]) -> list[dict]:
    """Both winners of each workload as patune measures; nothing to measure where they are the same."""
    rows = []
    for (key, workload), theirs in winners.items():
        ours = patunes[key, workload]
        row: dict = {"kernel": key.kernel, "workload": asdict(workload), "autotune": theirs, "patune": ours}
        if theirs == ours:
            row["us_over_patune"] = 1.0
        else:
            found = runner.measure(key, workload, [theirs], ours, FINAL_ROUNDS)
            us, patune_us = found.trials[0].us, found.reference.us
            row |= {"status": found.trials[0].status, "us": us, "patune_us": patune_us}
            row["us_over_patune"] = us / patune_us if us and patune_us else None
        rows.append(row)
    return rows


def patune_run(args: argparse.Namespace, folder: str) -> tuple[float, dict]:
    """Seconds from start to end, and the document of the run."""
    command = [sys.executable, "-m", "patune", "run", "--gpu", args.gpu, "--model", args.model, "--kernel", args.kernel, "--json"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--db", f"{folder}/patune.db"], stdout=subprocess.PIPE, text=True, check=False,
        env=os.environ | {"TRITON_CACHE_DIR": f"{folder}/patune"},
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"patune run ended with exit status {done.returncode}")
    return time.monotonic() - began, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300, help="that triton.autotune gets")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--kernel", default="all")
    parser.add_argument("--commit", default="", help="the commit that is measured")
    parser.add_argument("--run", type=Path, help="write the document of patune's own run here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        patune_s, document = patune_run(args, folder)  # before anything here is on the GPU
        print(f"patune: {patune_s:.1f} s", flush=True)
        if args.run:
            args.run.write_text(json.dumps(document, indent=2) + "\n")
        rows = [(Key(**part["key"]), Workload(**row["workload"]), row) for part in document["keys"] for row in part["workloads"]]
        plan: dict[Key, list[Workload]] = {}
        for key, workload, _ in rows:
            plan.setdefault(key, []).append(workload)
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/autotune"
        found = tune(plan, args.seconds)
        kernels = {call.key.kernel: kernel_summary(call, plan[call.key]) for call in found.calls}
        for call in found.calls:
            call.problem.cache_clear()
        torch.cuda.empty_cache()  # the races need it
        with contextlib.closing(GpuRunner()) as runner:
            raced = race(runner, found.winners, {(key, workload): row["config"] for key, workload, row in rows})
            environment = asdict(runner.environment)
    rest = [kernel["extrapolated_rest_s"] for kernel in kernels.values()]
    whole_s = None if None in rest else found.seconds + sum(rest)
    evaluations = sum(row["evaluations"] for *_, row in rows)
    ratios = [row["us_over_patune"] for row in raced if row["us_over_patune"]]
    args.out.write_text(json.dumps({
        **environment, "commit": args.commit, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source_hash": {key.kernel: template(key.kernel).source_hash for key in plan}, "model": args.model,
        "patune": {**document["time"], "seconds": patune_s, "workloads": len(rows), "evaluations": evaluations},
        "triton_autotune": {"seconds": found.seconds, "workloads": len(found.winners), "kernels": kernels},
        "extrapolated": {"whole_space_s": whole_s, "times_patune": whole_s and whole_s / patune_s},
        "races": raced, "geomean_us_over_patune": statistics.geometric_mean(ratios) if ratios else None,
    }, indent=1) + "\n")  # fmt: skip
    rest = f"would need about {whole_s:.0f} s for all (extrapolated)" if whole_s else "evaluated too few to extrapolate from"
    print(
        f"patune tuned {len(rows)} workloads in {patune_s:.0f} s. triton.autotune finished {len(found.winners)} of them in "
        f"{found.seconds:.0f} s and {rest}."
    )


if __name__ == "__main__":
    main()
