from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from patune.cachedb import landscape, lookup
from patune.cli import source
from patune.cli.main import main

from .recording import record


@pytest.fixture(autouse=True)
def visible(monkeypatch) -> list[str]:
    """The names of the GPUs that `patune run` sees: none, unless a test adds some."""
    names: list[str] = []
    monkeypatch.setattr(source, "visible_gpus", lambda: names)
    return names


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch) -> Path:
    """An empty folder in the place of the tables that ship with patune."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(lookup, "SHIPPED_TABLES", folder)
    monkeypatch.setattr(landscape, "SHIPPED_TABLES", folder)
    return folder


@pytest.fixture
def recorded(tmp_path) -> str:
    """A landscape file of append on an H100."""
    return str(record(tmp_path / "recorded.gz"))


@pytest.fixture
def db(tmp_path) -> Path:
    return tmp_path / "tuned.db"


@pytest.fixture
def patune() -> Callable[..., Result]:
    """Run a command line in this process; a failure that is no clean exit is raised."""

    def run(*args: object) -> Result:
        lookup.reload()
        return CliRunner(catch_exceptions=False).invoke(main, [str(arg) for arg in args])

    return run


@pytest.fixture
def tuned(patune, recorded, db) -> Path:
    """A database with the table that the landscape gives."""
    assert patune("run", "--gpu", "h100", "--replay", recorded, "--db", db).exit_code == 0
    return db
