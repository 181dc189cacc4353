"""`-v`: what the package logs, on stderr."""

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def logged(wanted: bool) -> Iterator[None]:
    """While it is open every decision is a line: seconds since the start, who says it, what."""
    logger = logging.getLogger("patune")
    before = logger.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    if wanted:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        who = record.name.rpartition(".")[2]
        return f"{record.relativeCreated / 1e3:8.2f} s  {who}: {record.getMessage()}"
