"""When a config is faster than another: only if their paired samples say so beyond chance."""

import logging
import math
import statistics
from collections.abc import Sequence

from ..cachedb.trial import Trial

log = logging.getLogger(__name__)

LEAST_SAMPLES = 5
# Student's t for a two-sided 99 % interval by degrees of freedom; between two entries the larger one holds.
T_99 = {
    4: 4.604,
    5: 4.032,
    6: 3.707,
    7: 3.499,
    8: 3.355,
    9: 3.250,
    10: 3.169,
    12: 3.055,
    14: 2.977,
    19: 2.861,
    29: 2.756,
}


def faster(candidate_us: Sequence[float], incumbent_us: Sequence[float]) -> bool:
    """Whether the mean log ratio of samples of the same rounds is below 0 with its whole 99 % confidence interval."""
    n = min(len(candidate_us), len(incumbent_us))
    if n < LEAST_SAMPLES:
        return False
    ratios = [math.log(a / b) for a, b in zip(candidate_us, incumbent_us)]  # the shorter one stopped early
    half = T_99[max(freedom for freedom in T_99 if freedom < n)] * statistics.stdev(ratios) / math.sqrt(n)
    mean = statistics.fmean(ratios)
    log.debug("mean log ratio %+.4f ± %.4f over %d rounds", mean, half, n)
    return mean + half < 0


def replaces(candidate: Trial, incumbent: Trial) -> bool:
    """Whether the candidate may take the incumbent's place. What is not right never may, and loses it to what is."""
    if candidate.status != "ok" or not candidate.samples_us:
        return False
    return incumbent.status != "ok" or faster(candidate.samples_us, incumbent.samples_us)
