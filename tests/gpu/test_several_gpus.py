"""One run on two GPUs of a host: both measure, each with its own process, and together they are faster than one."""

import json
import subprocess
import sys
import time

import pytest
import torch

pytestmark = pytest.mark.gpu

WORK = ("run", "--gpu", "auto", "--kernel", "append", "--head-dim", "128", "--q-heads", "32", "--kv-heads", "8", "--trials", "all")


@pytest.fixture(autouse=True)
def two_gpus(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs, and one is visible")


def run(db, *args):
    began = time.monotonic()
    command = [sys.executable, "-m", "patune", *WORK, "--db", str(db), "--json", "-v", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["keys"][0]["workloads"], done.stderr, time.monotonic() - began


def test_both_gpus_measure_and_every_workload_has_its_config(tmp_path):
    rows, log, _ = run(tmp_path / "a.db", "--devices", "0,1")
    assert "device 0 raced" in log and "device 1 raced" in log
    assert len(rows) == 8
    assert all(row["us"] <= 1.02 * row["default_us"] for row in rows)


def test_the_measuring_process_of_device_1_is_on_device_1(tmp_path):
    """Its memory is in use there while it works, and device 0's is not."""
    from patune.cli.usage import busy_gpus
    from patune.tuner.gpu import GpuRunner
    from patune.workload import Key, Workload

    before = busy_gpus()
    if before:
        pytest.skip(f"other programs use the GPUs: {before}")
    (runner,) = GpuRunner.several(["1"])
    try:
        key = Key("decode", runner.environment.gpu, runner.environment.sm_count, 128, 16, 4)
        default = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "num_splits": 4}
        assert runner.measure(key, Workload(64, 8192), [], default).reference.status == "ok"
        assert set(busy_gpus()) == {1}
    finally:
        runner.close()
