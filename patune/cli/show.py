"""`patune show`: the tuned table."""

import json
from pathlib import Path

import click

from . import tables
from .options import GPU, as_json, database
from .plan import KERNELS


@click.command(short_help="Print the tuned table.")
@click.option("--kernel", type=click.Choice(KERNELS), help="Only this kernel's.")
@click.option("--gpu", type=GPU, help="Only this GPU's.")
@database(must_exist=True)
@as_json
def command(kernel: str | None, gpu: str | None, db: Path | None, as_json: bool) -> None:
    """Print the table that a lookup sees: yours, over the one that ships with patune."""
    keys = tables.by_key(tables.entries(db, kernel=kernel, gpu=gpu))
    if as_json:
        click.echo(json.dumps({"keys": keys}, indent=2))
    elif keys:
        from .report import print_tables

        print_tables(keys)
    else:
        click.echo("Nothing is tuned for that: `patune run` does it.")
