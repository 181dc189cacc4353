"""Kernel tests run on the GPU where there is one, else on the CPU through Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
settings.register_profile("patune", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("patune")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def private_database(tmp_path, monkeypatch):
    """No test reads or writes the table of the person who runs it."""
    monkeypatch.setenv("PATUNE_DB", str(tmp_path / "private.db"))
    from patune.cachedb import lookup

    lookup.reload()
    yield
    lookup.reload()
