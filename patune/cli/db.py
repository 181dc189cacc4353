"""`patune db`: look after tuning databases."""

from pathlib import Path

import click

from ..cachedb.file import database_path
from .options import database
from .plan import KERNELS


@click.group(short_help="Check, join or thin out databases.")
def command() -> None:
    """Look after tuning databases."""


@command.command(short_help="Look for damage.")
@database(must_exist=True)
def check(db: Path | None) -> None:
    """Read every page, follow every reference. Exit status 1 if something is wrong."""
    from ..cachedb.store import Store

    path = db or database_path()
    with Store.open(path) as store:
        problems, counts = store.problems(), store.counts()
    for problem in problems:
        click.echo(f"{path}: {problem}")
    if problems:
        click.echo("Keep what is sound: patune db merge --db NEW " + str(path))
        click.get_current_context().exit(1)
    click.echo(f"{path}: sound, " + ", ".join(f"{name} {number}" for name, number in counts.items()))


@command.command(short_help="Join the databases of several workers.")
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@database(must_exist=False)
def merge(sources: tuple[Path, ...], db: Path | None) -> None:
    """Add the trials and configs of SOURCES to the database. No trial is counted twice, and merging again changes nothing.

    Where both have a config for a workload, a measured one goes before a replayed one, then the one of more evaluations,
    then the newer.
    """
    from ..cachedb.merge import merge
    from ..cachedb.store import Store

    path = db or database_path()
    with Store.open(path) as store:
        trials, configs = merge(store, [source for source in sources if source.resolve() != path.resolve()])
    click.echo(f"{path}: {trials} trials added, {configs} configs new or replaced")


@command.command(short_help="Drop trials of older kernels.")
@database(must_exist=True)
def prune(db: Path | None) -> None:
    """Drop the trials of other versions of the kernels. Those that a config comes from stay."""
    from ..cachedb.store import Store
    from ..kernels.registry import template

    path = db or database_path()
    with Store.open(path) as store:
        dropped = store.prune({kernel: template(kernel).source_hash for kernel in KERNELS})
    click.echo(f"{path}: {dropped} trials dropped, {path.stat().st_size / 1e3:.0f} kB left")
