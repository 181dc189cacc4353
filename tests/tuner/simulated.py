"""Devices whose races take recorded time on a clock that nobody waits for: for tests of schedules and budgets."""

import heapq

from patune.errors import WorkerError

COLD_BYTES, MOST_SETS = 160e6, 40  # as patune.kernels.problem has them
CHECK_S = 0.01  # a config: its check and its graph
TENSORS_S = 0.5  # the tensors of another workload


class Simulated:
    """A Fleet over runners that answer at once. A race costs what its samples say, its checks, and tensors where they are new."""

    def __init__(self, runners, broken=None):
        self.runners, self.names = runners, [str(i) for i in range(len(runners))]
        self.broken = broken or (lambda device, workload: False)
        self.time, self.waiting, self.on = 0.0, [], {}
        self.busy_s = [0.0] * len(runners)
        self.log = []  # (device, workload, start, end)

    def now(self):
        return self.time

    def submit(self, device, call):
        runner = _Watched(self.runners[device])
        race = call(runner)
        trials = [race.reference, *race.trials]
        cost = sum(sum(trial.samples_us) * sets(*runner.of) * 1e-6 + CHECK_S for trial in trials)
        cost += TENSORS_S * (self.on.get(device) != runner.of)
        self.on[device] = runner.of
        self.busy_s[device] += cost
        self.log.append((device, runner.of[1], self.time, self.time + cost))
        outcome = WorkerError("planted") if self.broken(device, runner.of[1]) else race
        heapq.heappush(self.waiting, (self.time + cost, device, outcome))

    def wait(self, until):
        if until is not None and self.waiting[0][0] > until:
            self.time = until
            return None
        self.time, device, outcome = heapq.heappop(self.waiting)
        return device, outcome

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
