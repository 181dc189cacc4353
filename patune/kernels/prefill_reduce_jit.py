"""Device code that joins a prefill's splits: attention of the same queries over parts of their keys."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LOG2E


@triton.jit(
    do_not_specialize=["num_splits", "batch_size", "all_tokens", "q_heads"], do_not_specialize_on_alignment=["qo_indptr_ptr"]
)
def prefill_reduce(
    qo_indptr_ptr, partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, v_scale, num_splits, batch_size, all_tokens, q_heads,
    stride_ot, stride_oh, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows,), a row being a head of a token; BLOCK_S is the most splits, read all at once.

    partial [num_splits, all_tokens, q_heads, HEAD_DIM] fp32, and partial_lse, the natural log of the sum of exp, -inf where a split
    has no key of a row.
    """
    row = tl.program_id(0)
    token = row // q_heads
    there = token < tl.load(qo_indptr_ptr + batch_size)  # tokens after the last sequence's are nobody's
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, HEAD_DIM)
    slots = row + (splits * all_tokens).to(tl.int64) * q_heads
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if there:
        lse = tl.load(partial_lse_ptr + slots, mask=splits < num_splits, other=float("-inf")) * LOG2E
        o = tl.load(partial_ptr + slots[:, None] * HEAD_DIM + columns[None, :], mask=(splits < num_splits)[:, None], other=0.0)
        m = tl.max(lse, 0)
        weights = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
        l = tl.sum(weights, 0)
        o = tl.sum(o * weights[:, None], 0) * (v_scale / tl.where(l == 0.0, 1.0, l))
        out = out_ptr + token.to(tl.int64) * stride_ot + (row % q_heads) * stride_oh
        tl.store(out + columns, o.to(out_ptr.dtype.element_ty))
        if lse_ptr is not None:
            tl.store(lse_ptr + row, tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E))
