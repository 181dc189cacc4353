"""What joins a prefill's splits, attention of the same queries over parts of their keys: scratch, device code and its launch."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LOG2E
from .sizes import next_power_of_2
from .template import Launch


@triton.jit(
    do_not_specialize=["num_splits", "batch_size", "all_tokens", "q_heads"], do_not_specialize_on_alignment=["qo_indptr_ptr"]
)
def prefill_reduce(
    qo_indptr_ptr, partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, v_scale, num_splits, batch_size, all_tokens, q_heads,
    stride_ot, stride_oh, stride_od, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows,), a row being a head of a token; its splits, at most BLOCK_S, are read all at once.

    partial [num_splits, all_tokens, q_heads, HEAD_DIM] fp32, and partial_lse, the natural log of the sum of exp, -inf where a split
    has no key of a row.
    """
    row = tl.program_id(0)
    token = row // q_heads
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    slots = row + (splits * all_tokens).to(tl.int64) * q_heads
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    wanted = token < tl.load(qo_indptr_ptr + batch_size)  # tokens after the last sequence's are nobody's
    lse = tl.load(partial_lse_ptr + slots, mask=splits < num_splits, other=float("-inf")) * LOG2E
    mask = (splits < num_splits)[:, None] & (columns < HEAD_DIM)[None, :]
    o = tl.load(partial_ptr + slots[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
    m = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
    l = tl.sum(weights, 0)
    o = tl.sum(o * weights[:, None], 0) * (v_scale / tl.where(l == 0.0, 1.0, l))
    out = out_ptr + token.to(tl.int64) * stride_ot + (row % q_heads) * stride_oh
    tl.store(out + columns * stride_od, o.to(out_ptr.dtype.element_ty), mask=wanted & (columns < HEAD_DIM))
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E), mask=wanted)


def split_scratch(q: torch.Tensor, num_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of every split, [num_splits * tokens, q_heads, head_dim] and [num_splits * tokens, q_heads], fp32."""
    tokens, q_heads, head_dim = q.shape
    partial = torch.empty(num_splits * tokens, q_heads, head_dim, dtype=torch.float32, device=q.device)
    return partial, torch.empty(num_splits * tokens, q_heads, dtype=torch.float32, device=q.device)


def reduce_launch(qo_indptr, partial, partial_lse, out, lse, num_splits: int, v_scale: float, pdl: bool) -> Launch:
    """Joins what split_scratch has into out, and into lse if that is wanted."""
    tokens, q_heads, head_dim = out.shape
    return Launch(prefill_reduce, (tokens * q_heads,), dict(
        qo_indptr_ptr=qo_indptr, partial_ptr=partial, partial_lse_ptr=partial_lse, out_ptr=out, lse_ptr=lse, v_scale=v_scale,
        num_splits=num_splits, batch_size=qo_indptr.shape[0] - 1, all_tokens=tokens, q_heads=q_heads,
        stride_ot=out.stride(0), stride_oh=out.stride(1), stride_od=out.stride(2),
        HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_S=next_power_of_2(num_splits), PDL=pdl, num_warps=2,
        **({"launch_pdl": True} if pdl else {}),
    ))  # fmt: skip
