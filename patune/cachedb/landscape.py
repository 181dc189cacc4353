"""The recorded landscape of one GPU: every trial of its keys, in one file that a search can be replayed against.

The file is gzipped JSON and its bytes depend on nothing but its content. A trial is a flat list: the values of its
tunables in the order of `tunables`, the index of its status in STATUSES, its error, its samples in microseconds.
"""

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import PatuneError
from ..workload import Key, Workload
from .file import SHIPPED_TABLES
from .trial import STATUSES, Environment, Trial

FORMAT = 1
SUFFIX = ".landscape.json.gz"

Point = tuple[int, ...]  # the values of a config in the order of the key's tunables


@dataclass(frozen=True, slots=True)
class Recording:
    """All trials of one workload of one key."""

    key: Key
    workload: Workload
    source_hash: str
    tunables: Mapping[str, Sequence[int]]  # the search space that the trials come from
    default: dict[str, int]  # the config that an untuned call uses
    trials: Sequence[Trial]


class Landscape:
    """A landscape file in memory."""

    def __init__(
        self,
        environment: Environment,
        recorded: str,
        commit: str,
        recordings: Iterable[Recording],
    ):
        self.environment = environment
        self.recorded = recorded  # ISO date and time, UTC
        self.commit = commit  # of patune, when it was recorded
        self._recordings = {(r.key, r.workload): r for r in recordings}
        self._trials: dict[tuple[Key, Workload], dict[Point, Trial]] = {}

    def recordings(self) -> list[Recording]:
        return list(self._recordings.values())

    def keys(self) -> list[Key]:
        return sorted({key for key, _ in self._recordings})

    def workloads(self, key: Key) -> list[Workload]:
        return sorted(workload for k, workload in self._recordings if k == key)

    def tunables(self, key: Key) -> dict[str, tuple[int, ...]]:
        """The search space that was recorded; its order is that of the points in `trials`."""
        recording = self._recordings[key, self.workloads(key)[0]]
        return {name: tuple(values) for name, values in recording.tunables.items()}

    def source_hash(self, key: Key) -> str:
        return self._recordings[key, self.workloads(key)[0]].source_hash

    def trials(self, key: Key, workload: Workload) -> dict[Point, Trial]:
        """Every recorded trial by its values in the order of `tunables(key)`."""
        at = key, workload
        if at not in self._trials:
            names = tuple(self._recordings[at].tunables)
            self._trials[at] = {tuple(t.config[n] for n in names): t for t in self._recordings[at].trials}
        return self._trials[at]

    def default(self, key: Key, workload: Workload) -> dict[str, int]:
        """The config that an untuned call used when this was recorded."""
        return self._recordings[key, workload].default

    def optimum(self, key: Key, workload: Workload) -> Trial:
        """The fastest right trial."""
        right = [t for t in self.trials(key, workload).values() if t.status == "ok" and t.samples_us]
        if not right:
            raise PatuneError(f"the landscape has no right trial for {key.kernel} {workload}")
        return min(right, key=lambda t: (t.us, tuple(t.config.values())))


def write(
    path: Path,
    environment: Environment,
    recordings: Iterable[Recording],
    *,
    recorded: str,
    commit: str,
) -> None:
    """Write the landscape of one GPU. Samples keep 4 significant digits, messages are left out."""
    by_key: dict[Key, list[Recording]] = {}
    for recording in sorted(recordings, key=lambda r: (r.key, r.workload)):
        by_key.setdefault(recording.key, []).append(recording)
    document = {
        "format": FORMAT,
        "environment": asdict(environment),
        "recorded": recorded,
        "commit": commit,
        "keys": [_key_document(key, group) for key, group in by_key.items()],
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def load(path: Path) -> Landscape:
    """Read a landscape file; PatuneError names the file if it is missing, damaged or of another format."""
    try:
        document = json.loads(gzip.decompress(Path(path).read_bytes()))
        if document["format"] != FORMAT:
            raise PatuneError(f"{path} has landscape format {document['format']}, this patune reads {FORMAT}")
        environment = Environment(**document["environment"])
        recordings = [r for key in document["keys"] for r in _recordings(key, document["recorded"])]
        return Landscape(environment, document["recorded"], document["commit"], recordings)
    except OSError as error:
        raise PatuneError(f"cannot read the landscape {path}: {error.strerror or error}") from error
    except (EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise PatuneError(f"{path} is not a patune landscape: {error}") from error


def shipped(gpu: str) -> Path | None:
    """The landscape that ships with patune for a GPU, by its short name ("h100") or its device name."""
    path = SHIPPED_TABLES / f"{gpu.lower()}{SUFFIX}"
    if path.exists():
        return path
    for path in sorted(SHIPPED_TABLES.glob(f"*{SUFFIX}")):
        if load(path).environment.gpu == gpu:
            return path
    return None


def _key_document(key: Key, group: Sequence[Recording]) -> dict[str, Any]:
    first = group[0]
    if any((r.source_hash, list(r.tunables.items())) != (first.source_hash, list(first.tunables.items())) for r in group):
        raise ValueError(f"the recordings of {key} differ in source hash or tunables")
    return {
        "key": asdict(key),
        "source_hash": first.source_hash,
        "tunables": {name: list(values) for name, values in first.tunables.items()},
        "workloads": [
            {
                "workload": asdict(r.workload),
                "default": r.default,
                "trials": sorted(
                    (_row(t, tuple(r.tunables)) for t in r.trials),
                    key=lambda row: row[: len(r.tunables)],
                ),
            }
            for r in group
        ],
    }


def _row(trial: Trial, names: Sequence[str]) -> list[Any]:
    error: float | str | None = trial.error
    if trial.error is not None:
        error = _rounded(trial.error) if math.isfinite(trial.error) else str(trial.error)  # JSON has no infinity
    samples = [_rounded(us) for us in trial.samples_us]
    return [
        *(int(trial.config[n]) for n in names),
        STATUSES.index(trial.status),
        error,
        samples,
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _recordings(document: dict[str, Any], recorded: str) -> Iterator[Recording]:
    key, source_hash = Key(**document["key"]), document["source_hash"]
    tunables = {name: tuple(values) for name, values in document["tunables"].items()}
    for part in document["workloads"]:
        trials = []
        for *values, status, error, samples in part["trials"]:
            trials.append(
                Trial(
                    config=dict(zip(tunables, values, strict=True)),
                    status=STATUSES[status],
                    samples_us=tuple(samples),
                    error=None if error is None else float(error),
                    source_hash=source_hash,
                    when=recorded,
                )
            )
        yield Recording(
            key,
            Workload(**part["workload"]),
            source_hash,
            tunables,
            part["default"],
            trials,
        )
