"""Measuring on a GPU of this machine: a pool that compiles ahead and a worker process that is replaced when it dies."""

import logging
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Literal, Never, Self

from ..cachedb.trial import Environment, Trial
from ..errors import WorkerError
from ..kernels.template import Values
from ..workload import Key, Workload
from . import server
from .compile import CompilePool
from .phases import Phases
from .runner import ROUNDS, Race
from .timing import refuse_capture
from .worker import REFERENCE, serve

START_TIMEOUT_S = 300.0  # loading torch from a cold disk, and building the tensors of the largest workload
RUN_TIMEOUT_S = 20.0  # between two reports of the worker: one config's check, or one round of a race


log = logging.getLogger(__name__)


class GpuRunner:
    """A Runner on one GPU, or on the CPU under TRITON_INTERPRET=1, where nothing is compiled."""

    mode: Literal["measured", "replay"] = "measured"

    def __init__(self, timeout_s: float = RUN_TIMEOUT_S, worker: "_Worker | None" = None, pool: CompilePool | None = None):
        refuse_capture()
        self._timeout_s = timeout_s
        self._worker = worker or _Worker()
        self.environment: Environment = self._worker.environment
        self._pool = pool or _pool_for(self.environment)
        self._closed = False
        self.phases = Phases()

    @classmethod
    def several(cls, devices: Sequence[str | None]) -> list[Self]:
        """One for each device, by what CUDA_VISIBLE_DEVICES calls it, None for the current one. They share a compile pool."""
        with ThreadPoolExecutor(len(devices)) as starting:
            workers = list(starting.map(_Worker, devices))
        pool = _pool_for(workers[0].environment)
        return [cls(worker=worker, pool=pool) for worker in workers]

    def prepare(self, key: Key, workload: Workload, points: Sequence[Values]) -> None:
        if self._pool:
            self._pool.submit(key, workload, points)

    def measure(self, key: Key, workload: Workload, points: Sequence[Values], reference: Values, rounds: int = ROUNDS) -> Race:
        from ..kernels.registry import template

        configs: dict[int, Values] = dict(enumerate([reference, *points], start=REFERENCE))
        try:
            self.phases.enter("compilers")
            began = time.monotonic()
            outcomes = self._build(key, workload, configs)
            log.debug("%s %s: waited %.2f s for the compilers", key.kernel, workload, time.monotonic() - began)
            while len(outcomes) < len(configs):
                todo = {i: config for i, config in configs.items() if i not in outcomes}
                outcomes.update(self._attempt(key, workload, todo, rounds))
        finally:
            self.phases.enter(None)
        source_hash, when = template(key.kernel).source_hash, datetime.now(UTC).isoformat(timespec="seconds")
        first, *others = [
            Trial(config=dict(config), source_hash=source_hash, when=when, **outcomes[i]) for i, config in configs.items()
        ]
        return Race(others, first)

    def optimum_us(self, key: Key, workload: Workload) -> float | None:
        return None

    def close(self) -> None:
        """End the worker, also in the middle of a race, and the compilers."""
        self._closed = True
        self._worker.end()
        if self._pool:
            self._pool.close()

    def _build(self, key: Key, workload: Workload, configs: Mapping[int, Values]) -> dict[int, dict[str, Any]]:
        """The outcomes of those that do not compile or do not fit."""
        if not self._pool:
            return {}
        self._pool.submit(key, workload, list(configs.values()))
        builds = {i: self._pool.build(key, workload, config) for i, config in configs.items()}
        return {i: {"status": b.status, "message": b.message} for i, b in builds.items() if b.status != "ok"}

    def _attempt(self, key: Key, workload: Workload, todo: Mapping[int, Values], rounds: int) -> dict[int, dict[str, Any]]:
        """The outcomes of all if the worker lives through it, else at least that of the config which ended it."""
        outcomes: dict[int, dict[str, Any]] = {}
        running = None
        try:
            self.phases.enter("tensors")
            self._worker.send((key, workload, dict(todo), rounds))
            report = self._worker.receive(START_TIMEOUT_S)
            if report[0] == "failed":
                self._restart()  # whatever was made of the tensors is in the way of the next workload's
                raise WorkerError(f"no tensors for {key.kernel} {workload}: {report[1]}")
            self.phases.enter("checks")
            while report[0] != "raced":
                if report[0] == "running":
                    running = report[1]
                elif report[0] == "checked":
                    _, i, status, error, message = report
                    outcomes[i] = {"status": status, "error": error, "message": message}
                    if status == "illegal_access":
                        raise _Lost(status, message)
                elif report[0] == "racing":
                    running = None
                    self.phases.enter("races")
                report = self._worker.receive(self._timeout_s)
        except _Lost as lost:
            log.debug("%s %s: %s, %s", key.kernel, workload, lost.status, lost.message)
            self.phases.enter(None)  # a new process is not a measurement
            self._restart()
            return self._blame(key, workload, lost, running, outcomes)
        for i, samples in report[1].items():
            outcomes[i]["samples_us"] = samples
        return outcomes

    def _restart(self) -> None:
        self._worker.kill()
        if self._closed:
            raise WorkerError("the runner is closed")
        log.debug("the measuring process is replaced")
        self._worker = _Worker(self._worker.device)

    def _blame(
        self, key: Key, workload: Workload, lost: "_Lost", running: int | None, outcomes: dict[int, dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """What is certain after a loss. Configs that were right so far lost their graphs and have to run again."""
        failed = {i: outcome for i, outcome in outcomes.items() if outcome["status"] != "ok"}
        if running is not None:
            return {running: {"status": lost.status, "message": lost.message}, **failed}
        if not outcomes:
            raise WorkerError(f"the tensors of {key.kernel} {workload} were not made: {lost.message}")
        racing = {i: {"status": lost.status, "message": f"{lost.message}, in a race of several"} for i in outcomes}
        return {**racing, **failed}


class _Lost(Exception):
    """The worker is gone, or no longer usable."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def _pool_for(environment: Environment) -> CompilePool | None:
    return CompilePool(environment.capability) if environment.capability else None


class _Worker:
    """The measuring process, started and ready."""

    def __init__(self, device: str | None = None) -> None:
        context: multiprocessing.context.BaseContext
        if os.environ.get("TRITON_INTERPRET") == "1":  # which triton reads as it is loaded
            context = multiprocessing.get_context("spawn")
        else:
            server.start()
            context = server.context()
        self.device = device  # as CUDA_VISIBLE_DEVICES calls it; None: what this process sees
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, device), name="patune-measure", daemon=True)
        self._process.start()
        theirs.close()
        try:
            kind, what = self.receive(START_TIMEOUT_S)
        except _Lost as lost:
            self._fail(f"the measuring process did not start: {lost.message}")
        if kind == "failed":
            self._fail(what)
        self.environment: Environment = what

    def send(self, job: tuple) -> None:
        try:
            self._pipe.send(job)
        except OSError:
            raise self._dead() from None

    def receive(self, timeout_s: float) -> tuple:
        """The next report; _Lost if none comes in time or none can come any more."""
        try:
            if not self._pipe.poll(timeout_s):
                raise _Lost("timeout", f"no sign of life for {timeout_s:g} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._dead() from None

    def end(self) -> None:
        """End the process. A thread that reads its pipe finds the end of it."""
        self._process.kill()
        self._process.join(30)  # the GPU's memory is free again only then

    def kill(self) -> None:
        """End it, for the thread that reads its pipe."""
        self.end()
        self._pipe.close()

    def _dead(self) -> _Lost:
        self._process.join(5)
        return _Lost("worker_died", f"the measuring process ended with exit code {self._process.exitcode}")

    def _fail(self, message: str) -> Never:
        self.kill()
        raise WorkerError(message)
