"""How a time is measured: graphs of the whole rotation of buffer sets, or of a set each, replayed in turn, one sample a round.

`Cuda` and `Host` know how to run calls and how long they took; `race` is the same for both. `Host` exists so that all of
it runs where kernels are interpreted on a CPU.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..errors import PatuneError, WorkerError
from .accept import LEAST_SAMPLES

SLOW = 1.1  # over the best of the first rounds by this factor: out of the race. It halves the time of a race, and at 1.05 as
FIRST_ROUNDS = 2  # well as after one round a replay starts to lose optima.
LONG_S = 1.0  # of GPU time: a race that has taken more ends as soon as its samples can decide
SHORT_S = 0.025  # of GPU time: a race that has taken less goes on, up to MOST times its rounds, which costs next to nothing
MOST = 4  # Samples of an append, of 100 us, scatter by 5% on an H100: two tunings disagreed on 4 of 8 appends by 1 to 3%.
HOST_US = 40.0  # that the host is granted to send off a sample, two events and a graph

Call = Callable[[], None]


class Clock(Protocol):
    device: str

    def synchronize(self) -> None:
        """Wait for all work; raises if the device has failed for good."""
        ...

    def capture(self, calls: Sequence[Call]) -> Call:
        """One callable that makes all the calls. Each must have run before, so that nothing is compiled here."""
        ...

    def lap(self, lead: Call, replays: Sequence[Call], leads: int = 1) -> list[float]:
        """Run `lead`, which is not timed, so often, and the others back to back; microseconds of each."""
        ...


class Cuda:
    """The GPU: CUDA graphs, timed by events on its own clock."""

    device = "cuda"

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._side = torch.cuda.Stream()

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def capture(self, calls: Sequence[Call]) -> Call:
        # torch.cuda.graph would empty the allocator's cache each time; this is the rest of what it does.
        self._cuda.synchronize()
        graph = self._cuda.CUDAGraph()
        with self._cuda.stream(self._side):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        kept = list(calls)  # the calls own the buffers that the graph points to

        def replay() -> None:
            assert kept
            graph.replay()

        replay()  # uploads the graph
        self._cuda.synchronize()
        return replay

    def lap(self, lead: Call, replays: Sequence[Call], leads: int = 1) -> list[float]:
        events = [[self._cuda.Event(enable_timing=True) for _ in range(2)] for _ in replays]
        for _ in range(leads):  # while they run the host gets ahead, so that no sample waits for a launch
            lead()
        for (start, end), replay in zip(events, replays):
            start.record()
            replay()
            end.record()
        self._cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]


class Host:
    """The CPU under Triton's interpreter: a time, but one that says nothing about a GPU."""

    device = "cpu"

    def synchronize(self) -> None:
        """Calls return when they are done."""

    def capture(self, calls: Sequence[Call]) -> Call:
        kept = list(calls)

        def replay() -> None:
            for call in kept:
                call()

        return replay

    def lap(self, lead: Call, replays: Sequence[Call], leads: int = 1) -> list[float]:
        marks = [time.perf_counter()]
        for replay in replays:
            replay()
            marks.append(time.perf_counter())
        return [(end - start) * 1e6 for start, end in itertools.pairwise(marks)]


def clock() -> Clock:
    """The GPU's if there is one, the CPU's under TRITON_INTERPRET=1."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return Host()
    if not torch.cuda.is_available():
        raise WorkerError("no GPU is visible to measure on: replay a landscape instead, or check the driver with nvidia-smi")
    return Cuda()


def race(
    clock: Clock, replays: Mapping[int, Sequence[Call]], calls: int, rounds: int, *, keep: int, beat: Callable[[], None]
) -> dict[int, tuple[float, ...]]:
    """Microseconds a call of each contestant, one sample a round.

    Every replay makes `calls` calls. A contestant may have several, one for each buffer set; then the sets take turns from replay
    to replay, so that none finds its own in the cache. After FIRST_ROUNDS, contestants SLOW times over the best stop, but for
    `keep`. After LONG_S, LEAST_SAMPLES rounds are enough; before SHORT_S up to MOST times as many run. The order turns by one every
    round, so nobody always follows the same one. Before a round's samples enough of the first one's replays run untimed for the
    host to send all of them off, as far as the rounds before can tell. `beat` is called after every round.
    """
    samples: dict[int, list[float]] = {i: [] for i in replays}
    running, spent_us, turn = list(replays), 0.0, 0
    for n in range(MOST * rounds if replays else 0):
        if (n >= LEAST_SAMPLES and spent_us > LONG_S * 1e6) or (n >= rounds and spent_us > SHORT_S * 1e6):
            break
        order = running[n % len(running) :] + running[: n % len(running)]
        sets = len(replays[order[0]])
        lead, *timed = [replays[i][(turn + place) % sets] for place, i in enumerate([order[0], *order])]
        turn += 1 + len(order) + (len(order) % sets == 0)  # else everybody would have the same set in every round
        last = samples[order[0]][-1] * calls if samples[order[0]] else math.inf
        for i, us in zip(order, clock.lap(lead, timed, max(1, math.ceil(HOST_US * len(order) / last)))):
            samples[i].append(us / calls)
            spent_us += us
        if n + 1 == FIRST_ROUNDS:
            limit = SLOW * min(min(taken) for taken in samples.values())
            running = [i for i in running if i == keep or min(samples[i]) <= limit]
        beat()
    return {i: tuple(taken) for i, taken in samples.items()}


def refuse_capture() -> None:
    """PatuneError if the caller is capturing a CUDA graph: a tuning run would become part of it, or break it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise PatuneError("tuning was started inside a CUDA graph capture: tune before the capture begins")
