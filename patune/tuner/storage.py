"""Optuna's storages by the text of `--storage`."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file

from ..errors import PatuneError, UsageError

HEARTBEAT_S = 30  # a worker of a database says so often that it lives
GRACE_S = 120  # and is taken for dead after so long without
CONNECT_S = 30

KINDS = "a database such as postgresql+psycopg://user@host/name or mysql+pymysql://..., grpc://host:port, or a journal file"


def connect(url: str) -> BaseStorage:
    """The storage that `url` names: a database that SQLAlchemy reaches, Optuna's gRPC proxy, or the path of a journal file.

    UsageError or PatuneError if it cannot be had, with the way out.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats and gRPC are
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # `shared` beats for itself
    scheme, found, place = url.partition("://")
    if not found:
        return _journal(Path(url))
    if scheme == "grpc":
        return _grpc(place)
    if scheme.startswith("sqlite"):
        raise UsageError("--storage: SQLite hands the same work to two workers, use the path of a journal file in its place")
    return _database(url)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A storage that is lost in the middle of a run is one line."""
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        lost = _first_line(error.__cause__ or error)
        raise PatuneError(f"--storage: lost, what was measured is in --db: {lost}") from error


def _database(url: str) -> BaseStorage:

    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    try:
        database = optuna.storages.RDBStorage(
            url, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S, heartbeat_stale_trial_callback=retry
        )
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None) or "its Python driver"
        raise PatuneError(f"--storage: that database needs {driver}, pip install it") from error
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise UsageError(f"--storage: {url.partition(':')[0]}:// is none, give {KINDS}") from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise PatuneError(f"--storage: {_first_line(error)}: see that it runs, and that the user may make tables in it") from error
    return optuna.storages.get_storage(database)  # with its cache


def _grpc(place: str) -> BaseStorage:
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--storage: grpc://{place} is no grpc://host:port")
    try:
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=CONNECT_S)
    except ImportError as error:
        raise PatuneError("--storage: grpc:// needs grpcio and protobuf, pip install them") from error
    except Exception as error:
        start = "optuna.storages.run_grpc_proxy_server starts one"
        raise PatuneError(f"--storage: no proxy answers at {place}, {start}") from error
    return proxy


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise PatuneError(f"--storage: {path} cannot be written ({error.strerror}): give the path of a journal file") from error


def _mend(path: Path) -> None:
    """Cut off a line that a crash left half written: the next one would be appended to it and the file be lost."""
    if not path.exists():
        return
    with get_lock_file(JournalFileSymlinkLock(str(path))), path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
