"""A small landscape file whose times are the formula's. For tests only: what ships is measured."""

from patune.cachedb import landscape
from patune.tuner.space import valid_points
from tests.tuner.formula import ENVIRONMENT, KEY, TEMPLATE, WHEN, WORKLOAD, FormulaRunner


def record(path, workloads=(WORKLOAD,), seed=5):
    recordings = []
    for workload in workloads:
        default, runner = TEMPLATE.default(KEY, workload), FormulaRunner(seed=seed)
        trials = [runner.trial(config, workload, 7) for config in valid_points(TEMPLATE, KEY, workload)]
        recordings.append(landscape.Recording(KEY, workload, TEMPLATE.source_hash, dict(TEMPLATE.tunables), default, trials))
    landscape.write(path, ENVIRONMENT, recordings, recorded=WHEN, commit="0" * 40)
    return path
