"""`patune doctor`: what is installed, what is tuned, and what is wrong with it."""

import json
import platform
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..cachedb import landscape, lookup
from ..cachedb.file import SCHEMA_VERSION, database_path
from ..cachedb.match import Entry
from ..errors import DatabaseError
from ..workload import Key
from . import tables, usage
from .options import as_json, database
from .plan import KERNELS
from .source import shipped_landscapes


@click.command(short_help="Check GPUs, database and tables.")
@database(must_exist=False)
@as_json
def command(db: Path | None, as_json: bool) -> None:
    """Check the installation, the GPUs, the database and the tables. Exit status 1 if the database is broken."""
    report = _examine(db or database_path())
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if report["database"]["problem"]:
        click.get_current_context().exit(1)


def _examine(path: Path) -> dict[str, Any]:
    import torch
    import triton

    driver, listed = _nvidia_smi()
    database = _database(path)
    with warnings.catch_warnings(action="ignore"):  # `database` has told why
        entries = lookup.load(path).entries
    usable = _gpus(entries)
    return {
        "versions": {
            "patune": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "driver": driver,
        },
        "gpus": usable,
        "gpus_without_torch": [] if usable else listed,
        "database": database,
        "stale": _stale(entries, triton.__version__),
        "shipped": {
            "tables": [
                {"file": path.name, "configs": len(lookup.read(path, shipped=True))}
                for path in sorted(lookup.SHIPPED_TABLES.glob("*.db"))
            ],
            "landscapes": [_landscape(path) for path in shipped_landscapes()],
        },
    }


def _gpus(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The GPUs that torch can use, and what is known of each."""
    import torch

    from ..kernels.device import cuda_device

    found, busy = [], usage.busy_gpus()
    for index in range(torch.cuda.device_count()):
        device = cuda_device(index)
        recorded = landscape.shipped(device.name or "")
        configs = sum(entry["gpu"] == device.name for entry in entries)
        found.append({**device._asdict(), "configs": configs, "landscape": recorded.name if recorded else None})
        found[-1]["busy"] = busy.get(index)  # with what; None if it is idle
    return found


def _database(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(path), "bytes": None, "schema": None, "counts": None, "problem": None}
    try:
        if tables.readable(path).exists():
            from ..cachedb.store import Store

            with Store.open(path) as store:
                found |= {"bytes": path.stat().st_size, "schema": SCHEMA_VERSION, "counts": store.counts()}
    except DatabaseError as error:
        found["problem"] = str(error)
    return found


def _stale(entries: Sequence[Entry], triton_version: str) -> list[dict[str, Any]]:
    """The keys with configs that come from another version of the kernel or of Triton, and how many these are."""
    from ..kernels.registry import template

    groups: dict[Key, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry["kernel"] in KERNELS:
            groups[tables.key_of(entry)].append(entry)
    stale = []
    for key, group in groups.items():
        kernel = sum(entry["source_hash"] != template(key.kernel).source_hash for entry in group)
        triton = sum(entry["triton"] != triton_version for entry in group)
        if kernel or triton:
            stale.append({"key": asdict(key), "configs": len(group), "other_kernel": kernel, "other_triton": triton})
    return stale


def _landscape(path: Path) -> dict[str, Any]:
    recorded = landscape.load(path)
    return {"file": path.name, "gpu": recorded.environment.gpu, "recorded": recorded.recorded, "keys": len(recorded.keys())}


def _nvidia_smi() -> tuple[str | None, list[str]]:
    """The driver's version and the GPUs that it sees, whether torch can use them or not."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, []
    rows = [line.split(", ", 1) for line in lines]
    return (rows[0][0] if rows else None), [row[1] for row in rows]


def _print(report: dict[str, Any]) -> None:
    from .report import title

    click.echo(", ".join(f"{name} {version or 'none'}" for name, version in report["versions"].items()))
    for gpu in report["gpus"]:
        known = f"{gpu['configs']} configs, landscape {gpu['landscape'] or 'none'}"
        click.echo(f"GPU: {gpu['name']}, {gpu['sm_count']} SMs, compute capability {gpu['capability']}: {known}")
        if gpu["busy"]:
            click.echo(f"GPU: {gpu['name']} is busy, {gpu['busy']}: `patune run` leaves it out, or its times are unsteady")
    if not report["gpus"]:
        click.echo("GPU: none visible to torch, `patune run` replays")
    for name in report["gpus_without_torch"]:
        click.echo(f"GPU: {name} is here but torch cannot use it, install a CUDA build of torch that fits the driver")
    _print_database(report["database"])
    for table in report["shipped"]["tables"]:
        click.echo(f"shipped: {table['file']}, {table['configs']} configs")
    for recorded in report["shipped"]["landscapes"]:
        click.echo(f"shipped: {recorded['file']}, {recorded['keys']} keys on {recorded['gpu']}, {recorded['recorded'][:10]}")
    for part in report["stale"]:
        counts = f"{part['other_kernel']} of another kernel version, {part['other_triton']} of another triton"
        click.echo(f"stale: {title(Key(**part['key']))}: of {part['configs']} configs {counts}")
    if report["stale"]:
        click.echo("Stale configs are still served; re-race them with `patune run`.")


def _print_database(database: dict[str, Any]) -> None:
    if database["problem"]:
        click.echo(f"database: broken, {database['problem']}")
    elif database["counts"] is None:
        click.echo(f"database: {database['path']} is not there yet, `patune run` makes it")
    else:
        counts = ", ".join(f"{name} {number}" for name, number in database["counts"].items())
        size = f"{database['bytes'] / 1e3:.0f} kB"
        click.echo(f"database: {database['path']}, {size}, schema {database['schema']}: {counts}")
