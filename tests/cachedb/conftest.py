import pytest

from patune.cachedb import landscape, lookup


@pytest.fixture(autouse=True)
def shipped_folder(tmp_path, monkeypatch):
    """An empty folder in the place of the tables that ship with patune, and no user's database."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(lookup, "SHIPPED_TABLES", folder)
    monkeypatch.setattr(landscape, "SHIPPED_TABLES", folder)
    monkeypatch.setenv("PATUNE_DB", str(tmp_path / "none.db"))
    lookup.reload()
    yield folder
    lookup.reload()
