"""The points of a search space: which there are, which share a compiled kernel, and which lie close together."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

from ..kernels.template import Template, Values
from ..workload import Key, Workload

Point = tuple[int, ...]  # the values of a config in the order of the template's tunables
Tunables = Mapping[str, Sequence[int]]


def valid_points(template: Template, key: Key, workload: Workload) -> list[dict[str, int]]:
    """Every config that the template's rules allow; neighbours in the list share compiled kernels."""
    names = sorted(template.tunables, key=lambda name: name in template.runtime)
    points = []
    for values in itertools.product(*(template.tunables[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        config = {name: chosen[name] for name in template.tunables}
        if template.invalid(config, key, workload) is None:
            points.append(config)
    return points


def variant(template: Template, config: Values) -> Point:
    """The tunables that are compiled in: configs of equal variants share most or all of their kernels."""
    return tuple(config[name] for name in template.tunables if name not in template.runtime)


def point_of(config: Values, tunables: Tunables) -> Point:
    return tuple(config[name] for name in tunables)


def indices(point: Point, tunables: Tunables) -> Point:
    """Where each value stands among its tunable's values."""
    return tuple(values.index(value) for value, values in zip(point, tunables.values(), strict=True))


def nearest(point: Point, unseen: Iterable[Point], rng: random.Random) -> Point:
    """The least L1 distance from `point`, ties at random. All points are given as indices."""
    best: list[Point] = []
    least = float("inf")
    for other in unseen:
        distance = sum(abs(a - b) for a, b in zip(point, other))
        if distance < least:
            best, least = [], distance
        if distance == least:
            best.append(other)
    return rng.choice(best)
