"""Real compiles for sm_90 in real processes, on a machine that needs no GPU."""

import itertools
import multiprocessing
from dataclasses import replace

import pytest

from patune.tuner import compile as compiling
from patune.tuner.compile import CompilePool, summary
from patune.workload import Workload
from tests.tuner import templates
from tests.tuner.templates import KEY, config

WORKLOAD = Workload(1, 100)
GOOD = [config(16), config(32), config(64)]


@pytest.fixture(scope="module", autouse=True)
def not_interpreted():
    """The children compile for real even where other tests interpret; the server they are forked from starts here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def pool(not_interpreted):
    pool = CompilePool("9.0", workers=2, timeout_s=40)
    yield pool
    pool.close()


def build(pool, configs, workload=WORKLOAD):
    pool.submit(KEY, workload, configs)
    return [pool.build(KEY, workload, c) for c in configs]


def test_compiles_for_a_gpu_that_is_not_there(pool):
    """A config compiles without a GPU, and what the kernel needs of one is reported."""
    for result in build(pool, GOOD):
        assert (result.status, result.spill_bytes) == ("ok", 0)
        assert result.registers > 0


def test_second_compile_finds_the_first(pool):
    """A kernel that another config or workload needed before is not compiled again."""
    build(pool, GOOD)
    again = build(pool, GOOD, Workload(1, 101))
    assert all(result.status == "ok" and result.seconds < 0.1 for result in again)


def test_workloads_that_share_a_variant_take_turns_with_it_and_others_are_compiled_meanwhile(tmp_path):
    """Else two processes compile one kernel at once, as Triton's cache has it only afterwards."""
    notes, blocks = tmp_path / "notes", (16, 32, 64)
    key, pool = replace(KEY, gpu=str(notes)), CompilePool("9.0", workers=4, timeout_s=40)
    workloads = [Workload(1, kv_len) for kv_len in range(200, 205)]
    try:
        for workload in workloads:
            pool.submit(key, workload, [config(block, templates.NOTED) for block in blocks])
        builds = [pool.build(key, workload, config(block, templates.NOTED)) for workload in workloads for block in blocks]
    finally:
        pool.close()
    assert {b.status for b in builds} == {"ok"}
    spans = [(int(block), float(began), float(ended)) for block, began, ended in map(str.split, notes.read_text().splitlines())]
    assert len(spans) == len(workloads) * len(blocks)
    together = [a[0] == b[0] for a, b in itertools.combinations(spans, 2) if a[1] < b[2] and b[1] < a[2]]
    assert together and not any(together)


def test_broken_config_costs_only_itself(pool):
    """A compile error and a dead compiler are failures of their configs; all others compile."""
    configs = [
        config(16),
        config(32, templates.BREAKS_COMPILER),
        config(32, templates.KILLS_COMPILER),
        config(32),
        config(64),
    ]
    results = build(pool, configs, Workload(1, 102))
    assert [r.status for r in results] == ["ok", "compile_failed", "compile_failed", "ok", "ok"]
    assert "planted" in results[1].message
    assert results[2].message == "the compiler killed its process"


def test_over_budget_is_known_before_it_runs(pool):
    """More shared memory than a block of the target can have is found out by compiling."""
    (result,) = build(pool, [config(64, templates.TOO_BIG)])
    assert result.status == "out_of_resources"
    assert result.shared_bytes > compiling.SHARED_BYTES["9.0"]


def test_hanging_compiler_is_ended():
    """A compile that takes too long fails, and the next one gets a fresh process."""
    pool = CompilePool("9.0", workers=1, timeout_s=10)
    try:
        results = build(pool, [config(16), config(32, templates.HANGS_COMPILER), config(32)])
    finally:
        pool.close()
    assert [r.status for r in results] == ["ok", "compile_failed", "ok"]
    assert results[1].message == "compiling took more than 10 s"


def test_close_ends_busy_children():
    """Closing does not wait for compiles, and no process stays behind."""
    pool = CompilePool("9.0", workers=2, timeout_s=60)
    pool.submit(KEY, WORKLOAD, [config(block, templates.HANGS_COMPILER) for block in (16, 32, 64)])
    children = lambda: [c for c in multiprocessing.active_children() if c.name == "patune-compile"]
    before = len(children())
    pool.close()
    assert len(children()) <= before
    pool._threads.shutdown(wait=True)  # returns at once: nobody waits for a child that is gone


def test_summary_keeps_both_ends_of_a_long_message():
    """An error becomes one line of at most 300 characters with its type and its cause."""
    text = summary(ValueError("first\n" + "x" * 1000 + "\nlast"))
    assert text.startswith("ValueError: first") and text.endswith("last")
    assert len(text) <= 300 and "\n" not in text
