"""The server that processes are forked from, in a program of its own."""

import os
import subprocess
import sys

PROGRAM = """
import os, signal, sys
from multiprocessing import forkserver

from patune.tuner import server

if __name__ == "__main__":
    server.start()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)
    process = server.context().Process(target=print, args=("forked",))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_ctrl_c_while_it_loads_is_not_its_own(tmp_path):
    """A terminal sends it to every process of the run; the server goes on and says nothing."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "forked\n", "")
