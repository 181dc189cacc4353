"""What prefill_hopper has cut is joined to attention over all keys of an item; the rest of the output stays as it is."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from patune.kernels.prefill_join_jit import prefill_join

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ITEM = 128


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), max_size=3), st.integers(2, 6),
    st.sampled_from(((4, 32), (5, 24), (1, 128))), st.sampled_from((64, 128)), st.sampled_from((1, 4)), st.floats(0.0, 1.0),
    st.integers(0, 1000),
)  # fmt: skip
def test_joined_parts_are_attention_over_all_keys(items, parts, item_of, head_dim, rows, empty, seed):
    """items: (tokens left in the sequence, parts that have keys). A row without keys in a part has an lse of -inf there, and any
    finite values."""
    heads, block = item_of
    generator = torch.Generator().manual_seed(seed)
    tokens, q_heads, programs = 64 + 128 * len(items), 2 * heads, max(2, len(items)) * parts
    partial = torch.randn(programs, ITEM, head_dim, generator=generator)
    partial_lse = 5 * torch.randn(programs, ITEM, generator=generator)
    partial_lse[torch.rand(programs, ITEM, generator=generator) < empty] = float("-inf")
    tails = torch.full((4 + 4 * programs,), 1 << 20, dtype=torch.int32)  # beyond the items are any numbers
    tails[0], tails[1] = len(items), parts
    out, lse = torch.full((tokens, q_heads, head_dim), 7.0), torch.full((tokens, q_heads), 7.0)
    want, want_lse = out.clone(), lse.clone()
    for i, (valid, here) in enumerate(items):
        here, token, head = min(here, parts), 128 * i, heads * (i % 2)
        tails[4 + 4 * i : 8 + 4 * i] = torch.tensor([token, valid, head, here])
        if here == 1:
            continue  # the program that had it has stored it
        own = partial_lse[i * parts : i * parts + here]
        joined = torch.logsumexp(own, 0)
        weights = torch.exp(own - torch.where(joined == float("-inf"), 0.0, joined))
        values = (weights[..., None] * partial[i * parts : i * parts + here]).sum(0)
        for row in range(ITEM):
            if row % block < valid and row < heads * block:
                want[token + row % block, head + row // block] = values[row]
                want_lse[token + row % block, head + row // block] = joined[row]
    out, lse = out.to(DEVICE), lse.to(DEVICE)
    prefill_join[(programs // 2 * ITEM // rows,)](
        tails.to(DEVICE), partial.to(DEVICE), partial_lse.to(DEVICE), out, lse, q_heads, out.stride(0), out.stride(1),
        HEAD_DIM=head_dim, HEADS=heads, TOKENS=block, ITEM=ITEM, BLOCK_R=rows, BLOCK_S=8, PDL=False, num_warps=1,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.cpu(), want_lse, rtol=1e-4, atol=1e-4)
