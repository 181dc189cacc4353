"""How many calls a sample is of."""

from dataclasses import replace

import pytest
import torch

from patune.tuner import timing
from patune.tuner.timing import Host
from patune.tuner.worker import _Bench
from patune.workload import Workload
from tests.tuner.templates import KEY, LONG, TOY, config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in this process, interpreted")


class Counting(Host):
    """Notes how many calls each graph makes, and how many replays are timed; one call takes `call_us`."""

    def __init__(self, call_us):
        self.call_us, self.captured, self.timed = call_us, [], 0

    def capture(self, calls):
        self.captured.append(len(calls))
        return len(calls)

    def lap(self, lead, replays, leads=1):
        self.timed += len(replays)
        return [calls * self.call_us for calls in replays]


@pytest.mark.parametrize(
    ("template", "call_us", "captured", "timed"),
    [(TOY, 50.0, [2, 2, 2], 3 + 6), (TOY, 4.0, [2, 26, 26], 3 + 6), (LONG, 4.0, [1, 1, 1, 1], 6)],
)
def test_a_sample_is_of_all_sets_until_it_is_long_enough_or_of_one_where_calls_are_long(
    template, call_us, captured, timed, monkeypatch
):
    """Two configs, two sets: a graph each with both, as often as it takes, or one a set; a time is always that of one call."""
    monkeypatch.setattr(timing, "SHORT_S", 0.0)  # these samples are of no time at all
    clock, reports = Counting(call_us), []
    bench = _Bench(clock, type("Pipe", (), {"send": staticmethod(reports.append)}))
    bench.measure(replace(KEY, kernel=template.name), Workload(1, 64), {0: config(16), 1: config(32)}, 3)
    assert clock.captured == captured
    assert clock.timed == timed
    assert reports[-1] == ("raced", {0: (call_us,) * 3, 1: (call_us,) * 3})
