"""`patune export`: the tuned table for another repository, or the landscape that a search can be replayed against."""

import subprocess
from pathlib import Path

import click

from ..cachedb.file import database_path
from ..errors import PatuneError
from . import tables
from .options import GPU, database

FORMS = ["json", "python", "landscape"]


@click.command(short_help="Write the tuned table for another repository.")
@click.option("--to", "form", type=click.Choice(FORMS), required=True, help="A file a key, one module, or all trials.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="PATH", help="A folder for json, else a file.")
@click.option("--gpu", type=GPU, help="Only this GPU's; not for a landscape, which is of one GPU anyway.")
@database(must_exist=True)
def command(form: str, out: Path, gpu: str | None, db: Path | None) -> None:
    """Write the table that a lookup sees, in a form that needs no patune.

    json: one file per key, named and shaped like vLLM's tuned-config files. python: one module of the standard library
    alone, whose get_best_config() answers as patune's does. landscape: every trial of this database, for `patune run
    --replay`; it takes a database that `patune run --trials all` filled.
    """
    try:
        written = _landscape(out, db) if form == "landscape" else _table(form, out, gpu, db)
    except OSError as error:
        raise PatuneError(f"--out: {out} cannot be written ({error.strerror})") from error
    for path in written:
        click.echo(path)


def _table(form: str, out: Path, gpu: str | None, db: Path | None) -> list[Path]:
    from ..cachedb.export import to_json, to_python

    entries = tables.entries(db, gpu=gpu)
    if not entries:
        raise PatuneError(f"nothing is tuned{f' for {gpu}' if gpu else ''}, so there is nothing to export: `patune run` tunes")
    if form == "json":
        return to_json(entries, out)
    to_python(entries, out)
    return [out]


def _landscape(out: Path, db: Path | None) -> list[Path]:
    from ..cachedb.store import Store
    from ..tuner.record import record

    with Store.open(db or database_path()) as store:
        for line in record(store, out, _commit()):
            click.echo(f"left out: {line}", err=True)
    return [out]


def _commit() -> str:
    """The commit of the patune that runs, where it runs from a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
