"""tools/mixed.py compares a mixed batch with parts that compute the same, each measured alone."""

import sys
from pathlib import Path

import pytest
import torch

from patune.tuner.timing import clock
from patune.workload import Key

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import mixed

KEY = Key("mixed", "", 132, 64, 16, 4)
MIX = mixed.Mix(((5, 5), (20, 40)), (33, 1, 17), kv_heads=2)


def test_the_parts_of_a_mix_alone_give_what_the_whole_gives():
    """Of every set of tensors."""
    batch = mixed.Batch(KEY, MIX, clock().device)
    assert batch.sets == mixed.MAX_SETS  # tiny: as many as there may be
    for r in (0, 1):
        whole = batch.whole(r)
        torch.testing.assert_close(batch.placed_whole(r), whole, rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([batch.prefill(r), batch.decode(r)]), whole, rtol=1e-2, atol=1e-2)


def test_a_cost_is_the_whole_s_time_over_that_of_its_parts(monkeypatch):
    monkeypatch.setattr(mixed, "MAX_SETS", 2)
    monkeypatch.setattr(mixed, "HOST_CALLS", 1)
    found = mixed.cost(clock(), MIX, KEY, rounds=2)
    us = found["us"]
    assert set(us) == {"whole", "placed_whole", "append", "prefill", "decode"} and min(us.values()) > 0
    assert found["host_us"] > 0
    assert found["over_parts"]["whole"] == pytest.approx(us["whole"] / (us["append"] + us["prefill"] + us["decode"]))


def test_a_whole_that_is_not_its_parts_is_no_measurement(monkeypatch):
    monkeypatch.setattr(mixed, "MAX_SETS", 2)
    monkeypatch.setattr(mixed.Batch, "decode", lambda self, r: self.q[r][self.rows :])
    with pytest.raises(SystemExit, match="the whole is off its parts by"):
        mixed.cost(clock(), MIX, KEY)
