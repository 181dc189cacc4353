"""Making a landscape: the measured trials of a database, one per config, as the file that searches are replayed against.

A workload is in it with all of its valid configs or not at all.
"""

from pathlib import Path

from ..cachedb import landscape
from ..cachedb.landscape import Recording
from ..cachedb.store import Store
from ..cachedb.trial import Environment, Trial
from ..errors import PatuneError
from ..kernels.registry import template
from ..workload import Key, Workload
from .space import point_of, valid_points


def record(store: Store, path: Path, commit: str) -> list[str]:
    """Write what `patune run --trials all` measured with today's kernels on one GPU; returns a line for each workload that is left
    out because a valid config of it has no trial.

    PatuneError if no workload is complete, or if there are several GPUs or versions.
    """
    tried = store.tried()
    environments = {environment for _, _, environment in tried}
    if len(environments) != 1:
        raise PatuneError(
            f"a landscape is of one GPU and one set of versions, {store.path} has {len(environments)}: {_names(environments)}"
        )
    environment = environments.pop()
    recordings, left_out = [], []
    for key, workload, _ in tried:
        recording, missing = _recording(store, key, workload, environment)
        if missing:
            total = len(recording.trials) + missing
            left_out.append(f"{key.kernel} {workload}: {missing} of {total} configs have no trial with this kernel")
        else:
            recordings.append(recording)
    if not recordings:
        raise PatuneError(f"no workload is complete, run --trials all first: {left_out[0]}")
    recorded = max(trial.when for r in recordings for trial in r.trials)
    landscape.write(path, environment, recordings, recorded=recorded, commit=commit)
    return left_out


def _recording(store: Store, key: Key, workload: Workload, environment: Environment) -> tuple[Recording, int]:
    """What was measured of a workload, and how many of its configs were not."""
    kernel = template(key.kernel)
    default = kernel.default(key, workload)
    wanted = {point_of(config, kernel.tunables) for config in [default, *valid_points(kernel, key, workload)]}
    trials: dict[tuple[int, ...], Trial] = {}
    for trial in store.trials(key, workload, source_hash=kernel.source_hash, triton=environment.triton, mode="measured"):
        point = point_of(trial.config, kernel.tunables)
        if point in wanted and (point not in trials or len(trial.samples_us) > len(trials[point].samples_us)):
            trials[point] = trial
    recording = Recording(key, workload, kernel.source_hash, kernel.tunables, default, list(trials.values()))
    return recording, len(wanted) - len(trials)


def _names(environments: set[Environment]) -> str:
    return ", ".join(sorted(f"{e.gpu} (triton {e.triton}, torch {e.torch})" for e in environments)) or "none"
