"""Offsets beyond 2^31 elements at real dtypes: the last page of a huge pool, the last row of a huge q and out."""

import pytest
import torch
from paged import assert_close

import patune

pytestmark = pytest.mark.gpu

FAR = 2**31
PAGE, HEADS, DIM = 64, 8, 128


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.free_gib(12)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("pair", [False, True], ids=["one tensor", "pair"])
def test_the_last_pages_of_a_pool_beyond_2_31_elements(layout, pair):
    """What append writes there decode and prefill read."""
    shape = (HEADS, PAGE, DIM) if layout == "HND" else (PAGE, HEADS, DIM)
    pages = FAR // (PAGE * HEADS * DIM * (1 if pair else 2)) + 2
    make = lambda *lead: torch.empty(*lead, *shape, dtype=torch.bfloat16, device="cuda")
    cache = (make(pages), make(pages)) if pair else make(pages, 2)
    tokens = 100
    k, v = torch.randn(2, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(8, 4 * HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    table = (i32(pages - 1, pages - 2), i32(0, 2), i32(tokens - PAGE))
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
    patune.append_paged_kv_cache(k, v, torch.zeros_like(positions), positions, cache, *table, kv_layout=layout)
    used = tuple(c[-2:] for c in cache) if pair else cache[-2:]
    near = (i32(1, 0), *table[1:])
    prefilled = patune.paged_prefill(q, cache, i32(0, 8), *table, max_q_len=8, kv_layout=layout)
    want = patune.reference_paged_attention(q, used, i32(0, 8), *near, kv_layout=layout)
    assert_close(prefilled, want, 1e-2)
    assert_close(patune.paged_decode(q[-1:], cache, *table, kv_layout=layout), want[-1:], 1e-2)
    plain = torch.softmax((q[-1].view(HEADS, 4, DIM).float() @ k.float().permute(1, 2, 0)) / DIM**0.5, 2) @ v.float().transpose(
        0, 1
    )
    assert_close(want[-1], plain.reshape(4 * HEADS, DIM), 1e-2)


@pytest.mark.free_gib(12)
@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        pytest.param((3, 4, DIM), (2**30, DIM, 1), id="token"),
        pytest.param((4, 2, DIM), (DIM, FAR - DIM, 1), id="head"),
    ],
)
def test_rows_of_q_and_out_beyond_2_31_elements(shape, stride):
    """Strided q and out, as views of larger activations."""
    make = lambda: torch.empty(FAR + 4 * DIM, dtype=torch.bfloat16, device="cuda").as_strided(shape, stride)
    q, out = make(), make()
    q.copy_(torch.randn(shape))
    n = shape[0]
    kv = torch.randn(n, 2, 1, PAGE, DIM, device="cuda", dtype=torch.bfloat16)
    table = (i32(*range(n)), i32(*range(n + 1)), i32(*[PAGE] * n))
    want = patune.reference_paged_attention(q, kv, table[1], *table)
    for call in (
        patune.paged_decode,
        lambda q, kv, *t, out: patune.paged_prefill(q, kv, t[1], *t, max_q_len=1, out=out),
    ):
        out.fill_(float("nan"))
        call(q, kv, *table, out=out)
        assert_close(out, want, 1e-2)
