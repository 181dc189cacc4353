"""The template "prefill_hopper" on a Hopper: the properties of the plain template's tests, for every config and its own edges."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import ON_HOPPER, assert_close, assert_lse_close, cases, check_prefill
from real import Buffers, Real

import patune
from patune.kernels import ops, prefill_hopper
from patune.kernels.prefill_hopper import TEMPLATE
from patune.tuner.space import valid_points
from patune.workload import Key, Workload

pytestmark = pytest.mark.gpu

CASES = {
    "one prompt": Real((2048,), (2048,)),
    "1, 5 and 17 tokens": Real((1, 5, 17), (1, 5, 17)),
    "ragged prompts p64": Real((1500, 1, 700, 64, 65), (1500, 1, 700, 64, 65), page_size=64),
    "cached prefixes and idle sequences": Real((4096, 300, 0, 1000, 78), (128, 300, 0, 0, 77)),
    "no keys, and fewer keys than queries": Real((0, 130, 1, 100), (200, 130, 3, 300)),
    "512 over 8k, g8 d64 NHD": Real((8192, 513), (512, 512), head_dim=64, group=8, layout="NHD"),
    "d256 g2 p32 pair": Real((700, 901), (700, 200), head_dim=256, group=2, page_size=32, pair=True),
    "p8 NHD pair fp16 strided q": Real(
        (1000, 2000), (1000, 300), page_size=8, layout="NHD", pair=True, dtype=torch.float16, strided_q=True
    ),
    "g16 and few tokens of long contexts": Real((3000, 40, 5000, 9), (3, 40, 7, 1), group=16, kv_heads=2),
    "g6": Real((700, 901), (100, 333), group=6, kv_heads=3),
    "g5, few tokens, rows of no head": Real((3000, 40, 300, 9), (3, 40, 64, 1), group=5, kv_heads=3),
    "g7 strided q, few tokens, one KV head": Real((900, 40, 33), (16, 1, 33), group=7, kv_heads=1, strided_q=True),
    "g12 d64, few tokens": Real((900, 40, 33), (16, 1, 13), head_dim=64, group=12, kv_heads=2),
    "p256 g7, a page larger than a tile": Real((700, 901), (700, 200), group=7, kv_heads=4, page_size=256),
    "p128 MHA": Real((700, 901), (700, 200), group=1, kv_heads=16, page_size=128),
    "a wave and 20 items": Real((4100,), (600,), kv_heads=8),
    "three waves and 44 items, g5 strided q": Real((3000, 2000, 40), (600, 560, 7), group=5, kv_heads=8, strided_q=True),
    "150 sequences": Real(tuple(7 * i % 300 + i % 40 for i in range(150)), tuple(7 * i % 300 for i in range(150)), kv_heads=2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def hopper(gpu):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def points(case: Real) -> list[dict[str, int]]:
    """Every config but for splits, and a few with splits of each number: they are no other kernel."""
    key = Key(TEMPLATE.name, "", 132, case.head_dim, case.page_size, case.group)
    whole = [dict(p) for p in valid_points(TEMPLATE, key, Workload(1, 1))]
    return whole + [p | {"num_splits": splits} for p, splits in zip(whole[:1] * 7 + whole[-1:], (2, 3, 4, 6, 8, 12, 16, 5))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_config_equals_the_reference(case):
    """Output and lse, from a poisoned output, twice: a second launch finds barriers and counters as the first one did."""
    b = Buffers(case)
    want, want_lse = b.reference()
    for config in points(case):
        call = partial(patune.paged_prefill, b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=max(b.q_lens), config=config)
        for _ in range(2):
            got, lse = call(out=b.poisoned(), return_lse=True, **b.options)
            assert_close(got, want, b.limit)
            assert_lse_close(lse, want_lse, b.limit)


def test_without_causal_every_key_is_seen():
    b = Buffers(Real((1000, 700), (300, 700)))
    want, want_lse = b.reference(causal=False)
    for config in points(b.case):
        got, lse = patune.paged_prefill(
            b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=700, causal=False, out=b.poisoned(), return_lse=True, config=config
        )
        assert_close(got, want, b.limit)
        assert_lse_close(lse, want_lse, b.limit)


@pytest.mark.parametrize(
    ("block_n", "head_dim", "dtype"), [(128, 128, torch.bfloat16), (64, 128, torch.float16), (128, 64, torch.float16)]
)
@pytest.mark.parametrize("rising", [True, False], ids=["to the last key", "to the first key"])
@pytest.mark.parametrize("slope", [0.01, 0.03, 0.045, 0.2, 1.0])  # nats a key
def test_maxima_that_move_along_the_keys_leave_no_trace(slope, rising, block_n, head_dim, dtype):
    """Logits that grow along the walk over the keys, from the last to the first one, or fall along it.

    A row's exponents are taken against a maximum that may have been outgrown by 5.5 nats: slopes of less a tile, of nearly that, of
    more, and so steep that every tile but one weighs nothing. The first rows' maxima are not those of the last.
    """
    b = Buffers(Real((1500, 700), (1500, 300), head_dim=head_dim, dtype=dtype))
    b.kv_cache.nan_to_num_(0.5)
    for i, (kv_len, pages) in enumerate(zip(b.kv_lens, b.pages, strict=True)):
        tokens = torch.arange(pages * 16, device="cuda")
        logits = slope * (tokens if rising else kv_len - 1 - tokens)
        ids = b.kv_indices[b.kv_indptr[i] :][:pages].long()
        k = b.kv_cache[ids, 0]  # [pages, kv_heads, 16, head_dim]
        k[..., 0] = logits.view(pages, 1, 16).to(dtype)
        b.kv_cache[ids, 0] = k
    b.q *= 0.3
    b.q[..., 0] = head_dim**0.5  # the scale's inverse
    want, want_lse = b.reference()
    config = dict(BLOCK_N=block_n, num_stages=256 // block_n, schedule=1, issue=1, num_splits=1)
    call = partial(patune.paged_prefill, b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=1500, config=config)
    got, lse = call(out=b.poisoned(), return_lse=True)
    assert_close(got, want, b.limit)
    assert_lse_close(lse, want_lse, b.limit)


def test_a_prefill_waits_for_the_kernels_before_it_and_what_follows_for_the_prefill():
    """All are launched while the one before still runs: K, V, q and the page table, written just before, are read as written."""
    b = Buffers(Real((4096, 4096), (1024, 1024)))
    b.kv_cache.nan_to_num_(0.5)
    pool, q, ids = b.kv_cache.clone(), b.q.clone(), b.kv_indices.clone()
    config = TEMPLATE.default(Key(TEMPLATE.name, "", 132, 128, 16, 4), Workload(2, 4096, 1024))

    def prefill(q: torch.Tensor) -> torch.Tensor:
        return patune.paged_prefill(q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=1024, config=config)

    def reference(q: torch.Tensor) -> torch.Tensor:
        return patune.reference_paged_attention(q, b.kv_cache, b.qo_indptr, *b.table)

    want, want_decoded = reference(q), patune.paged_decode(q[:2].clone(), b.kv_cache, *b.table)
    for _ in range(3):
        for x, stale, fresh in ((b.kv_cache, float("nan"), pool), (b.kv_indices, 0, ids), (b.q, float("nan"), q)):
            x.fill_(stale)
            x.copy_(fresh)
        out = prefill(b.q)
        chained = prefill(out)
        decoded = patune.paged_decode(b.q[:2], b.kv_cache, *b.table)
        after = prefill(b.q)
        assert_close(out, want, b.limit)
        assert_close(chained, reference(out), b.limit)
        assert torch.equal(decoded, want_decoded) and torch.equal(after, out)


@settings(max_examples=60)
@given(cases(prefill=True, **ON_HOPPER), st.sampled_from(prefill_hopper.TUNABLES["schedule"]), st.sampled_from((1, 1, 2, 7)))
def test_small_batches_of_any_shape_and_layout_equal_the_reference(case, schedule, num_splits):
    check_prefill(case, "cuda", BLOCK_N=64, num_stages=2, schedule=schedule, issue=1, num_splits=num_splits)


def test_prefill_takes_the_kernel_only_where_it_serves_and_refuses_its_config_elsewhere(monkeypatch):
    launched = []
    run = ops.run
    monkeypatch.setattr(ops, "run", lambda launches, tensor: (launched.extend(launches), run(launches, tensor)))
    b = Buffers(Real((4096,), (4096,)))
    config = prefill_hopper.TEMPLATE.default(Key("prefill_hopper", "", 132, 128, 16, 4), Workload(1, 4096, 4096))
    call = partial(patune.paged_prefill, b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=4096)
    assert_close(call(config=config), b.reference()[0], b.limit)
    call(sliding_window=100)
    assert [launch.fn.__name__ for launch in launched] == ["prefill_attention_hopper", "prefill_attention"]
    with pytest.raises(ValueError, match=r"config: is of the kernel for Hopper, which does not serve this call"):
        call(sliding_window=100, config=config)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("schedule", prefill_hopper.TUNABLES["schedule"])
def test_one_captured_prefill_is_right_for_any_lengths_up_to_its_bounds(schedule, num_splits):
    """Items are found on the device, so a replay balances the lengths it finds."""
    b = Buffers(Real((2000, 2000), (1000, 1000)))
    b.kv_cache.nan_to_num_(0.5)
    config = dict(BLOCK_N=128, num_stages=2, schedule=schedule, issue=2, num_splits=num_splits)
    out = b.poisoned()
    call = partial(patune.paged_prefill, b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=1000, out=out, config=config)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for q_lens, kv_lens in (((1000, 1000), (2000, 2000)), ((1, 999), (1, 2000)), ((0, 700), (5, 701)), ((300, 0), (1999, 0))):
        pages = [-(-n // 16) for n in kv_lens]
        b.qo_indptr.copy_(torch.tensor([0, q_lens[0], sum(q_lens)]))
        b.kv_indptr.copy_(torch.tensor([0, pages[0], sum(pages)]))
        b.kv_last_page_len.copy_(torch.tensor([n - (p - 1) * 16 if p else 0 for n, p in zip(kv_lens, pages, strict=True)]))
        out.fill_(float("nan"))
        graph.replay()
        rows = sum(q_lens)
        assert_close(out[:rows], b.reference()[0][:rows], b.limit)
        assert out[rows:].isnan().all()
