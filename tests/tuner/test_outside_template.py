"""A kernel outside patune is tuned as its own are: examples/rmsnorm.py, by the path of its file, a module or an entry point."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from compile_configs import compile_all

import patune
from patune.cachedb import lookup
from patune.errors import UsageError
from patune.kernels.registry import template
from patune.kernels.template import Template

ROOT = Path(__file__).parents[2]
NAME = "examples/rmsnorm.py:TEMPLATE"
KEY = {"kernel": NAME, "gpu": "any", "sm_count": 1, "head_dim": 4096, "page_size": 1, "q_heads_per_kv": 1}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_it_is_tuned_checked_stored_and_found_by_its_own_lookup(tmp_path, monkeypatch):
    """From the command line to the config of a call, with the measuring process and Triton's interpreter."""
    db = tmp_path / "a.db"
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "GPUS": "1"}
    command = [sys.executable, "tests/cli/with_gpu.py", "run", "--gpu", "auto", "--kernel", NAME, "--head-dim", "100",
               "--page-size", "1", "--q-heads", "1", "--kv-heads", "1", "--batch-size", "2", "--kv-len", "1", "--trials", "3",
               "--db", str(db), "--json"]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "configs: 3 ok" in done.stderr
    (row,) = json.loads(done.stdout)["keys"][0]["workloads"]
    assert row["evaluations"] == 3
    monkeypatch.setenv("PATUNE_DB", str(db))
    lookup.reload()
    config = patune.get_best_config(NAME, head_dim=100, page_size=1, batch_size=2, kv_len=1, kv_heads=1, device_name="interpreter")
    assert (dict(config), config.source) == (row["config"], "measured")


@pytest.mark.parametrize("rows", [1, 9])
def test_its_function_is_right_with_and_without_a_table(rows, device):
    """Against plain torch, with the default where nothing is tuned."""
    import examples.rmsnorm as example

    x, weight = torch.randn(rows, 100, device=device), torch.randn(100, device=device)
    want = torch.nn.functional.rms_norm(x, (100,), weight, example.EPSILON)
    torch.testing.assert_close(example.rms_norm(x, weight), want)
    assert not patune.get_best_config(NAME, head_dim=100, page_size=1)


def test_every_config_compiles_for_a_gpu_that_is_not_here():
    jobs = []
    for fields, workloads in template(NAME).targets:
        jobs += [["9.0", {**KEY, **fields}, {"batch_size": w.batch_size, "kv_len": 1, "kv_heads": 1}, None] for w in workloads]
    assert {build["status"] for build in compile_all(jobs)} == {"ok"}


def test_without_a_shape_its_own_targets_are_tuned():
    from patune.cachedb.trial import Environment
    from patune.cli.plan import Request

    gpu = Environment("NVIDIA H100 80GB HBM3", 132, "9.0", "570.86", "3.6.0", "2.11.0")
    ((key, workloads),) = Request((NAME,), None, None, "bfloat16").measured(gpu).items()
    assert (key.kernel, key.gpu, key.head_dim, key.page_size, key.q_heads_per_kv) == (NAME, gpu.gpu, 4096, 1, 1)
    assert [workload.batch_size for workload in workloads] == [1, 64, 4096]


def test_a_module_and_an_entry_point_name_the_same_template(monkeypatch):
    module = template("examples.rmsnorm:TEMPLATE")
    assert isinstance(module, Template) and module.name == "rmsnorm"
    point = metadata.EntryPoint("rmsnorm", "examples.rmsnorm:TEMPLATE", "patune.templates")
    monkeypatch.setattr("patune.kernels.registry.entry_points", lambda group, name: [point] if name == "rmsnorm" else [])
    assert template("rmsnorm") is module


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "rmsnrom",
            "kernel 'rmsnrom' is unknown: use one of decode, .*, append, 'package.module:TEMPLATE' or",
        ),
        ("examples/none.py:TEMPLATE", "kernel 'examples/none.py:TEMPLATE' cannot be loaded: .*No such file"),
        ("no.such.module:TEMPLATE", "cannot be loaded: No module named 'no'"),
        ("examples/rmsnorm.py:TEMPLAT", "cannot be loaded: .*no attribute 'TEMPLAT'"),
        ("examples/rmsnorm.py:NAME", "is a str, not a patune.kernels.template.Template"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(name, message):
    with pytest.raises(UsageError, match=message):
        template(name)
