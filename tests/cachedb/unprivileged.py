"""Act on files that may not be written, as a user for whom that holds: root may write anywhere."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patune.errors import PatuneError

NOBODY = 65534


def as_nobody(
    make: Callable[[Path], Any],
    act: Callable[[Path], Any],
    folder_mode: int = 0o555,
    file_mode: int = 0o444,
) -> Any:
    """What `act(folder)` returns or raises in a process that may not write what `make(folder)` has made."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        make(folder)
        for path in folder.iterdir():
            path.chmod(file_mode)
        folder.chmod(folder_mode)
        context = multiprocessing.get_context("fork")  # what is imported stays readable
        results, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(act, folder, sender))
        process.start()
        sender.close()
        outcome = results.recv()
        process.join()
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _child(act: Callable[[Path], Any], folder: Path, sender: Any) -> None:
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        sender.send(act(folder))
    except (PatuneError, OSError) as error:
        sender.send(error)
