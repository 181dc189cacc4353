"""The table that lookups with a database see, for the commands that read it."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..cachedb import lookup
from ..cachedb.file import database_path
from ..cachedb.match import Entry
from ..errors import DatabaseError
from ..kernels.registry import OF_KERNEL
from ..workload import Key, Workload
from . import gpus

KEY_FIELDS = [field.name for field in fields(Key)]
WORKLOAD_FIELDS = [field.name for field in fields(Workload)]


def readable(db: Path | None) -> Path:
    """The database's path; DatabaseError where a lookup would warn and go on with the shipped tables."""
    path = db or database_path()
    try:
        if path.exists():
            lookup.read(path)
    except OSError as error:
        raise DatabaseError(f"{path} cannot be read ({error.strerror}): give another --db or PATUNE_DB") from error
    return path


def entries(db: Path | None, *, kernel: str | None = None, gpu: str | None = None) -> list[Entry]:
    """The entries of a database over the shipped ones; those of a kernel's templates and of a GPU's short name, where given."""
    return [
        entry
        for entry in lookup.load(readable(db)).entries
        if (kernel is None or entry["kernel"] in OF_KERNEL[kernel]) and (gpu is None or gpus.is_a(entry["gpu"], gpu))
    ]


def key_of(entry: Entry) -> Key:
    return Key(**{name: entry[name] for name in KEY_FIELDS})


def by_key(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The entries as the "keys" of a document, as in `patune run --json` but with all that is known of each."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for entry in entries:
        rest = {name: value for name, value in entry.items() if name not in (*KEY_FIELDS, *WORKLOAD_FIELDS)}
        workload = {name: entry[name] for name in WORKLOAD_FIELDS}
        groups.setdefault(key_of(entry), []).append({"workload": workload, **rest})
    return [{"key": asdict(key), "workloads": rows} for key, rows in groups.items()]
