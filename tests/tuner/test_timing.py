"""A race times its contestants in turn, stops the slow ones, and never the one it is told to keep."""

import subprocess
import sys

import pytest

from patune.cachedb.trial import Trial
from patune.errors import PatuneError
from patune.tuner import timing
from patune.tuner.accept import replaces


class Recorder:
    """A clock on which contestant n takes us[n] microseconds, and that remembers who ran, on which of its sets."""

    def __init__(self, us, sets=1):
        self.us, self.laps, self.ran, self.lead_us = us, [], [], []
        self.replays = {i: [lambda i=i, r=r: (i, r) for r in range(sets)] for i in us}

    def lap(self, lead, replays, leads=1):
        ran = [replay() for replay in replays]
        self.ran += [lead(), *ran]
        self.laps.append([i for i, _ in ran])
        self.lead_us.append(leads * self.us[ran[0][0]])
        return [self.us[i] for i, _ in ran]


@pytest.fixture(autouse=True)
def no_race_is_short(request, monkeypatch):
    """Nobody's time here is a real one; what is said of short races has a test of its own."""
    if "short_race" not in request.node.name:
        monkeypatch.setattr(timing, "SHORT_S", 0.0)


def race(us, **options):
    clock, beats = Recorder(us), []
    samples = timing.race(clock, clock.replays, 2, 7, keep=0, beat=lambda: beats.append(1), **options)
    return samples, clock.laps, len(beats)


def test_slow_contestants_stop_after_two_rounds():
    """Over a tenth more than the best time is the end after two rounds, which are kept; the reference stays however slow it is."""
    samples, laps, beats = race({0: 90.0, 1: 10.0, 2: 10.9, 3: 11.1})
    assert samples == {0: (45.0,) * 7, 1: (5.0,) * 7, 2: (5.45,) * 7, 3: (5.55,) * 2}
    assert [len(order) for order in laps] == [4, 4, 3, 3, 3, 3, 3]
    assert beats == 7


@pytest.mark.parametrize(("us", "rounds"), [(0.8e5, 7), (1.1e5, 5), (9e5, 5)])
def test_a_long_race_ends_when_it_can_decide(us, rounds):
    """After a second of GPU time no more rounds run than the acceptance asks for, and never fewer."""
    samples, _, _ = race({0: us, 1: us})
    assert samples == {0: (us / 2,) * rounds, 1: (us / 2,) * rounds}
    trials = [Trial({}, "ok", tuple(x * factor for x in samples[0])) for factor in (0.9, 1.0)]
    assert replaces(*trials)


@pytest.mark.parametrize(("us", "rounds"), [(20.0, 28), (1e3, 13), (1e4, 7)])
def test_a_short_race_goes_on_for_25_ms_or_four_times_its_rounds(us, rounds):
    """All contestants have as many samples, so they still are pairs."""
    samples, _, beats = race({0: us, 1: us})
    assert samples == {0: (us / 2,) * rounds, 1: (us / 2,) * rounds}
    assert beats == rounds


def test_order_turns():
    """Nobody runs after the same contestant in every round, as the first does after the last."""
    _, laps, _ = race({0: 10.0, 1: 10.0, 2: 10.0})
    assert {order[0] for order in laps} == {0, 1, 2}


@pytest.mark.parametrize("contestants", range(1, 7))
@pytest.mark.parametrize("sets", [2, 3])
def test_no_timed_replay_follows_one_of_the_same_set(contestants, sets):
    """Where sets are replayed one by one, what is timed finds another set in the cache, and nobody has one set to itself."""
    clock = Recorder(dict.fromkeys(range(contestants), 10.0), sets)
    timing.race(clock, clock.replays, 1, 7, keep=0, beat=lambda: None)
    timed = [n for n in range(len(clock.ran)) if n % (contestants + 1)]  # the lead of every lap is not
    assert all(clock.ran[n][1] != clock.ran[n - 1][1] for n in timed)
    if contestants > 1:
        assert all(len({clock.ran[n][1] for n in timed if clock.ran[n][0] == i}) > 1 for i in range(contestants))


@pytest.mark.parametrize("us", [20.0, 100.0, 5000.0])
def test_no_sample_waits_for_the_host(us):
    """From the second round on what runs untimed is long enough to send all samples off, and by at most one replay too long."""
    clock = Recorder(dict.fromkeys(range(16), us))
    timing.race(clock, clock.replays, 2, 7, keep=0, beat=lambda: None)
    assert clock.lead_us[0] == us
    assert all(0 <= lead - 16 * timing.HOST_US < us or lead == us > 16 * timing.HOST_US for lead in clock.lead_us[1:])


def test_nothing_to_race():
    """If every config of a batch is wrong there is no race and no error."""
    assert race({}) == ({}, [], 0)


def test_host_clock_times_calls():
    """Without a GPU a replay makes all its calls, once each, and takes some time."""
    made, clock = [], timing.Host()
    replay = clock.capture([lambda: made.append(1), lambda: made.append(2)])
    assert made == []
    assert all(us > 0 for us in clock.lap(replay, [replay, replay]))
    assert made == [1, 2, 1, 2]


def test_tuning_inside_a_capture_is_refused(monkeypatch):
    """Starting a tuning run while a CUDA graph is being captured is an error that says so."""
    import torch

    timing.refuse_capture()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(PatuneError, match="inside a CUDA graph capture"):
        timing.refuse_capture()


def test_imports_are_light():
    """Importing the tuner loads no torch, triton, optuna or rich: the command line stays quick."""
    code = (
        "import sys, patune.tuner.session, patune.tuner.gpu, patune.tuner.replay\n"
        "print({'torch', 'triton', 'optuna', 'rich'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
