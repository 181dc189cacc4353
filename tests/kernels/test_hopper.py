"""The template "prefill_hopper" without a GPU: what it compiles to for sm_90, which calls it takes, how TMA addresses a cache."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.jit import JITFunction

from patune.cachedb import lookup
from patune.kernels import config, prefill_hopper, prefill_hopper_jit
from patune.kernels.cache import paged_cache
from patune.tuner.compile import SHARED_BYTES

# head_dim, page_size, BLOCK_N, num_stages, schedule, issue. Not head_dim 64 in turns: Triton 3.7 spills a register an item there.
BUILDS = [(64, 16, 128, 4, 1, 1), (128, 16, 128, 3, 1, 2), (128, 16, 128, 3, 1, 1), (128, 256, 64, 4, 2, 1), (256, 32, 64, 2, 1, 2)]


def build(head_dim: int, page_size: int, block_n: int, stages: int, schedule: int, issue: int) -> dict:
    """What hopper_builds.py finds, in a process that has no TRITON_INTERPRET."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).parents[1] / "hopper_builds.py"
    values = json.dumps(dict(BLOCK_N=block_n, num_stages=stages, schedule=schedule, issue=issue))
    command = [sys.executable, program, str(head_dim), str(page_size), values]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_kernel_compiles_to_what_it_was_written_as():
    """No spill, registers moved from the producer to the consumers, no wgmma serialised, every tile in whole boxes."""
    with ThreadPoolExecutor(2) as threads:
        built = list(threads.map(lambda values: build(*values), BUILDS))
    for (head_dim, page_size, block_n, *_), found in zip(BUILDS, built, strict=True):
        assert found["spill_bytes"] == [0, 0]
        assert found["serialized"] == []
        assert {prefill_hopper.PRODUCER_REGISTERS, prefill_hopper.CONSUMER_REGISTERS} <= set(found["registers"])
        assert found["shared_bytes"] <= SHARED_BYTES["9.0"]
        # Scores and output in each group: the last tile, the masked loop, the loop without a mask.
        assert found["wgmma"] == 2 * 3 * (head_dim // 16 + block_n // 16)
        messages = head_dim // 64  # a box: a swizzled row is 128 bytes
        # The compiler may copy the loop over tiles for the first one, never drop a box.
        assert found["boxes"] >= (2 * (block_n // min(block_n, page_size)) + 2) * messages


def test_the_hash_covers_all_device_code():
    """A change in any device function makes recorded results stale."""
    functions = {id(x) for x in vars(prefill_hopper_jit).values() if isinstance(x, JITFunction)}
    assert functions <= {id(x) for x in prefill_hopper.JIT_FUNCTIONS}


@given(
    st.sampled_from(["HND", "NHD"]), st.booleans(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16]),
    st.sampled_from([0, 8, 64]), st.booleans(),
)  # fmt: skip
def test_a_cache_as_a_matrix_has_every_token_where_the_cache_has_it(layout, pair, pages, heads, page_size, padding, sliced):
    """Element (page, head, token, 0) has the same address by the cache's strides and by rows and columns, or there is no matrix."""
    inner = (heads, page_size) if layout == "HND" else (page_size, heads)
    kv = torch.empty(pages, 2, *inner, 64 + padding)[..., :64]
    kv = kv[:, :, :1] if sliced else kv
    cache = paged_cache(kv[:, 0], kv[:, 1], layout) if pair else paged_cache(kv, None, layout)
    for x, strides in ((cache.k, cache.k_strides), (cache.v, cache.v_strides)):
        found = prefill_hopper.matrix(x, strides, cache)
        if found is None:
            assert padding or sliced
            continue
        for page in range(pages):
            for head in range(cache.kv_heads):
                for token in range(cache.page_size):
                    row = page * found.page_rows + head * found.head_rows + token
                    column = head * found.head_columns
                    assert row < found.rows and column + 64 <= found.columns
                    assert row * strides[2] + column == page * strides[0] + head * strides[1] + token * strides[2]


def served(capability="9.0", q=None, head_dim=128, page_size=16, dtype=torch.bfloat16, kv_dtype=None, **extras) -> bool:
    kv = torch.zeros(2, 2, 2, page_size, head_dim, dtype=kv_dtype or dtype)
    q = torch.zeros(3, 8, head_dim, dtype=dtype) if q is None else q
    return prefill_hopper.serves(capability, q, paged_cache(kv, None, "HND"), torch.empty_like(q), **extras)


def test_the_kernel_takes_what_it_can_do_and_leaves_the_rest_to_the_plain_one():
    for head_dim in (64, 128, 256):
        for page_size in (8, 16, 32, 64, 128, 256):
            assert served(head_dim=head_dim, page_size=page_size)
    assert served(dtype=torch.float16)
    assert not served("8.0") and not served("10.0") and not served(None)
    assert not served(head_dim=80) and not served(head_dim=512) and not served(page_size=4) and not served(page_size=48)
    assert not served(dtype=torch.float32) and not served(kv_dtype=torch.float8_e4m3fn)
    one = torch.ones(1)
    for name, value in dict(window=7, soft_cap=5.0, sinks=one, k_scale=one, v_scale=one).items():
        assert not served(**{name: value})
    assert served(q=torch.zeros(3, 16, 128, dtype=torch.bfloat16)[:, :8])  # strided over tokens
    assert not served(q=torch.zeros(3, 8, 256, dtype=torch.bfloat16)[..., ::2])  # and within a head


@pytest.mark.parametrize(("plain_us", "hopper_us", "wanted"), [(5.0, 6.0, "prefill"), (6.0, 5.0, "prefill_hopper")])
def test_the_kernel_that_was_faster_on_the_workload_is_taken(plain_us, hopper_us, wanted):
    """Where only one was measured, or on another workload, the one for the GPU is."""
    query = dict(
        head_dim=128, page_size=16, q_heads_per_kv=4, q_dtype="bfloat16", kv_dtype="bfloat16", features="", sm_count=132,
        device_name="NVIDIA H100 80GB HBM3", capability="9.0", batch_size=1, kv_len=512, q_len=512, kv_heads=8, ragged=False,
    )  # fmt: skip
    queries = [query | dict(kernel="prefill_hopper"), query | dict(kernel="prefill")]
    measured = query | dict(gpu=query["device_name"], when="", triton="", torch="", driver="", source_hash="", mode="measured")
    plain = measured | dict(kernel="prefill", us=plain_us, config=dict(BLOCK_M=64))
    hopper = measured | dict(kernel="prefill_hopper", us=hopper_us, config=dict(BLOCK_N=64))

    def chosen(*entries):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lookup, "table", lambda: lookup.Table(entries))
            return config.find_either(*queries)[0]

    assert chosen(plain, hopper) == wanted
    assert chosen(plain) == chosen() == chosen(plain, hopper | dict(kv_len=2048)) == "prefill_hopper"
