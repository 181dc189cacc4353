"""Where each new token goes: its sequence and its position. No host sync.

In plain torch for who asks, so that a compiler sees through it; for a mixed batch inside of its append, where torch's many small
kernels would take longer than the append that they serve.
"""

import torch
import triton
import triton.language as tl

from .primitives import kv_length


def get_batch_indices_positions(
    qo_indptr: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence and position of each new token, for `append_paged_kv_cache`.

    qo_indptr [batch+1] int32, in tokens; seq_lens [batch] int32, KV tokens with the new ones included; num_tokens a
    host int, at least qo_indptr[-1]. Returns (batch_indices, positions), both [num_tokens] int32; rows from
    qo_indptr[-1] on are padding and get -1, which append skips. Runs under CUDA-graph capture.
    """
    if not isinstance(num_tokens, int | torch.SymInt) or num_tokens < 0:
        raise ValueError(f"num_tokens: expected a host int >= 0, got {num_tokens!r}")
    if qo_indptr.ndim != 1 or seq_lens.ndim != 1 or qo_indptr.shape[0] != seq_lens.shape[0] + 1:
        raise ValueError(
            f"qo_indptr: expected [batch+1] for seq_lens [batch], got {tuple(qo_indptr.shape)} and {tuple(seq_lens.shape)}"
        )
    token = torch.arange(num_tokens, dtype=torch.int32, device=qo_indptr.device)
    if seq_lens.shape[0] == 0:
        return torch.full_like(token, -1), torch.full_like(token, -1)
    b = torch.searchsorted(qo_indptr[1:].contiguous(), token, right=True, out_int32=True)
    padding = b == seq_lens.shape[0]
    inside = b.clamp(max=seq_lens.shape[0] - 1)
    position = seq_lens[inside] - qo_indptr[inside + 1] + token
    return b.masked_fill(padding, -1), position.to(torch.int32).masked_fill(padding, -1)


@triton.jit
def place(
    tokens, num_tokens, qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, batch_size,
    PAGE_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """get_batch_indices_positions of `tokens` [BLOCK_T], for the sequences of a page table; -1 for padding too."""
    b = tl.zeros([BLOCK_T], tl.int32)  # the sequences that end before a token
    for start in range(0, batch_size, BLOCK_B):
        offs = start + tl.arange(0, BLOCK_B)
        inside = offs < batch_size
        ends = tl.load(qo_indptr_ptr + 1 + offs, mask=inside, other=0)
        b += tl.sum((inside[None, :] & (ends[None, :] <= tokens[:, None])).to(tl.int32), 1)
    owned = (tokens < num_tokens) & (b < batch_size)
    kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, b, owned, PAGE_SIZE)
    position = kv_len - tl.load(qo_indptr_ptr + 1 + b, mask=owned, other=0) + tokens
    return tl.where(owned, b, -1), tl.where(owned, position, -1)
