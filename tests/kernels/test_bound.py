"""Bound calls: the rule that they rely on, and the tests of bound_calls.py, which need compiled kernels."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import Batch, Case, cases
from torch.utils._python_dispatch import TorchDispatchMode

from patune.kernels import bound, calls, decode_hopper, mixed, prefill_hopper
from patune.kernels.cache import paged_cache


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU: tests/gpu/test_bound.py has the real one")
def test_bound_calls_without_the_interpreter(tmp_path):
    """All of bound_calls.py, in one process that compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PATUNE_DB": str(tmp_path / "private.db"), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "bound_calls.py"]
    done = subprocess.run(program, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


class OnlyScratchAndViews(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.is_view or func is torch.ops.aten.empty.memory_format, f"{func} while launches were built"
        return func(*args, **(kwargs or {}))


@given(cases())
def test_building_the_launches_of_a_decode_allocates_and_takes_views_only(case):
    """Anything else would run on the device at the first call of a key, and never again."""
    batch = Batch(case, "cpu")
    out, lse = batch.nan_like_q(), batch.q.new_empty(batch.q.shape[:2], dtype=torch.float32)
    one, sinks = torch.ones(1), batch.options.get("sinks")
    kv = batch.kv_cache if case.pair else (batch.kv_cache, None)
    for config in ([16, 4, 2, 1], [16, 4, 2, 3]):
        call = calls.decode_call(
            batch.q, *kv, *batch.pages, out, lse, 0.1, case.layout, case.q_lens[0], None, None, case.window, case.soft_cap, sinks,
            one, one, 1.0, False, config,
        )  # fmt: skip
        with OnlyScratchAndViews():
            assert call.build(*call.tensors)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_building_the_launches_for_hopper_allocates_and_takes_views_only(layout, pair, kv_dtype):
    """The same of the other template; a tensor map is made when a kernel is launched."""
    batch = Batch(Case((1, 1), (200, 330), dtype="bfloat16", kv_dtype=kv_dtype, layout=layout, pair=pair), "cpu")
    out, lse = batch.nan_like_q(), batch.q.new_empty(batch.q.shape[:2], dtype=torch.float32)
    cache = paged_cache(*(batch.kv_cache if pair else (batch.kv_cache, None)), layout)
    assert decode_hopper.serves("9.0", batch.q, cache, out)
    scales = dict(sm_scale=0.1, k_scale=torch.ones(1), v_scale=torch.ones(1))
    for num_splits, cluster in ((1, 1), (3, 1), (4, 4)):
        config = dict(BLOCK_N=64, num_stages=3, cluster=cluster, num_splits=num_splits)
        with OnlyScratchAndViews():
            assert decode_hopper.launches(batch.q, cache, *batch.pages, out, lse, config, **scales)


@given(cases(prefill=True))
def test_building_the_launches_of_a_prefill_allocates_and_takes_views_only(case):
    batch = Batch(case, "cpu")
    out, lse = batch.nan_like_q(), batch.q.new_empty(batch.q.shape[:2], dtype=torch.float32)
    one, sinks = torch.ones(1), batch.options.get("sinks")
    kv = batch.kv_cache if case.pair else (batch.kv_cache, None)
    call = calls.prefill_call(
        batch.q, *kv, batch.qo_indptr, *batch.pages, out, lse, 0.1, case.layout, max(case.q_lens), True, case.window, case.soft_cap,
        sinks, one, one, 1.0, [64, 64, 4, 2, 0, 2],
    )  # fmt: skip
    with OnlyScratchAndViews():
        assert call.build(*call.tensors)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("schedule", prefill_hopper.TUNABLES["schedule"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_building_the_launches_of_a_prefill_for_hopper_allocates_and_takes_views_only(layout, schedule, num_splits):
    """A counter of items too is set to 0 by a launch."""
    batch = Batch(Case((5, 300), (200, 330), dtype="bfloat16", layout=layout), "cpu")
    cache, out = paged_cache(batch.kv_cache, None, layout), batch.nan_like_q()
    assert prefill_hopper.serves("9.0", batch.q, cache, out)
    config = dict(BLOCK_N=64, num_stages=4, schedule=schedule, issue=1, num_splits=num_splits)
    options = dict(qo_indptr=batch.qo_indptr, max_q_len=300, sm_scale=0.1)
    with OnlyScratchAndViews():
        launches = prefill_hopper.launches(batch.q, cache, *batch.pages, out, None, config, **options)
    assert len(launches) == 1 + (schedule == prefill_hopper.DYNAMIC) + (num_splits > 1)


@given(cases(prefill=True, dtypes=("bfloat16",)), st.integers(0, 3))
def test_building_the_launches_of_a_mixed_step_allocates_and_takes_views_only(case, num_prefill):
    n = min(num_prefill, len(case.q_lens))
    decodes = len(case.q_lens) - n
    batch = Batch(replace(case, q_lens=(*case.q_lens[:n], *[1] * decodes)), "cpu")
    rows = sum(case.q_lens[:n])
    k = torch.zeros(len(batch.q), case.kv_heads, case.head_dim, dtype=batch.q.dtype)
    kv = batch.kv_cache if case.pair else (batch.kv_cache, None)
    call = mixed.mixed_call(
        batch.q, k, k, *kv, batch.qo_indptr, *batch.pages, None, None, 0.1, case.layout, n, decodes, rows,
        max(case.q_lens), None, case.window, case.soft_cap, batch.options.get("sinks"), torch.ones(1), torch.ones(1), 1.0, 1.0,
    )  # fmt: skip
    with OnlyScratchAndViews():
        assert call.build(*call.tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_the_interpreter_binds_nothing():
    """It has no compiled kernels."""
    batch = Batch(Case((1, 1), (20, 30)), "cpu")
    assert bound.find(batch.q, *batch.pages) is None
