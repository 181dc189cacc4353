"""The `patune` command. Nothing heavier than click is loaded before a command needs it."""

import importlib
from typing import Any

import click

from .. import __version__
from ..errors import PatuneError

COMMANDS = ("run", "show", "lookup", "export", "doctor")


class Failure(click.ClickException):
    """What ends a command: one line on stderr and an exit status."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_code = exit_status

    def show(self, file: Any = None) -> None:
        click.echo(f"patune: {self.message}", file=file, err=True)


class Commands(click.Group):
    """One module of this package a command, by the same name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name}", __package__).command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PatuneError as error:
            raise Failure(f"error: {error}", error.exit_status) from error
        except KeyboardInterrupt:
            raise Failure("interrupted, what was measured is kept", 1) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="patune", message="%(prog)s %(version)s")
def main() -> None:
    """Tune Triton paged attention for a GPU, keep the table, take it anywhere.

    Exit status: 0 done, 1 something failed (what it had is kept), 2 the command was wrong.
    """
