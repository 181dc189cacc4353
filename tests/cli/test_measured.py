"""`patune run` measuring, in processes of its own, with Triton's interpreter in the place of a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from patune.cachedb import lookup
from patune.cachedb.store import Store

PROGRAM = Path(__file__).with_name("with_gpu.py")
TINY = ("--kernel", "append", "--head-dim", "16", "--q-heads", "1", "--kv-heads", "1")
ONE = ("--batch-size", "2", "--kv-len", "40")


def start(db: Path, *args: str, gpus: int = 1) -> subprocess.Popen:
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd()), "GPUS": str(gpus)}
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
        spent = document["time"]
        assert spent.keys() == {"seconds", "measuring_share", "compilers_s", "tensors_s", "checks_s", "races_s"}
        assert 0 < spent["tensors_s"] + spent["checks_s"] + spent["races_s"] < spent["seconds"]
        assert f"{spent['seconds']:.1f} s" in stderr and f"checks {spent['checks_s']:.1f} s" in stderr
        (row,) = document["keys"][0]["workloads"]
        assert row.keys() == {"workload", "config", "us", "default_us", "evaluations"}
        assert row["evaluations"] == 3
        with Store.open(db) as store:
            return store.counts()["trials"]

    assert trials_after_a_run() == 3 + 3  # the search, then the last race
    assert trials_after_a_run() == 3 + 3 + 3  # the last race alone
    assert [entry["mode"] for entry in lookup.load(db).entries] == ["measured"]


def test_kill_9_loses_the_race_that_ran_and_the_next_run_goes_on(db):
    """Every race that was over before is in the database, which is sound; the next run measures the rest and nothing twice."""
    process = start(db, *ONE, "--trials", "5", "-v")
    raced = (line for line in process.stderr if " raced " in line)
    next(raced), next(raced)  # the search is over and stored, the last race is over and about to be
    process.kill()
    process.communicate(timeout=60)
    with Store.open(db) as store:
        ((key, workload, _),) = store.tried()
        kept = store.trials(key, workload)
        assert store.problems() == []
    assert len(kept) >= 5
    process = start(db, *ONE, "--trials", "8", "--json")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    (row,) = json.loads(stdout)["keys"][0]["workloads"]
    assert row["evaluations"] == 8
    with Store.open(db) as store:
        trials = store.trials(key, workload)
    assert trials[: len(kept)] == kept
    configs = lambda some: {tuple(trial.config.items()) for trial in some}
    fresh = trials[len(kept) :][:3]
    assert len(configs(fresh)) == 3 and not configs(fresh) & configs(kept)


def test_two_devices_share_a_run(db):
    """Two measuring processes, each told its device, and one table."""
    process = start(db, *ONE, "--trials", "all", "--json", "-v", "--devices", "0,1", gpus=2)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stderr.startswith("measuring on 2 x NVIDIA H100 80GB HBM3\n")
    assert "device 0 raced" in stderr and "device 1 raced" in stderr
    (row,) = json.loads(stdout)["keys"][0]["workloads"]
    assert row["evaluations"] == 9


def test_a_budget_is_wall_clock_time(db):
    """Loading torch, starting processes and all; what is left out is said."""
    began = time.monotonic()
    process = start(db, "--trials", "all", "--budget", "12s", "--json")
    stdout, stderr = process.communicate(timeout=300)
    took_s = time.monotonic() - began
    assert process.returncode == 0, stderr
    assert took_s < 12 + 3  # Python's own start, and its end
    rows = json.loads(stdout)["keys"][0]["workloads"]
    assert "the budget ended before" in stderr or len(rows) == 8


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
