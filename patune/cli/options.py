"""Options that several commands share, and the types of their values."""

import re
from pathlib import Path
from typing import Any

import click

from .gpus import GPUS
from .plan import KERNELS

AUTO = "auto"  # the GPU that is here
AT_LEAST_1 = click.IntRange(min=1)
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
FLOATS = ("bfloat16", "float16", "float32")
GPU = click.Choice([*GPUS], case_sensitive=False)
GPU_OR_AUTO = click.Choice([AUTO, *GPUS], case_sensitive=False)


class Duration(click.ParamType):
    """Seconds as 90, 90s, 1.5m or 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value).strip())
        if not found or float(found[1]) == 0:
            self.fail(f"{value!r} is no duration: use seconds, or such as 60s, 5m or 1h", param, ctx)
        return float(found[1]) * SECONDS[found[2]]


class Count(click.ParamType):
    """A number of at least 1, or "all"."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all" or (str(value).isdecimal() and int(value) > 0):
            return value if value == "all" else int(value)
        self.fail(f"{value!r} is no number of configs: use 1 or more, or all", param, ctx)


class Kernel(click.ParamType):
    """One of patune's kernels, "all", or the name of a template outside patune."""

    name = "kernel"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..kernels.registry import template

        if value != "all" and value not in KERNELS:
            template(value)  # says what is wrong with it
        return value


def database(must_exist: bool) -> Any:
    """`--db FILE`; a command that only reads asks for one that exists."""
    return click.option(
        "--db",
        type=click.Path(exists=must_exist, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The tuning database; else $PATUNE_DB, else the one in your data folder.",
    )


as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else there.")
