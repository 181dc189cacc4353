"""Paged prefill against the fp32 reference: ragged batches, cached prefixes, every feature."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paged import Batch, Case, assert_close, cases, check_prefill

import patune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2, maxnreg=0, num_splits=1)


@settings(max_examples=40)
@given(cases(prefill=True), st.sampled_from((16, 32)), st.sampled_from((1, 3)))
@example(Case((0, 3, 0), (0, 40, 5)), 16, 1)  # sequences without new tokens
@example(Case((40, 1), (40, 90), window=7), 16, 2)  # first tiles fully outside the window
@example(Case((70, 66), (70, 130), window=110), 16, 2)  # and some fully inside of it
@example(Case((70, 66), (70, 130), head_dim=16), 32, 2)  # more than one query block
@example(Case((20, 1), (20, 90), head_dim=512), 16, 2)  # the largest head
def test_prefill_equals_the_reference_for_any_shape_layout_and_feature(case, block_n, num_splits):
    check_prefill(case, DEVICE, **(TILES | dict(BLOCK_N=block_n, num_splits=num_splits)))


@settings(max_examples=10)
@given(cases(prefill=True))
def test_without_causal_every_key_is_seen(case):
    if case.window is None:
        check_prefill(case, DEVICE, causal=False, **TILES)


def test_a_larger_max_q_len_changes_nothing(device):
    batch = Batch(Case((30, 70), (50, 70)), device)
    call = lambda n: patune.paged_prefill(batch.q, batch.kv_cache, batch.qo_indptr, *batch.pages, max_q_len=n, config=TILES)
    assert torch.equal(call(70), call(1000))


def test_the_tiles_of_head_dim_512_equal_the_reference(device):
    """In bf16 also the ones that wgmma takes; in fp32 those need more shared memory than a GPU has."""
    for rows, keys, dtype in ((16, 16, "float32"), (16, 32, "float32"), (32, 16, "float32"), (64, 32, "bfloat16")):
        tiles = dict(BLOCK_M=rows, BLOCK_N=keys, num_warps=8, num_stages=2, maxnreg=0, num_splits=1)
        check_prefill(Case((20, 1, 70), (20, 90, 75), kv_heads=1, head_dim=512, dtype=dtype), device, **tiles)


@pytest.mark.parametrize("page_size", [16, 64, 256])  # several pages a tile, one, and several tiles a page
def test_tiles_with_a_bound_on_registers_equal_the_reference(device, page_size):
    for head_dim, keys, window in ((64, 128, None), (128, 64, None), (128, 64, 300), (112, 32, 9)):
        tiles = dict(BLOCK_M=128, BLOCK_N=keys, num_warps=8, num_stages=2, maxnreg=128, num_splits=1)
        case = Case((200, 1, 130), (200, 333, 600), head_dim=head_dim, page_size=page_size, window=window, dtype="bfloat16")
        check_prefill(case, device, **tiles)


def test_more_sequences_than_one_counting_step_looks_at(device):
    """Query blocks are counted 128 sequences at a time."""
    q_lens = tuple(i % 3 for i in range(200))
    check_prefill(Case(q_lens, tuple(q + 4 for q in q_lens), kv_heads=1, group=1, head_dim=16, page_size=4), device, **TILES)


def test_chunks_of_a_prompt_equal_the_whole_prompt(device):
    """Attention of a prompt's second half over its cached first half is the second half of the whole."""
    whole = Batch(Case((60,), (60,), seed=5), device)
    want = patune.paged_prefill(whole.q, whole.kv_cache, whole.qo_indptr, *whole.pages, max_q_len=60)
    half = whole.qo_indptr // 2
    got = patune.paged_prefill(whole.q[30:], whole.kv_cache, half, *whole.pages, max_q_len=30)
    assert_close(got, want[30:].float(), 1e-5)
