"""A real PostgreSQL of its own, on loopback, from Debian's package."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian does not put them on the PATH


def missing() -> str:
    """Why there is none to start, else nothing."""
    if not PROGRAMS:
        return "PostgreSQL is not installed: apt-get install postgresql"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed: pip install 'patune[test]'"
    return ""


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a fresh server that is gone afterwards. It refuses to run as root, so it runs as nobody then."""
    folder = Path(tempfile.mkdtemp(prefix="patune-pg-"))
    run = {"env": {"LC_ALL": "C", "TZ": "UTC", "HOME": str(folder)}, "stdout": subprocess.DEVNULL, "check": True, "timeout": 60}
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        run |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    bin_folder, data, port = PROGRAMS[-1], folder / "data", _free_port()
    subprocess.run([bin_folder / "initdb", "-D", data, "-U", "patune", "-A", "trust", "-E", "UTF8", "--no-sync"], **run)
    control = [bin_folder / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-l", folder / "log", "-o", f"-p {port} -k {folder} -h 127.0.0.1 -F", "start"], **run)
    try:
        yield f"postgresql+psycopg://patune@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **run)
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
