"""Paged decode against the fp32 reference, and the properties that make it safe to serve with."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paged import Batch, Case, assert_close, cases, check_decode

import patune
from patune.kernels import decode

SPLIT = dict(BLOCK_N=16, num_warps=2, num_stages=2, num_splits=3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=30)
@given(cases(), st.sampled_from((1, 2, 3, 5)), st.sampled_from((16, 32, 64)))
@example(Case((1,), (0,)), 2, 16)  # nothing to attend to
@example(Case((1, 1, 1), (0, 33, 0), sinks=True), 3, 16)  # empty sequences beside a split one
@example(Case((5, 5), (5, 64), window=1), 3, 16)  # rows of one tile whose windows do not overlap
@example(Case((1, 1), (90, 3), page_size=1, head_dim=80, group=7), 4, 32)
@example(Case((8,), (200,), group=20, kv_heads=1), 2, 32)  # more packed rows than one MMA tile takes
def test_decode_equals_the_reference_for_any_shape_layout_and_feature(case, num_splits, block_n):
    check_decode(case, DEVICE, BLOCK_N=block_n, num_warps=4, num_stages=2, num_splits=num_splits)


@given(st.lists(st.integers(0, 120), min_size=2, max_size=6), st.integers(1, 6))
@settings(max_examples=25)
def test_any_number_of_splits_gives_the_same_output(kv_lens, num_splits):
    case = Case((1,) * len(kv_lens), tuple(kv_lens), kv_heads=1)
    batch = Batch(case, DEVICE)
    whole = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT | {"num_splits": 1})
    split = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT | {"num_splits": num_splits})
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(0, 700), min_size=2, max_size=4), st.integers(1, 3), st.sampled_from((SPLIT, None)))
@example([300, 0, 700], 1, None)
@settings(max_examples=15)
def test_a_deterministic_row_is_the_same_to_the_bit_whatever_else_is_in_the_batch(kv_lens, q_len, config):
    case = Case((q_len,) * len(kv_lens), tuple(max(n, q_len) if n else 0 for n in kv_lens), kv_heads=1, group=2)
    batch = Batch(case, DEVICE)
    options = dict(q_len_per_seq=q_len, deterministic=True, config=config, return_lse=True)
    out, lse = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, **options)
    for b in range(len(kv_lens)):
        rows, ends = slice(b * q_len, (b + 1) * q_len), batch.kv_indptr[b : b + 2]
        alone = patune.paged_decode(
            batch.q[rows], batch.kv_cache, batch.kv_indices[ends[0] : ends[1]], ends - ends[0], batch.kv_last_page_len[b : b + 1],
            **options,
        )  # fmt: skip
        assert torch.equal(out[rows], alone[0]) and torch.equal(lse[rows], alone[1])
    assert_close(out, batch.reference()[0], 1e-4)


def test_shares_follow_the_sequences_not_the_pool_or_the_list(device):
    """The pages behind the last sequence, in the pool or at the end of kv_indices, change neither work nor result."""
    batch = Batch(Case((1, 1), (50, 70)), device)
    want = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT)
    longer = torch.cat([batch.kv_indices, torch.full((500,), 10**6, dtype=torch.int32, device=device)])
    got = patune.paged_decode(batch.q, batch.kv_cache, longer, batch.kv_indptr, batch.kv_last_page_len, config=SPLIT)
    assert torch.equal(got, want)


def test_a_page_table_that_starts_inside_a_longer_one_is_read_from_there(device):
    """The decode rows of a mixed batch come with kv_indptr[num_prefill:], which does not start at 0."""
    batch = Batch(Case((1, 1, 1), (40, 90, 33)), device)
    want = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT)
    tail = patune.paged_decode(
        batch.q[1:], batch.kv_cache, batch.kv_indices, batch.kv_indptr[1:], batch.kv_last_page_len[1:], config=SPLIT
    )
    assert_close(tail, want[1:], 1e-5)


def test_more_sequences_than_one_counting_step_looks_at(device):
    """Shares are counted 128 sequences at a time; a batch of 150 takes two steps."""
    kv_lens = tuple((7 * i) % 40 for i in range(150))
    check_decode(Case((1,) * 150, kv_lens, kv_heads=1, group=1, head_dim=16, page_size=8), device, **SPLIT)


def test_one_set_of_tensors_serves_any_lengths(device):
    """Launch bounds depend on shapes only, so lengths may change under a captured graph; here: the same launches, new lengths."""
    batch = Batch(Case((1, 1), (90, 90)), device)
    for lengths in ((90, 90), (1, 90), (0, 17), (33, 0)):
        pages = [-(-n // 16) for n in lengths]
        batch.kv_indptr.copy_(torch.tensor([0, pages[0], sum(pages)]))
        batch.kv_last_page_len.copy_(torch.tensor([n - (p - 1) * 16 if p else 0 for n, p in zip(lengths, pages, strict=True)]))
        batch.kv_cache.nan_to_num_(0.25)
        got = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT)
        assert_close(got, batch.reference()[0], 1e-4)


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_an_fp8_cache_is_right_for_queries_of_any_size(size, device):
    """bf16 queries are brought into fp16's range for the dots with an fp8 cache, so none overflows or vanishes."""
    batch = Batch(Case((1, 1), (50, 170), dtype="bfloat16", kv_dtype="float8_e4m3fn"), device)
    q, sm_scale = batch.q * size, batch.case.head_dim**-0.5 / size
    got = patune.paged_decode(q, batch.kv_cache, *batch.pages, sm_scale, config=SPLIT)
    want = patune.reference_paged_attention(q, batch.kv_cache, batch.qo_indptr, *batch.pages, sm_scale)
    assert_close(got, want, 1e-2)


def test_a_row_of_inf_spoils_no_other_row_of_its_tile(device):
    batch = Batch(Case((1,), (90,), dtype="bfloat16", kv_dtype="float8_e4m3fn", kv_heads=1), device)
    want = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT)
    batch.q[0, 1] = float("inf")
    got = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT)
    assert torch.equal(got[0, [0, 2, 3]], want[0, [0, 2, 3]])


def test_a_single_split_launches_one_kernel():
    batch = Batch(Case((1,), (64,)), "cpu")
    cache = decode_cache(batch)
    for splits, kernels in ((1, 1), (2, 2)):
        launches = decode.launches(batch.q, cache, *batch.pages, batch.q, None, SPLIT | {"num_splits": splits}, sm_scale=1.0)
        assert len(launches) == kernels


def test_more_rows_of_head_dim_512_than_a_program_takes_equal_the_reference(device):
    """Of 40 rows a KV head, 32 and 8."""
    for splits in (1, 3):
        check_decode(Case((5, 5), (40, 70), kv_heads=1, group=8, head_dim=512), device, **(SPLIT | {"num_splits": splits}))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 256, 512])
def test_scratch_is_sized_by_this_call_not_by_an_earlier_one(head_dim, device):
    for d in (128, head_dim, 128):
        check_decode(Case((1,), (70,), head_dim=d), device, **SPLIT)


def test_fp8_cache_is_read_with_its_scales(device):
    check_decode(Case((1, 1), (50, 33), dtype="bfloat16", kv_dtype="float8_e4m3fn", scales=True), device, **SPLIT)


def test_default_config_is_used_without_a_table(device):
    check_decode(Case((1, 1), (300, 20)), device)


def decode_cache(batch):
    from patune.kernels.cache import paged_cache

    return paged_cache(batch.kv_cache, None, "HND")
