"""A search space without kernels and a runner whose times are a formula times noise: for tests of search and decisions."""

import random

from patune.cachedb.trial import Environment, Trial
from patune.kernels.template import Template
from patune.tuner.runner import Race
from patune.workload import Key, Workload

ENVIRONMENT = Environment("NVIDIA H100 80GB HBM3", 132, "9.0", "570.86", "3.6.0", "2.11.0")
KEY = Key("decode", ENVIRONMENT.gpu, ENVIRONMENT.sm_count, 128, 16, 4)
WORKLOAD = Workload(8, 4096)
WHEN = "2026-11-22T12:00:00+00:00"

TEMPLATE = Template(
    name="decode",
    tunables={
        "BLOCK_N": (16, 32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_splits": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    },
    runtime=frozenset({"num_splits"}),
    invalid=lambda c, key, workload: "too few keys a warp" if c["num_warps"] * 8 > c["BLOCK_N"] else None,
    default=lambda key, workload: {"BLOCK_N": 32, "num_warps": 2, "num_splits": 4},
    problem=lambda *_, **__: None,
    jit_functions=(),
)
OPTIMUM = {"BLOCK_N": 64, "num_warps": 4, "num_splits": 12}


def formula_us(config, workload=WORKLOAD):
    """A smooth bowl around OPTIMUM, 10 us deep down."""
    distance = sum(abs(config[name].bit_length() - OPTIMUM[name].bit_length()) for name in OPTIMUM)
    return 10.0 * (1 + 0.1 * distance + 0.004 * abs(config["num_splits"] - OPTIMUM["num_splits"]))


class FormulaRunner:
    mode = "measured"
    environment = ENVIRONMENT

    def __init__(self, us=formula_us, noise=0.01, seed=0):
        self.us, self.noise, self.rng = us, noise, random.Random(seed)
        self.batches, self.prepared = [], []

    def prepare(self, key, workload, points):
        self.prepared.append((workload, len(points)))

    def measure(self, key, workload, points, reference, rounds=7):
        self.batches.append([dict(reference), *map(dict, points)])
        trials = [self.trial(config, workload, rounds) for config in [reference, *points]]
        return Race(trials[1:], trials[0])

    def trial(self, config, workload, rounds):
        us = self.us(config, workload)
        if us is None:
            return Trial(dict(config), "wrong_answer", error=0.5, source_hash=TEMPLATE.source_hash, when=WHEN)
        samples = tuple(us * (1 + self.rng.gauss(0, self.noise)) for _ in range(rounds))
        return Trial(dict(config), "ok", samples, 1e-3, source_hash=TEMPLATE.source_hash, when=WHEN)

    def optimum_us(self, key, workload):
        return None

    def close(self):
        pass
