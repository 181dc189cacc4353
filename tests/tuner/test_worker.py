"""How many calls a sample is of."""

from dataclasses import replace

import pytest
import torch

from patune.tuner.timing import Host
from patune.tuner.worker import _Bench
from patune.workload import Workload
from tests.tuner.templates import KEY, LONG, TOY, config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in this process, interpreted")


class Counting(Host):
    """Notes how many calls each graph makes, and how many replays are timed."""

    def __init__(self):
        self.captured, self.timed = [], 0

    def capture(self, calls):
        self.captured.append(len(calls))
        return super().capture(calls)

    def lap(self, lead, replays):
        self.timed += len(replays)
        return [100.0 for _ in replays]


@pytest.mark.parametrize(("template", "captured", "us"), [(TOY, [2, 2], 50.0), (LONG, [1, 1, 1, 1], 100.0)])
def test_a_sample_is_of_all_sets_or_of_one_where_calls_are_long(template, captured, us):
    """Two configs, two sets: a graph each with both, or one a set; a time is always that of one call."""
    clock, reports = Counting(), []
    bench = _Bench(clock, type("Pipe", (), {"send": staticmethod(reports.append)}))
    bench.measure(replace(KEY, kernel=template.name), Workload(1, 64), {0: config(16), 1: config(32)}, 3)
    assert clock.captured == captured
    assert clock.timed == 2 * 3
    assert reports[-1] == ("raced", {0: (us,) * 3, 1: (us,) * 3})
