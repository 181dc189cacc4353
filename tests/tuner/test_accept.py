"""A config replaces another only if it is faster beyond chance."""

import random

import pytest

from patune.cachedb.trial import Trial
from patune.tuner.accept import faster, replaces


def samples(us, n=7, noise=0.01, seed=0):
    rng = random.Random(seed)
    return tuple(us * (1 + rng.gauss(0, noise)) for _ in range(n))


def test_noise_seldom_wins():
    """Of pairs that are equally fast, hardly any is taken for faster: the interval has 0.5 % on either side."""
    wins = sum(faster(samples(10, seed=s), samples(10, seed=-s - 1)) for s in range(1000))
    assert wins <= 15


@pytest.mark.parametrize("n", [5, 7, 12, 15, 40])
def test_clear_difference_wins(n):
    """5 % at 1 % noise is seen from 5 samples on, and never the other way round."""
    assert faster(samples(9.5, n, seed=1), samples(10, n, seed=2))
    assert not faster(samples(10, n, seed=1), samples(9.5, n, seed=2))


def test_pairing_cancels_what_both_feel():
    """A drift of the GPU's clock in both samples hides no difference between them."""
    drift = [1.0, 1.3, 0.8, 1.1, 0.9, 1.4, 1.0]
    noise = [1.001, 0.999, 1.002, 1.0, 0.998, 1.001, 1.0]
    assert faster([9.9 * d * e for d, e in zip(drift, noise)], [10.0 * d for d in drift])


def test_few_samples_never_win():
    """A contestant that was stopped early proves nothing, however fast it looked."""
    assert not faster((1.0, 1.0), (10.0,) * 7)
    assert not faster((), ())


def test_only_right_configs_replace():
    """What is not right replaces nothing, and anything right replaces it."""
    right, wrong = Trial({}, "ok", samples(10)), Trial({}, "wrong_answer", samples(1))
    assert not replaces(wrong, right)
    assert not replaces(wrong, wrong)
    assert replaces(right, wrong)
    assert replaces(Trial({}, "ok", samples(5)), right)
