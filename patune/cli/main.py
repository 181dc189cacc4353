"""The `patune` command. Nothing heavier than click is loaded before a command needs it."""

import importlib
from typing import Any

import click

from .. import __version__
from ..errors import PatuneError

COMMANDS = ("run", "show", "lookup", "export", "db", "doctor")


class Commands(click.Group):
    """One module of this package a command, by the same name. What fails on purpose is one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name}", __package__).command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            click.echo(f"patune: error: {' '.join(error.format_message().split())}{hint}", err=True)
            ctx.exit(error.exit_code)
        except PatuneError as error:
            click.echo(f"patune: error: {error}", err=True)
            ctx.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo("patune: interrupted, what was measured is kept", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="patune", message="%(prog)s %(version)s")
def main() -> None:
    """Tune Triton paged attention for a GPU, keep the table, take it anywhere.

    Exit status: 0 done, 1 something failed (what it had is kept), 2 the command was wrong.
    """
