"""Making a landscape: the measured trials of a database, one per config, as the file that searches are replayed against."""

from pathlib import Path

from ..cachedb import landscape
from ..cachedb.landscape import Recording
from ..cachedb.store import Store
from ..cachedb.trial import Environment, Trial
from ..errors import PatuneError
from ..kernels.registry import template
from ..workload import Key, Workload
from .space import point_of, valid_points


def record(store: Store, path: Path, commit: str) -> int:
    """Write what `patune run --trials all` measured with today's kernels on one GPU; returns the number of trials.

    PatuneError if there is nothing, if there are several GPUs or versions, or if a valid config of a workload has no trial.
    """
    tried = store.tried()
    environments = {environment for _, _, environment in tried}
    if len(environments) != 1:
        raise PatuneError(
            f"a landscape is of one GPU and one set of versions, {store.path} has {len(environments)}: {_names(environments)}"
        )
    environment = environments.pop()
    recordings = [_recording(store, key, workload, environment) for key, workload, _ in tried]
    recorded = max(trial.when for r in recordings for trial in r.trials)
    landscape.write(path, environment, recordings, recorded=recorded, commit=commit)
    return sum(len(r.trials) for r in recordings)


def _recording(store: Store, key: Key, workload: Workload, environment: Environment) -> Recording:
    kernel = template(key.kernel)
    default = kernel.default(key, workload)
    wanted = {point_of(config, kernel.tunables) for config in [default, *valid_points(kernel, key, workload)]}
    trials: dict[tuple[int, ...], Trial] = {}
    for trial in store.trials(key, workload, source_hash=kernel.source_hash, triton=environment.triton, mode="measured"):
        point = point_of(trial.config, kernel.tunables)
        if point in wanted and (point not in trials or len(trial.samples_us) > len(trials[point].samples_us)):
            trials[point] = trial
    missing = len(wanted) - len(trials)
    if missing:
        raise PatuneError(
            f"{key.kernel} {workload}: {missing} of {len(wanted)} configs have no trial with this kernel; run --trials all first"
        )
    return Recording(key, workload, kernel.source_hash, kernel.tunables, default, list(trials.values()))


def _names(environments: set[Environment]) -> str:
    return ", ".join(sorted(f"{e.gpu} (triton {e.triton}, torch {e.torch})" for e in environments)) or "none"
