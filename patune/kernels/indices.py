"""Where each new token goes: its sequence and its position. Plain torch, no host sync."""

import torch


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
