"""Every address that a kernel touches lies in its tensors: page lists end where they end, offsets pass 2^31 elements."""

import pytest
import torch
from bounds import checked_memory, needs_interpreter, sparse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paged import Batch, Case, assert_close, cases, check_decode, check_prefill

import patune

pytestmark = needs_interpreter
TILES = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2, maxnreg=0, num_splits=1)
SPLIT = dict(BLOCK_N=16, num_warps=4, num_stages=2, num_splits=3)
FAR = 2**31  # elements; an int32 offset wraps here


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_check_notices_an_address_outside():
    """A page id beyond the pool is caught, so a green test below means something."""
    batch = Batch(Case((1,), (20,)), "cpu")
    with checked_memory(), pytest.raises(Exception, match="outside its tensors"):
        patune.paged_decode(batch.q, batch.kv_cache, batch.kv_indices + 100, *batch.pages[1:], config=SPLIT)


@settings(max_examples=15)
@given(cases(dtypes=("float32",)), st.sampled_from((1, 3)))
@example(Case((1, 1), (0, 0)), 3)
@example(Case((5,), (3,)), 1)
def test_decode_reads_no_further_than_its_page_list_its_pages_and_its_scratch(case, num_splits):
    """The page list ends exactly with the last sequence's last page, and prefetching the next tile's page ids stops there."""
    with checked_memory():
        check_decode(case, "cpu", **(SPLIT | {"num_splits": num_splits}))


@settings(max_examples=15)
@given(cases(prefill=True, dtypes=("float32",)))
@example(Case((5, 0), (3, 0)))
def test_prefill_reads_no_further_than_its_page_list_and_its_pages(case):
    """As for decode, with query rows that end inside a tile."""
    with checked_memory():
        check_prefill(case, "cpu", **TILES)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_append_touches_its_pages_only(page_size):
    """Padding, and positions past the page list, read and write nothing."""
    kv = torch.zeros(4, 2, 2, page_size, 80)
    x = torch.ones(5, 2, 80)
    with checked_memory():
        where, table = (i32(-1, 0, 0, 1, 1), i32(0, 0, page_size, 0, 100)), (i32(3, 2), i32(0, 1, 2), i32(1, 1))
        patune.append_paged_kv_cache(x, x, *where, kv, *table, config=dict(BLOCK_T=4, num_warps=1))
    assert kv.count_nonzero() == 2 * 2 * 2 * 80


@pytest.mark.parametrize("pair", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_pages_beyond_2_31_elements_are_written_and_read(layout, pair):
    """page * stride is 64-bit in append, decode and prefill: the pool's last page is as good as its first."""
    page_size, dim = 64, 64
    pages = FAR // (page_size * dim * (1 if pair else 2)) + 3
    shape = (page_size, 1, dim) if layout == "NHD" else (1, page_size, dim)
    dtype = torch.float8_e5m2
    make = lambda *lead: sparse(torch.Size(lead + shape).numel(), dtype).view(*lead, *shape)
    cache = (make(pages), make(pages)) if pair else make(pages, 2)
    x = torch.randint(-3, 4, (65, 1, dim)).float()  # which e5m2 holds exactly
    table = (i32(pages - 1, pages - 2), i32(0, 2), i32(1))
    options = dict(kv_layout=layout)
    with checked_memory():
        patune.append_paged_kv_cache(x, x, i32(*[0] * 65), torch.arange(65, dtype=torch.int32), cache, *table, **options)
        decoded = patune.paged_decode(x[:1], cache, *table, config=SPLIT, **options)
        prefilled = patune.paged_prefill(x[:3], cache, i32(0, 3), *table, max_q_len=3, config=TILES, **options)
    used = tuple(c[-2:] for c in cache) if pair else cache[-2:]
    near = (i32(1, 0), *table[1:])
    assert_close(decoded, patune.reference_paged_attention(x[:1], used, i32(0, 1), *near, **options), 1e-4)
    assert_close(prefilled, patune.reference_paged_attention(x[:3], used, i32(0, 3), *near, **options), 1e-4)
    written = patune.reference_paged_attention(x[:1], used, i32(0, 1), *near, **options)
    expected = torch.softmax(x[0, 0] @ x[:, 0].T / 8, 0) @ x[:, 0]
    assert_close(written, expected.view(1, 1, -1), 1e-4)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        pytest.param((3, 2, 16), (2**30, 16, 1), id="token"),
        pytest.param((2, 2, 16), (16, 2**31 - 64, 1), id="head"),
    ],
)
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_q_and_out_beyond_2_31_elements_are_read_and_written(kernel, shape, stride):
    """token * stride is 64-bit, and heads lie as far apart as 32 bits reach; farther ones are refused (test_errors.py)."""
    q, out = (sparse(FAR + 64, torch.float16).as_strided(shape, stride) for _ in range(2))
    q.copy_(torch.randn(shape))
    tokens = shape[0]
    kv = torch.randn(1, 2, 1, 16, 16).half()
    pages, last = i32(*[0] * tokens), i32(*[16] * tokens)
    qo_indptr = torch.arange(tokens + 1, dtype=torch.int32)
    with checked_memory():
        if kernel == "decode":
            patune.paged_decode(q, kv, pages, qo_indptr, last, out=out, config=SPLIT)
        else:
            patune.paged_prefill(q, kv, qo_indptr, pages, qo_indptr, last, max_q_len=1, out=out, config=TILES)
    assert_close(out, patune.reference_paged_attention(q, kv, qo_indptr, pages, qo_indptr, last), 1e-2)


def test_new_tokens_beyond_2_31_elements_are_appended():
    """token * stride is 64-bit in append too."""
    k = sparse(FAR + 64, torch.float16).as_strided((3, 1, 16), (2**30, 16, 1))
    k.copy_(torch.randn(3, 1, 16))
    kv = torch.zeros(1, 2, 1, 16, 16).half()
    with checked_memory():
        patune.append_paged_kv_cache(k, k, i32(0, 0, 0), i32(0, 1, 2), kv, i32(0), i32(0, 1), i32(3))
    assert torch.equal(kv[0, 0, 0, :3], k[:, 0]) and torch.equal(kv[0, 1, 0, :3], k[:, 0])
