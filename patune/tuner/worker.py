"""The measuring process. It owns the GPU, so a config that destroys the CUDA context destroys only this process.

It is given jobs (key, workload, {index: config}, rounds) and reports as it goes, so that whoever reads the pipe knows
which config was running when the reports end:
    ("ready", Environment)  ("problem",)  ("running", index)  ("checked", index, status, error, message)
    ("racing",)  ("raced", {index: samples_us})  ("failed", message): this job, or all if it comes instead of "ready"
"""

import functools
import gc
import math
import os
import signal
import subprocess
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from ..cachedb.trial import Environment
from ..kernels.template import Problem, Values
from ..workload import Key, Workload
from . import timing
from .compile import summary

REFERENCE = 0  # the index of the config that is timed in every round
SAMPLE_US = 100.0  # at least. Those of append took 10 to 16 us, over before the next one was launched: 5 to 30% of noise
LONG_FLOPS = 1e12  # of a call that takes a millisecond or more on any GPU: a sample is of one call, not of one with every set


def serve(pipe: Connection, device: str | None = None) -> None:
    """Report ready, then measure jobs until the pipe closes or the GPU fails. `device` is all that this process sees."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # CUDA reads it when it is first used, which is below
    try:
        clock = timing.clock()
        environment = environment_of(clock)
    except Exception as error:  # noqa: BLE001  whatever it is, it is reported
        pipe.send(("failed", str(error)))
        return
    gc.freeze()  # torch and triton are here to stay: collections need not visit them
    bench = _Bench(clock, pipe)
    pipe.send(("ready", environment))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        bench.measure(*job)


class _Bench:
    def __init__(self, clock: timing.Clock, pipe: Connection):
        self.clock, self.pipe = clock, pipe
        self.problem: Problem | None = None
        self.of: tuple[Key, Workload] | None = None  # what the problem is of
        self.repeats: int | None = None  # of all its sets in a sample; None until a config of it was right
        self.alike: bool | None = None  # whether one compiled kernel serves all its sets; None as long

    def measure(self, key: Key, workload: Workload, configs: Mapping[int, Values], rounds: int) -> None:
        try:
            problem = self._problem(key, workload)
        except Exception as error:  # noqa: BLE001  whatever it is, it is reported
            self.pipe.send(("failed", summary(error)))
            return
        self.pipe.send(("problem",))
        replays = {}
        for i, config in configs.items():
            self.pipe.send(("running", i))
            right = self._check(problem, i, config)
            if right is not None:
                replays[i] = right
        beat = functools.partial(self.pipe.send, ("racing",))
        beat()
        calls = 1 if problem.flops >= LONG_FLOPS else problem.sets * (self.repeats or 1)
        samples = timing.race(self.clock, replays, calls, rounds, keep=REFERENCE, beat=beat)
        self.pipe.send(("raced", samples))

    def _problem(self, key: Key, workload: Workload) -> Problem:
        """The problem of a workload, built once: it stays until another workload comes."""
        if self.problem is None or self.of != (key, workload):
            from ..kernels.registry import template

            self.problem = self.of = self.repeats = self.alike = None
            _free(self.clock)
            self.problem = template(key.kernel).problem(key, workload, device=self.clock.device)
            self.clock.synchronize()
            self.of = key, workload
        return self.problem

    def _check(self, problem: Problem, i: int, config: Values) -> list[timing.Call] | None:
        """Run a config on poisoned outputs, compare, report; if it is right, what replays it: all sets together, or each alone."""
        error = None
        try:
            first, *others = [problem.launches(config, r) for r in range(problem.sets)]
            problem.poison(0)
            kernels = [launch.run() for launch in first]
            self.clock.synchronize()
            error = problem.error(0)
            if not error <= problem.tolerance:
                message = f"relative error {error:.2g}, {problem.tolerance:g} is allowed"
                self.pipe.send(("checked", i, "wrong_answer", error, message))
                return None
            if self.alike is None:
                self.alike = all(launch.compiles_as(one) for launches in others for launch, one in zip(launches, first))
            sets = [[launch.again(kernel) for launch, kernel in zip(first, kernels)]]
            for launches in others:  # a set that specialises differently must not compile under capture
                made = kernels if self.alike else [launch.run() for launch in launches]
                sets.append([launch.again(kernel) for launch, kernel in zip(launches, made)])
            every = [call for calls in sets for call in calls]
            together = sets if problem.flops >= LONG_FLOPS else [every * self._repeats(every)]
            replays = [self.clock.capture(calls) for calls in together]
        except Exception as failure:  # noqa: BLE001  whatever it is, it is the outcome
            self._report_failure(i, failure, error)
            return None
        self.pipe.send(("checked", i, "ok", error, ""))
        return replays

    def _repeats(self, every: list[timing.Call]) -> int:
        """How often a sample makes the calls of all sets, the same for all configs: as often as makes it SAMPLE_US long."""
        if self.repeats is None:
            once = self.clock.capture(every)
            self.repeats = math.ceil(SAMPLE_US / min(SAMPLE_US, *self.clock.lap(once, [once] * 3)))
        return self.repeats

    def _report_failure(self, i: int, failure: Exception, error: float | None) -> None:
        """Tell what failed. If the GPU is no longer usable, tell that and end."""
        try:
            self.clock.synchronize()
        except Exception as fatal:
            self.pipe.send(("checked", i, "illegal_access", error, summary(fatal)))
            raise SystemExit(1) from fatal
        self.pipe.send(("checked", i, _status(failure), error, summary(failure)))


def _status(failure: Exception) -> str:
    import torch
    from triton.runtime.errors import OutOfResources

    if isinstance(failure, torch.OutOfMemoryError):
        return "out_of_memory"
    return "out_of_resources" if isinstance(failure, OutOfResources) else "compile_failed"


def _free(clock: timing.Clock) -> None:
    if clock.device == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def environment_of(clock: timing.Clock) -> Environment:
    """The machine that this process measures on."""
    import torch
    import triton

    versions: dict[str, Any] = {"triton": triton.__version__, "torch": torch.__version__}
    if clock.device == "cpu":
        return Environment("interpreter", 1, "", "", **versions)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = f"{properties.major}.{properties.minor}"
    return Environment(properties.name, properties.multi_processor_count, capability, _driver_version(), **versions)


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
