"""The templates for Hopper without a GPU: what they compile to for sm_90, which calls they take, how TMA addresses a cache."""

import json
import operator
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compile_configs import compile_all
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.jit import JITFunction

from patune.cachedb import lookup
from patune.kernels import calls, cluster_jit, config, decode_hopper, decode_hopper_jit, prefill_hopper, prefill_hopper_jit
from patune.kernels.cache import paged_cache
from patune.kernels.tma import matrix, pool_arguments
from patune.tuner.compile import SHARED_BYTES
from patune.tuner.space import valid_points
from patune.tuner.workloads import standard_workloads
from patune.workload import Key, Workload

RESERVED_BYTES = 1024  # that the driver keeps of each program's shared memory
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
ITEMSIZE = {"bfloat16": 2, E4M3: 1, E5M2: 1}

# head_dim, page_size, BLOCK_N, num_stages, schedule, issue.
BUILDS = [
    (64, 16, 128, 4, 1, 2), (64, 8, 128, 3, 2, 1), (128, 16, 128, 3, 1, 2), (128, 16, 128, 3, 1, 1), (128, 256, 64, 4, 2, 1),
    (256, 32, 64, 2, 1, 2),
]  # fmt: skip


# The same without the last two: new tokens a sequence, of 8 queries a KV head each, the cache's type, cluster. A batch above 32 is
# walked in chunks.
DECODES = [
    (64, 16, 128, 4, 1, "bfloat16", 1), (64, 8, 128, 3, 2, "bfloat16", 1), (64, 64, 64, 6, 2, "bfloat16", 1),
    (128, 16, 64, 3, 1, "bfloat16", 1), (128, 8, 64, 3, 2, "bfloat16", 1), (128, 8, 128, 3, 2, "bfloat16", 1),
    (128, 16, 128, 2, 2, "bfloat16", 1), (128, 256, 64, 6, 1, "bfloat16", 1), (256, 8, 64, 3, 2, "bfloat16", 1),
    (256, 16, 64, 3, 2, "bfloat16", 1), (256, 32, 64, 2, 1, "bfloat16", 1), (64, 16, 256, 3, 1, E5M2, 1),
    (64, 8, 128, 6, 2, E4M3, 1), (128, 8, 128, 3, 2, E5M2, 1), (128, 256, 256, 2, 1, E4M3, 1),
    (256, 8, 64, 2, 2, E4M3, 1), (256, 32, 128, 2, 2, E5M2, 1), (64, 16, 128, 3, 1, "bfloat16", 8),
    (128, 16, 64, 3, 2, "bfloat16", 2), (128, 16, 128, 2, 1, "bfloat16", 8), (256, 16, 64, 2, 2, "bfloat16", 4),
    (128, 16, 128, 3, 1, E4M3, 4),
]  # fmt: skip
CLUSTERED = dict(BLOCK_N=64, num_stages=3, cluster=8, num_splits=8)


def build(
    kernel: str, workload: Workload, head_dim: int, page_size: int, group: int, kv_dtype: str = "bfloat16", **values: int
) -> dict:
    """What hopper_builds.py finds, in a process that has no TRITON_INTERPRET."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).parents[1] / "hopper_builds.py"
    key = dict(kernel=kernel, head_dim=head_dim, page_size=page_size, q_heads_per_kv=group, kv_dtype=kv_dtype)
    command = [sys.executable, program, *map(json.dumps, (key, asdict(workload), values))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_prefill_kernel_compiles_to_what_it_was_written_as():
    """No spill, registers moved from the producer to the consumers, no wgmma serialised, every tile in whole boxes."""

    def of(head_dim, page_size, block_n, stages, schedule, issue):
        values = dict(BLOCK_N=block_n, num_stages=stages, schedule=schedule, issue=issue, num_splits=1)
        return build("prefill_hopper", Workload(4, 4096, 512), head_dim, page_size, 4, **values)

    with ThreadPoolExecutor(2) as threads:
        built = list(threads.map(lambda values: of(*values), BUILDS))
    for (head_dim, page_size, block_n, *_), found in zip(BUILDS, built, strict=True):
        assert found["spill_bytes"] == [0, 0]
        assert found["serialized"] == []
        assert {prefill_hopper.PRODUCER_REGISTERS, prefill_hopper.CONSUMER_REGISTERS} <= set(found["registers"])
        assert found["shared_bytes"] <= SHARED_BYTES["9.0"]
        # Scores and output in each group: the last tile, the masked loop, the loop without a mask.
        assert found["wgmma"] == 2 * 3 * (head_dim // 16 + block_n // 16)
        # One message a box of K or V; of Q, a box a group and 128 bytes of a row. The compiler may copy the loop over tiles for the
        # first one, never drop a box.
        assert found["boxes"] >= 2 * (block_n // min(block_n, page_size)) + 2 * (head_dim // 64)


def test_the_decode_kernel_compiles_to_what_it_was_written_as():
    """No spill that counts, registers moved, every tile in whole boxes, and as many programs an SM as is said.

    In a cluster every warp enters, and the inbox has the size and the place that were reckoned with.
    """

    def of(head_dim, page_size, block_n, stages, q_len, kv_dtype, cluster):
        values = dict(BLOCK_N=block_n, num_stages=stages, cluster=cluster, num_splits=cluster if cluster > 1 else 4)
        return build("decode_hopper", Workload(4 if q_len == 1 else 64, 4096, q_len), head_dim, page_size, 8, kv_dtype, **values)

    with ThreadPoolExecutor(2) as threads:
        built = list(threads.map(lambda values: of(*values), DECODES))
    for (head_dim, page_size, block_n, stages, q_len, kv_dtype, cluster), found in zip(DECODES, built, strict=True):
        # With 16 queries of 256 elements, 3 registers that the loop over tiles reads at most once.
        assert max(found["spill_bytes"]) <= (12 if head_dim == 256 and 8 * q_len > 8 else 0)
        assert decode_hopper.PRODUCER_REGISTERS in found["registers"]
        messages = max(1, head_dim * ITEMSIZE[kv_dtype] // 128)  # a box, as above
        assert found["boxes"] >= 2 * (block_n // min(block_n, page_size)) * messages
        programs = decode_hopper.programs_an_sm(block_n, stages, head_dim, ITEMSIZE[kv_dtype], 8 * q_len, cluster)
        inbox = found["static_shared_bytes"]
        assert inbox == (cluster_jit.inbox_bytes(8 * q_len, head_dim, cluster) if cluster > 1 else 0)
        assert inbox % cluster_jit.ALIGNMENT == 0
        assert found["entered_by"] == (4 if cluster > 1 else 0)  # consumers, producer, and two that idle
        by_shared = decode_hopper.SM_SHARED_BYTES // (found["shared_bytes"] + inbox + RESERVED_BYTES)
        by_registers = decode_hopper.SM_REGISTERS // (found["used_registers"] * found["threads"])
        assert programs == min(by_shared, by_registers)


def rings(head_dim: int, kv_dtype: str, workload: Workload) -> set[tuple[int, int]]:
    """(BLOCK_N, num_stages) of the valid points of a key of decode."""
    key = Key("decode_hopper", "", 132, head_dim, 16, 4, kv_dtype=kv_dtype)
    return {(p["BLOCK_N"], p["num_stages"]) for p in valid_points(decode_hopper.TEMPLATE, key, workload) if p["cluster"] == 1}


@pytest.mark.parametrize("kv_dtype", ITEMSIZE)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_decode_s_rings_leave_room_for_one_or_two_programs_an_sm_and_the_rule_takes_one_of_them(head_dim, kv_dtype):
    """Few rings, so that a tuner can try them all; 256 tokens at a time only of fp8."""
    for workload in standard_workloads("decode", 8):
        found = rings(head_dim, kv_dtype, workload)
        assert len(found) <= 7
        programs = {decode_hopper.programs_an_sm(*ring, head_dim, ITEMSIZE[kv_dtype]) for ring in found}
        assert programs == ({1} if (head_dim, kv_dtype) == (256, "bfloat16") else {1, 2})
        assert (256 in {block_n for block_n, _ in found}) == (kv_dtype != "bfloat16" and head_dim < 256)
        key = Key("decode_hopper", "", 132, head_dim, 16, 4, kv_dtype=kv_dtype)
        default = decode_hopper.TEMPLATE.default(key, workload)
        assert (default["BLOCK_N"], default["num_stages"]) in found


def test_every_ring_of_fp8_compiles_without_spills_to_the_shared_memory_that_is_said():
    """Of the key that is tuned by default. Said is at most a kilobyte more than is used, since barriers are rounded up."""
    key, workload = Key("decode_hopper", "", 132, 128, 16, 4, kv_dtype=E4M3), Workload(8, 8192)
    found = sorted(rings(128, E4M3, workload))
    configs = [dict(BLOCK_N=block_n, num_stages=stages, cluster=1, num_splits=2) for block_n, stages in found]
    for ring, built in zip(found, compile_all([["9.0", asdict(key), asdict(workload), c] for c in configs]), strict=True):
        assert built["status"] == "ok" and built["spill_bytes"] == 0
        assert 0 <= decode_hopper.shared_bytes(*ring, 128, 1) - built["shared_bytes"] - RESERVED_BYTES <= 1024


@pytest.mark.parametrize(
    ("jit", "template"),
    [(prefill_hopper_jit, prefill_hopper), (decode_hopper_jit, decode_hopper), (cluster_jit, decode_hopper)],
)
def test_the_hash_covers_all_device_code(jit, template):
    """A change in any device function makes recorded results stale."""
    functions = {id(x) for x in vars(jit).values() if isinstance(x, JITFunction)}
    assert functions <= {id(x) for x in template.JIT_FUNCTIONS}


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
        found = matrix(x, strides, cache)
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


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 8), (128, 256), (256, 32)])
def test_a_box_of_one_message_has_what_a_plain_box_has(layout, head_dim, page_size):
    """Element [i, j, r, c] of one at [0, 0, row, column] is element [8 i + r, 64 j + c] of the other at [row, column]."""
    pages, heads = 3, 2
    inner = (heads, page_size) if layout == "HND" else (page_size, heads)
    pool = torch.arange(pages * 2 * heads * page_size * head_dim, dtype=torch.int32).view(pages, 2, *inner, head_dim)
    cache = paged_cache(pool, None, layout)
    plain, boxed = (pool_arguments(cache, 64, one_message=one) for one in (False, True))
    for name, x in (("k", cache.k), ("v", cache.v)):
        page_rows, head_rows, head_columns = (plain[f"{name}_{part}"] for part in ("page_rows", "head_rows", "head_columns"))
        rows, whole = plain[f"{name}_desc"], boxed[f"{name}_desc"]
        for page in range(pages):
            for head in range(heads):
                at = [page * page_rows + head * head_rows, head * head_columns]
                start = x.storage_offset() + sum(map(operator.mul, at, rows.strides))
                want = pool.as_strided(rows.block_shape, rows.strides, start)
                got = pool.as_strided(whole.block_shape, whole.strides, start)
                assert torch.equal(got.transpose(1, 2).reshape(want.shape), want)
                assert all(a < n for a, n in zip([0, 0, *at], whole.shape, strict=True))


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


def decodes(capability="9.0", head_dim=128, page_size=16, group=4, dtype=torch.bfloat16, kv_dtype=None, **extras) -> bool:
    kv = torch.zeros(2, 2, 2, page_size, head_dim, dtype=kv_dtype or dtype)
    q = torch.zeros(3, 2 * group, head_dim, dtype=dtype)
    return decode_hopper.serves(capability, q, paged_cache(kv, None, "HND"), torch.empty_like(q), **extras)


def test_the_decode_kernel_takes_what_it_can_do_and_leaves_the_rest_to_the_plain_one():
    for head_dim in (64, 128, 256):
        for page_size in (8, 16, 32, 64, 128, 256):
            assert decodes(head_dim=head_dim, page_size=page_size)
    assert decodes(dtype=torch.float16) and decodes(group=16) and decodes(group=3, q_len=5)
    assert not decodes("8.0") and not decodes("10.0") and not decodes(None)
    assert not decodes(group=17) and not decodes(group=4, q_len=5)  # more than 16 rows
    assert not decodes(head_dim=80) and not decodes(head_dim=512) and not decodes(page_size=4) and not decodes(page_size=48)
    assert not decodes(dtype=torch.float32) and not decodes(kv_dtype=torch.float16)
    for name, value in dict(window=7, soft_cap=5.0, sinks=torch.ones(1)).items():
        assert not decodes(**{name: value})


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_decode_kernel_takes_fp8_caches_of_the_same_shapes(fp8):
    """With 16-bit queries, and where every row and page begins at a multiple of the 16 bytes that TMA asks for."""
    for head_dim in (64, 128, 256):
        for page_size in (8, 16, 32, 64, 128, 256):
            assert decodes(head_dim=head_dim, page_size=page_size, kv_dtype=fp8)
    assert decodes(dtype=torch.float16, kv_dtype=fp8) and not decodes(dtype=torch.float32, kv_dtype=fp8)
    assert not decodes("8.0", kv_dtype=fp8) and not decodes(group=17, kv_dtype=fp8)
    assert not decodes(head_dim=32, kv_dtype=fp8) and not decodes(page_size=4, kv_dtype=fp8)
    for padding, dtype, taken in ((8, torch.bfloat16, True), (8, fp8, False), (16, fp8, True)):
        kv = torch.zeros(2, 2, 2, 16, 64 + padding, dtype=dtype)[..., :64]
        q = torch.zeros(3, 8, 64, dtype=torch.bfloat16)
        assert decode_hopper.serves("9.0", q, paged_cache(kv, None, "HND"), torch.empty_like(q)) == taken


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
    assert chosen(plain | dict(kv_len=2048), hopper | dict(kv_len=2048)) == "prefill_hopper"


def taken(**options) -> dict[str, int]:
    """The config that a decode of a batch with 2 KV heads takes of a table whose entries all have a cluster."""
    kv = torch.zeros(8, 2, 2, 16, 128, dtype=torch.bfloat16)
    batch = options.pop("batch_size")
    q = torch.zeros(batch, 8, 128, dtype=torch.bfloat16)
    i32 = partial(torch.zeros, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "device_of", lambda x: SimpleNamespace(capability="9.0", sm_count=132, name=""))
        patch.setattr(calls, "find_either", lambda *queries: ("decode_hopper", CLUSTERED))
        options = dict(max_kv_len=None, ragged=None, config=None) | options
        call = calls.decode_call(
            q, kv, None, i32(batch * 100), i32(batch + 1), i32(batch), torch.empty_like(q), None, 0.1, "HND", 1,
            options["max_kv_len"], options["ragged"], None, None, None, None, None, 1.0, False, options["config"], "decode_hopper",
        )  # fmt: skip
    return dict(call.config[1:])


def clustered(**options) -> int:
    return taken(**options)["cluster"]


def test_only_lengths_that_are_known_to_be_even_get_a_cluster_each():
    """A replayed graph may hold others than it was captured with, so nothing but a promise, or a single sequence, counts."""
    assert clustered(batch_size=1) == clustered(batch_size=4, ragged=False) == 8
    assert clustered(batch_size=4) == clustered(batch_size=4, max_kv_len=1600) == clustered(batch_size=4, ragged=True) == 1
    assert clustered(batch_size=4, config=list(CLUSTERED.values())) == 8


def test_a_batch_that_gets_no_clusters_is_cut_for_all_sms():
    """Clusters may leave half of them idle; stage 2 reduces as many shares as there are."""
    assert taken(batch_size=4) == CLUSTERED | {"cluster": 1, "num_splits": 16}  # of 132 SMs
    assert taken(batch_size=4, ragged=False) == CLUSTERED


def test_a_cluster_is_all_shares_of_a_sequence():
    with pytest.raises(ValueError, match="config: a cluster of 8 is for as many splits, not for 4; or let it be 1"):
        decode_hopper.launches(*[None] * 7, CLUSTERED | {"num_splits": 4}, sm_scale=0.1)
    key = Key("decode_hopper", "", 132, 128, 16, 4)
    for workload in (Workload(8, 8192), Workload(8, 8192, ragged=True)):
        points = valid_points(decode_hopper.TEMPLATE, key, workload)
        assert {p["cluster"] for p in points} == ({1} if workload.ragged else {1, 2, 4, 8})
        assert all(p["cluster"] in (1, p["num_splits"]) for p in points)
