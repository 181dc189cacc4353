import os
import subprocess
import sys

import click
import pytest

from patune import __version__
from patune.cli.main import COMMANDS, main

HEAVY = ("torch", "triton", "optuna", "sqlite_utils", "rich", "numpy")


def python(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line_loads_nothing_heavy_before_a_command_runs():
    code = "import sys, patune.cli.main as m; [m.main.get_command(None, c) for c in m.COMMANDS]; print(*sys.modules)"
    loaded = python("-c", code).stdout.split()
    assert "patune.cli.run" in loaded
    assert not set(HEAVY) & set(loaded)


def test_python_dash_m_is_the_command():
    result = python("-m", "patune", "--version")
    assert (result.returncode, result.stdout) == (0, f"patune {__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_has_help_or_speaks_for_itself(name, patune):
    result = patune(name, "--help")
    assert result.exit_code == 0
    command = main.get_command(click.Context(main), name)
    assert command.short_help
    silent = {p.name for p in command.params if isinstance(p, click.Option) and not p.help}
    assert silent <= {"kernel", "head_dim", "q_heads", "kv_heads", "dtype"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tune"], "No such command 'tune'. (see patune --help)"),
        (["run"], "Missing option '--gpu'. Choose from: auto, a100, l40s, h100,"),
        (["run", "--gpu", "h1000"], "'h1000' is not one of 'auto', 'a100', 'l40s', 'h100',"),
        (["show", "--gpu", "h1000"], "'h1000' is not one of 'a100', 'l40s', 'h100',"),
        (
            ["run", "--gpu", "h100", "--kernel", "decoder"],
            "kernel 'decoder' is unknown: use one of decode, decode_hopper, prefill, prefill_hopper,",
        ),
        (["show", "--speed"], "No such option"),
    ],
)
def test_a_wrong_command_is_one_line_that_names_the_word_and_exit_status_2(args, message, capfd):
    env = {**os.environ, "COLUMNS": "80"}
    result = subprocess.run(
        [sys.executable, "-m", "patune", *args], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("patune: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
