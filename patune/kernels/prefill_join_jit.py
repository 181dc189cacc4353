"""Device code that joins the items that prefill_hopper has cut along their keys."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LOG2E


@triton.jit(do_not_specialize=["q_heads"])
def prefill_join(
    tails_ptr, partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, q_heads, stride_ot, stride_oh,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, ITEM: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (the most items that are cut * ITEM / BLOCK_R,): BLOCK_R of an item's ITEM rows, its parts, at most BLOCK_S, at once.

    One warp: 4 rows take it 3 to 6 us in all where four warps take 11 to 20 (8 MB of parts, H100), for the compiler has those wait
    for each other. partial [programs, ITEM, HEAD_DIM] fp32, and partial_lse [programs, ITEM], the natural log of the sum of exp,
    -inf where a part has no key of a row. tails: see prefill_hopper_jit.find_items.
    """
    BLOCKS: tl.constexpr = ITEM // BLOCK_R
    item = tl.program_id(0) // BLOCKS
    rows = tl.program_id(0) % BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, HEAD_DIM)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tail_ptr = tails_ptr + 4 + item * 4
    tails = tl.load(tails_ptr)  # all at once: of an item beyond the last one they are any numbers, and unused
    parts = tl.load(tails_ptr + 1)
    token = tl.load(tail_ptr)
    valid = tl.load(tail_ptr + 1)
    head = tl.load(tail_ptr + 2)
    here = tl.load(tail_ptr + 3)
    if (item < tails) & (here > 1):
        slots = (item * parts + splits)[:, None] * ITEM + rows[None, :]  # [BLOCK_S, BLOCK_R]
        mask = (splits < here)[:, None] & (rows >= 0)[None, :]
        o = tl.load(partial_ptr + slots[:, :, None] * HEAD_DIM + columns[None, None, :], mask=mask[:, :, None], other=0.0)
        lse = tl.load(partial_lse_ptr + slots, mask=mask, other=float("-inf")) * LOG2E
        m = tl.max(lse, 0)
        weights = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m)[None, :])
        l = tl.sum(weights, 0)
        o = tl.sum(o * weights[:, :, None], 0) * (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
        wanted = (rows % TOKENS < valid) & (rows < HEADS * TOKENS)
        tokens = (token + rows % TOKENS).to(tl.int64)
        heads = head + rows // TOKENS
        tl.store(out_ptr + (tokens * stride_ot + heads * stride_oh)[:, None] + columns[None, :],
                 o.to(out_ptr.dtype.element_ty), mask=wanted[:, None])  # fmt: skip
        if lse_ptr is not None:
            lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)
            tl.store(lse_ptr + tokens * q_heads + heads, lse, mask=wanted)
