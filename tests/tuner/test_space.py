"""The search space is the product of the tunables minus what the rules forbid."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from patune.tuner.space import indices, nearest, point_of, valid_points, variant
from tests.tuner.formula import KEY, TEMPLATE, WORKLOAD

POINTS = valid_points(TEMPLATE, KEY, WORKLOAD)


def test_space_is_the_filtered_product():
    """A config is in the space if and only if no rule forbids it, and it is there once."""
    product = itertools.product(*TEMPLATE.tunables.values())
    allowed = {p for p in product if TEMPLATE.invalid(dict(zip(TEMPLATE.tunables, p)), KEY, WORKLOAD) is None}
    assert sorted(allowed) == sorted(point_of(config, TEMPLATE.tunables) for config in POINTS)
    assert all(list(config) == list(TEMPLATE.tunables) for config in POINTS)


def test_configs_of_one_variant_are_neighbours():
    """Going through the space meets every variant once, so that measuring can follow compiling."""
    runs = [key for key, _ in itertools.groupby(POINTS, lambda config: variant(TEMPLATE, config))]
    assert len(runs) == len(set(runs))
    assert variant(TEMPLATE, {**POINTS[0], "num_splits": 99}) == variant(TEMPLATE, POINTS[0])


@given(st.sampled_from(POINTS), st.sets(st.integers(0, len(POINTS) - 1), min_size=1), st.integers())
def test_nearest_has_the_least_distance_in_steps(config, unseen, seed):
    """No unseen point is fewer steps away than the nearest one; a power of two is one step like any other value."""
    where = [indices(point_of(c, TEMPLATE.tunables), TEMPLATE.tunables) for c in POINTS]
    start = indices(point_of(config, TEMPLATE.tunables), TEMPLATE.tunables)
    candidates = [where[i] for i in unseen]
    found = nearest(start, candidates, random.Random(seed))
    steps = lambda p: sum(abs(a - b) for a, b in zip(p, start))
    assert found in candidates
    assert steps(found) == min(map(steps, candidates))
