"""What the kernels' tests share."""

import pytest

from patune.kernels import bound, ops
from patune.kernels.template import Launch


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """The launches that were asked for; none is made."""
    launches: list[Launch] = []
    monkeypatch.setattr(bound, "find", lambda *arguments: None)
    monkeypatch.setattr(ops, "run", lambda asked, tensor: launches.extend(asked))
    return launches
