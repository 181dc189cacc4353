"""Append: what is written, and above all what is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patune
from patune.kernels import append
from patune.kernels.cache import paged_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def i32(values, device=DEVICE):
    return torch.tensor(values, dtype=torch.int32, device=device)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=4), st.sampled_from((1, 3, 8, 16)),
    st.integers(0, 3), st.sampled_from(("HND", "NHD")), st.booleans(), st.sampled_from((16, 80)), st.sampled_from((None, 2.0)),
    st.sampled_from((1, 4)),
)  # fmt: skip
def test_new_tokens_land_on_their_pages_and_nothing_else_changes(lengths, page_size, padding, layout, pair, head_dim, scale, block):
    q_lens, kv_lens = [q for q, _ in lengths], [q + old for q, old in lengths]
    pages = [-(-n // page_size) for n in kv_lens]
    tokens, heads = sum(q_lens) + padding, 3
    order = torch.randperm(sum(pages) + 2, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    shape = (len(order), 2, *((heads, page_size) if layout == "HND" else (page_size, heads)), head_dim)
    kv = torch.full(shape, 7.0, device=DEVICE)
    k, v = torch.randn(2, tokens, heads, head_dim, device=DEVICE)
    want = kv.clone()
    t = 0
    for b, (q, n) in enumerate(zip(q_lens, kv_lens, strict=True)):
        for i in range(n - q, n):
            page, row = order[sum(pages[:b]) + i // page_size], i % page_size
            place = (page, slice(None), slice(None), row) if layout == "HND" else (page, slice(None), row)
            want[place] = torch.stack([k[t], v[t]]) / (scale or 1.0)
            t += 1
    qo_indptr = i32([sum(q_lens[:i]) for i in range(len(q_lens) + 1)])
    kv_indptr = i32([sum(pages[:i]) for i in range(len(pages) + 1)])
    last = i32([n - (p - 1) * page_size if p else 0 for n, p in zip(kv_lens, pages, strict=True)])
    batch_indices, positions = patune.get_batch_indices_positions(qo_indptr, i32(kv_lens), tokens)
    assert (batch_indices[sum(q_lens) :] == -1).all()
    cache = (kv[:, 0], kv[:, 1]) if pair else kv
    page_table = (order[: sum(pages)].to(torch.int32), kv_indptr, last)
    patune.append_paged_kv_cache(
        k, v, batch_indices, positions, cache, *page_table, kv_layout=layout, k_scale=scale, v_scale=scale,
        config=dict(BLOCK_T=block, num_warps=2),
    )  # fmt: skip
    torch.testing.assert_close(kv, want, rtol=1e-6, atol=1e-6)


def test_a_position_past_the_page_list_is_not_written(device):
    """Reading or writing past a sequence's page list would corrupt another sequence."""
    kv = torch.zeros(4, 2, 1, 4, 16, device=device)
    x = torch.ones(2, 1, 16, device=device)
    patune.append_paged_kv_cache(x, x, i32([0, 0]), i32([3, 4]), kv, i32([2, 3]), i32([0, 1, 2]), i32([4, 4]))
    assert kv[2, :, :, 3].eq(1).all() and kv.count_nonzero() == 2 * 16


def test_fp8_saturates_and_divides_by_the_scale(device):
    kv = torch.zeros(1, 2, 1, 4, 16, device=device).to(torch.float8_e4m3fn)
    x = torch.full((1, 1, 16), 1000.0, device=device, dtype=torch.bfloat16)
    scale = torch.tensor([4.0], device=device)
    patune.append_paged_kv_cache(x, x, i32([0]), i32([1]), kv, i32([0]), i32([0, 1]), i32([2]), v_scale=scale)
    assert kv.float()[0, 0, 0, 1].eq(448).all()
    assert kv.float()[0, 1, 0, 1].sub(250).abs().max() <= 16  # e4m3 keeps 3 bits of mantissa


@pytest.mark.parametrize(("num_tokens", "message"), [(-1, "num_tokens"), (torch.tensor(3), "num_tokens")])
def test_num_tokens_must_be_a_host_int(num_tokens, message):
    with pytest.raises(ValueError, match=message):
        patune.get_batch_indices_positions(i32([0, 1]), i32([1]), num_tokens)


def test_more_tokens_than_a_grid_has_programs_are_appended_in_parts():
    """CUDA allows 65,535 programs along a grid's second axis; a long prompt has more tokens."""
    tokens = 150_000
    k = torch.empty(tokens, 2, 16, device="meta")
    where = torch.empty(tokens, dtype=torch.int32, device="meta")
    cache = paged_cache(torch.empty(10, 2, 2, 16, 16, device="meta"), None, "HND")
    launches = append.launches(k, k, where, where, cache, where, where, dict(BLOCK_T=1, num_warps=1))
    assert [launch.grid for launch in launches] == [(2, 65535), (2, 65535), (2, 150_000 - 2 * 65535)]
    assert [launch.args["first_token"] for launch in launches] == [0, 65535, 2 * 65535]
    assert all(launch.args["num_tokens"] == tokens == launch.args["k_ptr"].shape[0] for launch in launches)
