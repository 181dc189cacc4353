"""Where a device's time goes is counted once, and the start of a run is left out of the share that it measures."""

from types import SimpleNamespace

import pytest

from patune.tuner import phases
from patune.tuner.phases import Phases, measuring_share


@pytest.fixture
def at(monkeypatch):
    """Sets the clock."""
    now = [0.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def go(seconds):
        now[0] = seconds

    return go


def entered(at, *steps):
    device = Phases()
    for second, phase in steps:
        at(second)
        device.enter(phase)
    return device


def test_a_phase_lasts_until_the_next_and_what_is_between_races_is_nobodys(at):
    device = entered(at, (1, "compilers"), (3, "checks"), (4, "races"), (6, None), (10, "checks"), (11, None))
    assert [device.seconds(phase) for phase in phases.PHASES] == [2, 0, 2, 2]
    assert [device.seconds("races", since) for since in (0, 5, 7)] == [2, 1, 0]


def test_the_share_is_of_all_devices_time_after_the_start(at):
    """Two devices, 20 s of which 5 count: one checks and races in all of them, the other waits for 4 of its 5."""
    busy = entered(at, (100, "compilers"), (112, "checks"), (117, "races"), (120, None))
    waiting = entered(at, (100, "tensors"), (119, "races"), (120, None))
    assert measuring_share([busy], 100, 120) == 1
    assert measuring_share([busy, waiting], 100, 120) == pytest.approx((5 + 1) / 10)
    assert measuring_share([busy], 100, 115) is None
