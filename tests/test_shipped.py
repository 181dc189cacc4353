"""What ships with patune: measured on the GPU it says, complete, and runnable there."""

import statistics
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from compile_configs import compile_all

from patune.cachedb import landscape, lookup
from patune.cachedb.file import SHIPPED_TABLES
from patune.cli import gpus
from patune.kernels.registry import template
from patune.tuner.compile import SHARED_BYTES
from patune.tuner.space import point_of, valid_points, variant
from patune.workload import Key, Workload

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from transfer import losses, table_of

TABLES = sorted(SHIPPED_TABLES.glob("*.db"))
LANDSCAPES = sorted(SHIPPED_TABLES.glob(f"*{landscape.SUFFIX}"))
ENTRIES = [entry for table in TABLES for entry in lookup.read(table, shipped=True)]


def key_of(entry):
    return Key(**{field.name: entry[field.name] for field in fields(Key)})


def workload_of(entry):
    return Workload(**{field.name: entry[field.name] for field in fields(Workload)})


def test_every_shipped_config_compiles_for_its_gpu_within_its_memory():
    """Compiled here, where there is no GPU; one workload and one GPU stand for all that share a compiled variant."""
    shared = lambda e: (e["capability"], replace(key_of(e), gpu="", sm_count=0))
    variants = {(shared(e), variant(template(e["kernel"]), e["config"])): e for e in ENTRIES}
    jobs = [[e["capability"], asdict(key_of(e)), asdict(workload_of(e)), e["config"]] for e in variants.values()]
    wrong = {}
    for job, build in zip(jobs, compile_all(jobs), strict=True):
        fits = 0 < build["registers"] <= 255 and build["shared_bytes"] <= SHARED_BYTES[job[0]]
        if build["status"] != "ok" or not fits:
            wrong[str(job)] = build
    assert len(jobs) > 20
    assert not wrong


def test_every_table_ships_with_its_landscape():
    assert TABLES
    assert [path.stem for path in TABLES] == [path.name.removesuffix(landscape.SUFFIX) for path in LANDSCAPES]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_shipped_config_was_measured_by_today_s_kernel_and_is_no_slower_than_the_default(path):
    entries = lookup.read(path, shipped=True)
    assert entries
    for entry in entries:
        assert entry["mode"] == "measured"
        assert entry["source_hash"] == template(entry["kernel"]).source_hash
        assert gpus.is_a(entry["gpu"], path.stem)
        assert entry["default_us"] is None or entry["us"] <= entry["default_us"]


@pytest.mark.parametrize("path", LANDSCAPES, ids=lambda path: path.name)
def test_a_shipped_landscape_is_whole_and_of_today_s_kernels(path):
    """Every valid config of every workload has a trial: a replay never meets a hole."""
    recorded = landscape.load(path)
    assert gpus.is_a(recorded.environment.gpu, path.name.removesuffix(landscape.SUFFIX))
    for key in list(recorded.keys()):
        kernel = template(key.kernel)
        assert recorded.source_hash(key) == kernel.source_hash
        assert set(recorded.tunables(key)) == set(kernel.tunables)  # a value may be new that no valid config of this key has
        for workload in recorded.workloads(key):
            wanted = {point_of(c, kernel.tunables) for c in [kernel.default(key, workload), *valid_points(kernel, key, workload)]}
            assert wanted <= set(recorded.trials(key, workload))  # and what was the default then


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_shipped_table_takes_what_was_fastest_on_its_gpu(path):
    """Templates and configs, by its landscape; within 1% over all calls, which is the noise of a race."""
    found = list(losses(table_of(path), landscape.load(path.with_name(path.stem + landscape.SUFFIX))))
    assert all(loss.us for loss in found)
    assert statistics.geometric_mean(loss.us / loss.best_us for loss in found) < 1.01


@pytest.mark.parametrize("path", LANDSCAPES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("kernel", "head_dim", "page_size", "group"),
    [
        ("decode", 128, 16, 4),
        ("decode", 128, 64, 4),
        ("decode", 64, 16, 8),
        ("decode", 128, 16, 8),
        ("prefill", 128, 16, 4),
        ("decode", 256, 32, 2),
        ("decode", 128, 16, 1),
        ("decode_hopper", 128, 16, 4),
        ("prefill", 64, 16, 8),
        ("prefill_hopper", 128, 16, 4),
    ],
)
def test_a_shipped_landscape_spans_serving(path, kernel, head_dim, page_size, group):
    """A dozen workloads a key, from batch 1 to 256 and 1k to 128k tokens, uniform and ragged."""
    recorded = landscape.load(path)
    wanted = (kernel, head_dim, page_size, group, "bfloat16")
    (key,) = [k for k in recorded.keys() if (k.kernel, k.head_dim, k.page_size, k.q_heads_per_kv, k.kv_dtype) == wanted]
    workloads = recorded.workloads(key)
    assert len(workloads) >= 12
    assert {w.batch_size for w in workloads} >= {1, 256}
    assert min(w.kv_len for w in workloads) <= 1024 and max(w.kv_len for w in workloads) == 131072
    assert {w.ragged for w in workloads} == {False, True}
