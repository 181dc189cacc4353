"""A prefill's splits, joined: attention over all keys, from attention over parts of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from patune.kernels.prefill_reduce_jit import prefill_reduce
from patune.kernels.sizes import next_power_of_2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_S = 16


@given(
    st.integers(1, BLOCK_S), st.integers(1, 5), st.integers(0, 3), st.sampled_from((1, 3, 8)), st.sampled_from((64, 80, 128)),
    st.floats(0.0, 1.0), st.integers(0, 1000),
)  # fmt: skip
def test_joined_splits_are_attention_over_all_keys(num_splits, tokens, spare, heads, head_dim, empty, seed):
    """Of any number of splits, some without a key of a row. Rows after the last sequence's stay as they were."""
    torch.manual_seed(seed)
    rows = tokens + spare
    logits = 5 * torch.randn(num_splits, rows, heads, 7)  # of 7 keys a split
    logits[torch.rand(num_splits, rows, heads) < empty] = float("-inf")
    values = torch.randn(num_splits, rows, heads, 7, head_dim)
    partial_lse = logits.logsumexp(-1)
    weights = (logits - partial_lse[..., None]).exp().nan_to_num(0.0)
    partial = (weights[..., None] * values).sum(-2)
    whole = logits.movedim(0, -2).flatten(-2)  # [rows, heads, keys of all splits]
    want_lse = whole.logsumexp(-1)
    whole_weights = (whole - want_lse[..., None]).exp().nan_to_num(0.0)
    want = 0.5 * (whole_weights[..., None] * values.movedim(0, 2).flatten(2, 3)).sum(-2)

    pool = torch.full((rows, heads + 1, head_dim), float("nan"), device=DEVICE)
    out, lse = pool[:, :heads], torch.full((rows, heads), float("nan"), device=DEVICE)
    qo_indptr = torch.tensor([0, 1, tokens], dtype=torch.int32, device=DEVICE)
    prefill_reduce[(rows * heads,)](
        qo_indptr, partial.to(DEVICE), partial_lse.to(DEVICE), out, lse, 0.5, num_splits, 2, rows, heads,
        *out.stride(), HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_S=BLOCK_S, PDL=False,
    )  # fmt: skip
    torch.testing.assert_close(out[:tokens].cpu(), want[:tokens], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse[:tokens].cpu(), want_lse[:tokens], rtol=1e-4, atol=1e-4)
    assert out[tokens:].isnan().all() and lse[tokens:].isnan().all() and pool[:, heads:].isnan().all()
