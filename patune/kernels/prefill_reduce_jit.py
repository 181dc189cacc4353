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
    stride_ot, stride_oh, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (rows / BLOCK_R,), a row being a head of a token. partial [num_splits, all_tokens, q_heads, HEAD_DIM] fp32 and
    partial_lse, the natural log of the sum of exp, -inf where a split has no key of a row."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < tl.load(qo_indptr_ptr + batch_size) * q_heads  # tokens after the last sequence's are nobody's
    columns = tl.arange(0, HEAD_DIM)
    gdc_wait()
    gdc_launch_dependents()
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for split in range(num_splits):
        slot = row + (split * all_tokens).to(tl.int64) * q_heads
        lse = tl.load(partial_lse_ptr + slot, mask=there, other=float("-inf")) * LOG2E
        o = tl.load(partial_ptr + slot[:, None] * HEAD_DIM + columns[None, :], mask=there[:, None], other=0.0)
        m_new = tl.maximum(m, lse)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(lse - shift)
        alpha = tl.exp2(m - shift)
        l = l * alpha + weight
        acc = acc * alpha[:, None] + o * weight[:, None]
        m = m_new
    o = acc * (v_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    offsets = (row // q_heads).to(tl.int64) * stride_ot + row % q_heads * stride_oh
    tl.store(out_ptr + offsets[:, None] + columns[None, :], o.to(out_ptr.dtype.element_ty), mask=there[:, None])
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E), mask=there)
