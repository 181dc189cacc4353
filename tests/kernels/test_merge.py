"""merge_states: attention over two sets of keys is the merge of the attention over each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Batch, Case, assert_close, assert_lse_close

import patune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def attend(q, k, v):
    """(o, lse) of q [tokens, heads, dim] over keys [n, heads, dim]; n may be 0."""
    s = torch.einsum("thd,nhd->thn", q, k)
    return torch.einsum("thn,nhd->thd", torch.softmax(s, 2), v), torch.logsumexp(s, 2)


def tensors(seed: int, keys: int):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, 16, generator=gen).to(DEVICE) for n in (3, keys, keys)]


@given(st.integers(0, 99), st.integers(0, 12), st.data())
def test_splitting_the_keys_anywhere_and_merging_equals_the_whole(seed, keys, data):
    """One side, or both, may be empty."""
    q, k, v = tensors(seed, keys)
    cut = data.draw(st.integers(0, keys))
    o, lse = patune.merge_states(*attend(q, k[:cut], v[:cut]), *attend(q, k[cut:], v[cut:]))
    want_o, want_lse = attend(q, k, v)
    torch.testing.assert_close(o, want_o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 99), st.permutations(range(4)))
@settings(max_examples=20)
def test_the_order_of_merges_does_not_matter(seed, order):
    """Merging is associative and commutative, to rounding."""
    q, k, v = tensors(seed, 8)
    parts = [attend(q, k[2 * i : 2 * i + 2], v[2 * i : 2 * i + 2]) for i in range(4)]
    merged = parts[order[0]]
    for i in order[1:]:
        merged = patune.merge_states(*parts[i], *merged)
    torch.testing.assert_close(merged, attend(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, float("nan"), INF])
def test_a_side_without_keys_counts_for_nothing(garbage):
    """With lse -inf on one side the result is the other side, whatever the first one's o holds."""
    q, k, v = tensors(1, 5)
    some = attend(q, k, v)
    none = (torch.full_like(q, garbage), torch.full_like(some[1], -INF))
    for got in (patune.merge_states(*some, *none), patune.merge_states(*none, *some)):
        torch.testing.assert_close(got, some, rtol=1e-6, atol=1e-6)
    o, lse = patune.merge_states(*none, *none)
    assert torch.equal(o, torch.zeros_like(q)) and torch.equal(lse, none[1])


@pytest.mark.parametrize("far", [90.0, 3e4, 1e38])
def test_a_side_that_outweighs_the_other_by_any_amount_wins(far):
    """exp of the difference, never of the lse itself: nothing overflows."""
    q, k, v = tensors(2, 5)
    o, lse = attend(q, k, v)
    heavy, light = (o, lse + far), (-o, lse - far)
    for got in (patune.merge_states(*heavy, *light), patune.merge_states(*light, *heavy)):
        torch.testing.assert_close(got, heavy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_type_of_o_a(dtype):
    """The sum is made in fp32 and rounded once."""
    q, k, v = tensors(3, 6)
    a, b = attend(q, k[:3], v[:3]), attend(q, k[3:], v[3:])
    o, lse = patune.merge_states(a[0].to(dtype), a[1], b[0].to(dtype), b[1])
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close(o, attend(q, k, v)[0], 1e-2)


def test_the_kernels_own_states_merge_into_the_attention_over_both_caches():
    """lse of paged_decode and paged_prefill is the natural log that merge_states takes, also for an empty sequence."""
    whole = Batch(Case((1, 1, 1), (48, 20, 0), page_size=16), DEVICE)
    i32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=DEVICE)
    first_pages = (whole.kv_indices[[0, 1, 3]], i32(0, 2, 3, 3), i32(16, 16, 0))
    other_pages = (whole.kv_indices[[2, 4]], i32(0, 1, 2, 2), i32(16, 4, 0))
    head = patune.paged_decode(whole.q, whole.kv_cache, *first_pages, return_lse=True)
    tail = patune.paged_prefill(whole.q, whole.kv_cache, whole.qo_indptr, *other_pages, max_q_len=1, return_lse=True)
    o, lse = patune.merge_states(*head, *tail)
    want, want_lse = whole.reference()
    assert_close(o, want, 1e-4)
    assert_lse_close(lse, want_lse, 1e-4)
