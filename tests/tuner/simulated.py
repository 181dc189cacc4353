"""Devices whose races take recorded time on a clock that nobody waits for: for tests of schedules and budgets."""

import heapq
from dataclasses import replace

from patune.errors import WorkerError
from patune.tuner.worker import CASES

COLD_BYTES, MOST_SETS = 160e6, 40  # as patune.kernels.problem has them
CHECK_S = 0.01  # a config: its check and its graph
TENSORS_S = 0.5  # the tensors of another workload


class Simulated:
    """A Fleet over runners that answer at once. A race costs what its samples say, its checks, and tensors where they are new.

    A device runs one race at a time, in the order in which its lanes ask. `waits_s` passes between asking and being ready for the
    device: compilers, decisions.
    """

    def __init__(self, runners, broken=None, lanes=1, waits_s=0.0):
        self.runners, self.names = runners, [str(i) for i in range(len(runners))]
        self.lanes, self.waits_s = [*range(len(runners))] * lanes, waits_s
        self.broken = broken or (lambda device, workload: False)
        self.time, self.waiting = 0.0, []
        self.kept = [[] for _ in runners]  # what each device has tensors of, the last used last
        self.busy_s, self.free_at = [0.0] * len(runners), [0.0] * len(runners)
        self.log = []  # (device, workload, start, end)
        self.asked = {}  # lane -> (device, workload) of its race

    def now(self):
        return self.time

    def submit(self, lane, call):
        device = self.lanes[lane]
        runner = _Watched(self.runners[device])
        race = call(runner)
        trials = [race.reference, *race.trials]
        cost = sum(sum(trial.samples_us) * sets(*runner.of) * 1e-6 + CHECK_S for trial in trials)
        cost += TENSORS_S * (runner.of not in self.kept[device])
        self.kept[device] = [*(of for of in self.kept[device] if of != runner.of), runner.of][-CASES:]
        self.busy_s[device] += cost
        start = max(self.time + self.waits_s, self.free_at[device])
        self.free_at[device] = end = start + cost
        self.log.append((device, runner.of[1], start, end))
        assert (device, runner.of) not in self.asked.values(), "two lanes of a device are on one workload"
        self.asked[lane] = device, runner.of
        outcome = WorkerError("planted") if self.broken(device, runner.of[1]) else replace(race, held_s=cost)
        heapq.heappush(self.waiting, (end, lane, outcome))

    def wait(self, until):
        if until is not None and self.waiting[0][0] > until:
            self.time = until
            return None
        self.time, lane, outcome = heapq.heappop(self.waiting)
        del self.asked[lane]
        return lane, outcome

    def close(self):
        pass


class _Watched:
    """Notes which workload was measured."""

    def __init__(self, runner):
        self.runner, self.of = runner, None

    def measure(self, key, workload, *args):
        self.of = key, workload
        return self.runner.measure(key, workload, *args)


def sets(key, workload):
    """Buffer sets that a replay goes through."""
    kv_bytes = 4 * sum(workload.kv_lens()) * workload.kv_heads * key.head_dim
    return max(2, min(MOST_SETS, round(COLD_BYTES / kv_bytes)))
