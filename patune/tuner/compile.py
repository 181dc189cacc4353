"""Compiling ahead on every core without touching a GPU. What counts is left behind in Triton's disk cache.

A child process is forked from a server that has all of it loaded, stands in for the GPU's driver with a stub, and
compiles for the target's compute capability. A compiler that crashes or hangs costs the configs that it was given.
"""

import functools
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..kernels.template import Values
from ..workload import Key, Workload
from . import server
from .space import Point, variant

SHARED_BYTES = {
    "8.0": 166912,
    "8.6": 101376,
    "8.9": 101376,
    "9.0": 232448,
    "10.0": 232448,
    "12.0": 101376,
}  # a block, opt-in
# A thread. A few registers that go to memory and back may cost less than they save: a prototype of the plain prefill that spilled
# 168 bytes, 18 loads and 9 stores a tile, was the fastest of 17 points on 4 workloads of an H100. What is refused has 750 and more.
MAX_SPILL_BYTES = 512
TIMEOUT_S = 120.0  # for the configs of one job


@dataclass(frozen=True, slots=True)
class Build:
    """What compiling a config gave; sizes are the largest of its kernels."""

    status: str  # "ok", "compile_failed" or "out_of_resources"
    message: str = ""
    shared_bytes: int = 0  # a block
    registers: int = 0  # a thread
    spill_bytes: int = 0  # a thread
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Configs of a workload that are of one variant."""

    key: Key
    workload: Workload
    configs: list[Values]
    variant: Point
    builds: Future[list[Build]]


class CompilePool:
    """Compiles configs in the background for one compute capability, each once.

    Jobs run in the order in which they came, but those of one variant run one after the other. Its kernels are mostly
    the same for all workloads of a key; once the first one's have been compiled, Triton's cache has them for the others, and
    while they are being compiled it has not.
    """

    def __init__(self, capability: str, workers: int | None = None, timeout_s: float = TIMEOUT_S):
        server.start()
        self._capability, self._timeout_s = capability, timeout_s
        count = workers or max(2, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="compile")
        self._starting = threading.Lock()
        self._children: list[_Child] = []
        self._closed = False
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()  # last in, first out: warm children first
        for _ in range(count):
            self._idle.put(None)
        self._builds: dict[tuple[Key, Workload, frozenset], tuple[Future[list[Build]], int]] = {}
        self._order = threading.Lock()  # of what follows
        self._jobs: list[_Job] = []
        self._compiling: set[tuple[Key, Point]] = set()

    def submit(self, key: Key, workload: Workload, configs: Sequence[Values]) -> None:
        """Start compiling what is new among these; the configs of a variant go to the same child."""
        from ..kernels.registry import template

        groups: dict[Point, list[Values]] = {}
        for config in configs:
            if (key, workload, _frozen(config)) not in self._builds:
                groups.setdefault(variant(template(key.kernel), config), []).append(config)
        for of, group in groups.items():
            job = _Job(key, workload, group, of, Future())
            for i, config in enumerate(group):
                self._builds[key, workload, _frozen(config)] = job.builds, i
            with self._order:
                self._jobs.append(job)
            self._threads.submit(self._run_jobs)

    def build(self, key: Key, workload: Workload, config: Values) -> Build:
        """The outcome for a config that was submitted; waits for it."""
        future, i = self._builds[key, workload, _frozen(config)]
        return future.result()[i]

    def close(self) -> None:
        """Drop what has not been started and end the children, busy or not."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._order:
            for job in self._jobs:
                job.builds.cancel()
            self._jobs.clear()
        with self._starting:
            self._closed = True
            for child in self._children:
                child.end()

    def _run_jobs(self) -> None:
        """Run jobs until there is none to take: what waits for a variant is taken by the thread that has compiled it."""
        while (job := self._take()) is not None:
            try:
                job.builds.set_result(self._compile(job.key, job.workload, job.configs))
            except BaseException as error:  # noqa: BLE001  whoever waits for the builds raises it
                job.builds.set_exception(error)
            finally:
                with self._order:
                    self._compiling.remove((job.key, job.variant))

    def _take(self) -> _Job | None:
        """The first job whose variant is not being compiled."""
        with self._order:
            for i, job in enumerate(self._jobs):
                if (job.key, job.variant) not in self._compiling:
                    self._compiling.add((job.key, job.variant))
                    return self._jobs.pop(i)
        return None

    def _compile(self, key: Key, workload: Workload, configs: list[Values]) -> list[Build]:
        child = self._idle.get()
        try:
            if child is None:
                child = self._start()
            return child.build((key, workload, configs), self._timeout_s)
        except (EOFError, OSError) as error:
            why = str(error) or "the compiler killed its process"
            if child is not None:
                child.kill()
                child = None
            return [Build("compile_failed", why)] * len(configs)
        finally:
            self._idle.put(child)

    def _start(self) -> "_Child":
        with self._starting:
            if self._closed:
                raise OSError("the pool is closed")
            child = _Child(self._capability)
            self._children.append(child)
            return child


def _frozen(config: Values) -> frozenset:
    return frozenset(config.items())  # a config from the database has its tunables in another order


class _Child:
    """One compiling process and the pipe to it."""

    def __init__(self, capability: str):
        context = server.context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, capability), name="patune-compile", daemon=True)
        self._process.start()
        theirs.close()

    def build(self, job: tuple[Key, Workload, list[Values]], timeout_s: float) -> list[Build]:
        self._pipe.send(job)
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"compiling took more than {timeout_s:g} s")
        return self._pipe.recv()

    def end(self) -> None:
        """End the process. A thread that reads its pipe finds the end of it."""
        self._process.kill()
        self._process.join()

    def kill(self) -> None:
        """End it, for the thread that reads its pipe."""
        self.end()
        self._pipe.close()


class _NoGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: str):
        from triton.backends.compiler import GPUTarget

        major, minor = capability.split(".")
        self._target = GPUTarget("cuda", int(major) * 10 + int(minor), 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


def _serve(pipe: Connection, capability: str) -> None:
    """The life of a child: configs in, builds out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.nice(10)  # the measuring process needs a core at once when it needs one
    from triton.runtime import driver

    from ..kernels.registry import template

    stub: Any = _NoGpu(capability)
    driver.set_active(stub)
    problems = functools.lru_cache(maxsize=8)(lambda key, workload: template(key.kernel).problem(key, workload, device="meta"))
    while True:
        try:
            key, workload, configs = pipe.recv()
        except EOFError:
            return
        pipe.send([_build(problems, key, workload, config, SHARED_BYTES.get(capability)) for config in configs])


def _build(problems: Any, key: Key, workload: Workload, config: Values, shared_limit: int | None) -> Build:
    started = time.perf_counter()
    try:
        kernels = [launch.warmup() for launch in problems(key, workload).launches(config)]
    except Exception as error:  # noqa: BLE001  whatever it is, it is the outcome
        return Build("compile_failed", summary(error), seconds=time.perf_counter() - started)
    shared = max(kernel.metadata.shared for kernel in kernels)
    usage = [_usage(kernel) for kernel in kernels]
    registers, spills = max(r for r, _ in usage), max(s for _, s in usage)
    status, message = "ok", ""
    if shared_limit is not None and shared > shared_limit:
        status, message = "out_of_resources", f"{shared} bytes of shared memory a block, the GPU has {shared_limit}"
    elif spills > MAX_SPILL_BYTES:
        status, message = "out_of_resources", f"{spills} bytes of registers a thread spill"
    return Build(status, message, shared, registers, spills, time.perf_counter() - started)


@functools.cache
def _usage(kernel: Any) -> tuple[int, int]:
    """(registers, spilled bytes) a thread, as the disassembler reports them; zeros if there is none."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        try:
            report = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            return 0, 0
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return used.get("REG", 0), max(used.get("STACK", 0), used.get("LOCAL", 0))


def summary(error: BaseException) -> str:
    """An error in one line: its type, and the beginning and end of a long message."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"
