"""`patune run` measuring, in processes of its own, with Triton's interpreter in the place of a GPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from patune.cachedb import lookup
from patune.cachedb.store import Store

PROGRAM = Path(__file__).with_name("with_gpu.py")
TINY = ("--kernel", "append", "--head-dim", "16", "--q-heads", "1", "--kv-heads", "1")
ONE = ("--batch-size", "2", "--kv-len", "40")


def start(db: Path, *args: str) -> subprocess.Popen:
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, str(PROGRAM), "run", "--gpu", "h100", "--db", str(db), *TINY, *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_run_starts_from_what_the_first_one_left(db):
    def trials_after_a_run():
        process = start(db, *ONE, "--json", "--trials", "3")
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert stderr.startswith("measuring on NVIDIA H100 80GB HBM3\n")
        document = json.loads(stdout)
        assert document["mode"] == "measured"
        (row,) = document["keys"][0]["workloads"]
        assert row.keys() == {"workload", "config", "us", "default_us", "evaluations"}
        assert row["evaluations"] == 3
        with Store.open(db) as store:
            return store.counts()["trials"]

    assert trials_after_a_run() == 3 + 3  # the search, then the last race
    assert trials_after_a_run() == 3 + 3 + 3  # the last race alone
    assert [entry["mode"] for entry in lookup.load(db).entries] == ["measured"]


def test_ctrl_c_keeps_what_was_measured(db):
    process = start(db, "--trials", "all")
    for line in process.stderr:
        if line.startswith("B1 L1024 h1:"):  # the first workload is done, the others are not
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert stderr.splitlines()[-1] == "patune: interrupted, what was measured is kept"
    assert "Traceback" not in stderr
    assert (1, 1024) in [(e["batch_size"], e["kv_len"]) for e in lookup.load(db).entries]
