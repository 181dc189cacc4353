"""How many calls a sample is of, and which tensors stay."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from patune.kernels import registry
from patune.tuner.timing import Host
from patune.tuner.worker import CASES, _Bench
from patune.workload import Workload
from tests.tuner import templates
from tests.tuner.templates import KEY, LONG, TOY, Doubling, config

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
def test_a_sample_is_of_all_sets_until_it_is_long_enough_or_of_one_where_calls_are_long(template, call_us, captured, timed):
    """Two configs, two sets: a graph each with both, as often as it takes, or one a set; a time is always that of one call."""
    clock, reports = Counting(call_us), []
    bench = _Bench(clock, type("Pipe", (), {"send": staticmethod(reports.append)}))
    bench.measure(replace(KEY, kernel=template.name), Workload(1, 64), {0: config(16), 1: config(32)}, 3)
    assert clock.captured == captured
    assert clock.timed == timed
    assert reports[-1] == ("raced", {0: (call_us,) * 3, 1: (call_us,) * 3})


class Room:
    """Memory for the tensors of so many workloads; notes which were made."""

    def __init__(self, monkeypatch, room):
        self.room, self.made, self.alive = room, [], weakref.WeakSet()
        monkeypatch.setattr(registry, "template", lambda name: replace(TOY, problem=self.problem))
        self.reports = []
        self.bench = _Bench(Counting(50.0), type("Pipe", (), {"send": staticmethod(self.reports.append)}))

    def problem(self, key, workload, **options):
        gc.collect()
        if len(self.alive) == self.room:
            raise torch.OutOfMemoryError("planted")
        problem = Numbers(key, workload, **options)
        self.alive.add(problem)
        self.made.append(workload.kv_len)
        return problem

    def measure(self, kv_len, fault=templates.NONE):
        """The last report of a race of one config."""
        self.bench.measure(KEY, Workload(1, kv_len), {0: config(16, fault)}, 3)
        return self.reports[-1][0]


class Numbers(Doubling):
    __hash__ = object.__hash__


def test_workloads_that_take_turns_keep_their_tensors_and_another_one_takes_the_place_of_the_one_used_longest_ago(monkeypatch):
    room = Room(monkeypatch, CASES)
    assert [room.measure(kv_len) for kv_len in (64, 128, 64, 128, 64, 256, 64, 128)] == ["raced"] * 8
    assert room.made == [64, 128, 256, 128]


def test_what_is_kept_gives_way_where_there_is_no_room_for_both(monkeypatch):
    """Only a workload that has no room alone fails."""
    room = Room(monkeypatch, 1)
    assert [room.measure(kv_len) for kv_len in (64, 128, 64)] == ["raced"] * 3
    assert room.made == [64, 128, 64]
    assert Room(monkeypatch, 0).measure(64) == "failed"


def test_no_config_is_out_of_memory_for_what_another_workload_keeps(monkeypatch):
    """It is checked again alone, and has the memory of the GPU."""
    room = Room(monkeypatch, CASES)
    room.measure(64)
    room.measure(128, templates.OUT_OF_MEMORY)
    assert [report[2] for report in room.reports if report[0] == "checked"] == ["ok", "out_of_memory"]
    assert list(room.bench.cases) == [(KEY, Workload(1, 128))]
