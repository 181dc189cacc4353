"""Paged prefill, template "prefill": causal attention of new tokens over a paged cache that already holds them.

One program takes BLOCK_M rows, the query heads of a KV head side by side for each of a few tokens, and walks the sequence's keys,
BLOCK_N at a time, gathered through the page table. Query blocks of a ragged batch form one list, cut on the device, so padding
costs no program beyond one early exit; within a sequence the last block, which has the most keys, goes first. One loop takes all
tiles, and only those on the diagonal (and on a window's left edge) pay for hiding logits. Where blocks are fewer than SMs,
or their last wave nearly empty, a block's keys are cut into num_splits, and prefill_reduce_jit.py joins what comes of them.
"""

import triton
import triton.language as tl

from ..workload import Key, Workload
from .defaults import PREFILL_SPLITS, default_config, fit, packed_heads, query_of
from .device import supports_pdl
from .prefill_reduce_jit import prefill_reduce, reduce_launch, split_scratch
from .prefill_space import far_from_even
from .primitives import LOG2E, add_sink, cap_logits, dot, kv_length, softmax_step
from .problem import AttentionProblem
from .sizes import ceil_div, exceeds_registers, next_power_of_2
from .template import Launch, Template, Values


@triton.jit
def find_block(qo_indptr_ptr, batch_size, item, TOKENS: tl.constexpr, BLOCK_B: tl.constexpr):
    """The sequence that holds query block `item`, of TOKENS tokens (batch_size if none does), and that sequence's first block."""
    b = 0
    first = 0
    total = 0
    for start in range(0, batch_size, BLOCK_B):
        offs = start + tl.arange(0, BLOCK_B)
        inside = offs < batch_size
        q_len = tl.load(qo_indptr_ptr + offs + 1, mask=inside, other=0) - tl.load(qo_indptr_ptr + offs, mask=inside, other=0)
        end = total + tl.cumsum(tl.cdiv(q_len, TOKENS), 0)
        before = inside & (end <= item)
        b += tl.sum(before.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(before, end, 0), 0))
        total = tl.max(end, 0)
    return b, first


@triton.jit
def page_ids(page_ids_ptr, start, pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each token of the KV tile at token `start`, 0 for those past the sequence's `pages`. [BLOCK_N]

    A scalar where a page holds whole tiles.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        page = start // PAGE_SIZE
    elif BLOCK_N % PAGE_SIZE == 0:  # then so is start: one address, and constants to add to it
        page = start // PAGE_SIZE + tl.arange(0, BLOCK_N) // PAGE_SIZE
    else:
        page = (start + tl.arange(0, BLOCK_N)) // PAGE_SIZE
    return tl.load(page_ids_ptr + page, mask=page < pages, other=0)


@triton.jit
def page_offset(page, stride_p):
    """Where pages begin, in elements. Ids are taken without a sign: a row's address is 4 instructions then, not 16.

    Computed once for K and V where it is the same: with two, the loop of 128 registers a thread spills. 4 to 8% of long prompts.
    """
    return page.to(tl.uint32).to(tl.int64) * stride_p


@triton.jit
def tile_pointers(
    ptr, offset, start, STRIDE_T: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of K or V of the tile at token `start`, on the pages at `offset`. [BLOCK_N, BLOCK_D]"""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    if PAGE_SIZE % BLOCK_N == 0:  # what does not change from tile to tile comes first, of the others
        ptrs = (ptr + offset + (start % PAGE_SIZE) * STRIDE_T) + (offs_n * STRIDE_T)[:, None] + offs_d[None, :]
    elif BLOCK_N % PAGE_SIZE == 0:
        ptrs = (ptr + (offs_n % PAGE_SIZE * STRIDE_T)[:, None] + offs_d[None, :]) + offset[:, None]
    else:
        ptrs = (ptr + ((start + offs_n) % PAGE_SIZE * STRIDE_T)[:, None] + offs_d[None, :]) + offset[:, None]
    return ptrs


@triton.jit
def attend(
    q, m, l, acc, k_ptr, v_ptr, page, start, end, inner_start, inner_end, last_key, qk_scale, exponent, soft_cap, window,
    stride_kp, stride_vp, STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The KV tile at token `start` on the pages `page`. Returns m, l, acc.

    Outside of [inner_start, inner_end), keys after a row's last key and keys before its window are hidden. So K may be read past
    `end`, where it is whatever the pages hold; V is 0 there, as a stale NaN is NaN with a weight of 0, too.
    """
    keys = start + tl.arange(0, BLOCK_N)
    columns = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    k_offset = page_offset(page, stride_kp)
    v_offset = k_offset
    if stride_vp is not None:
        v_offset = page_offset(page, stride_vp)
    k_ptrs = tile_pointers(k_ptr, k_offset, start, STRIDE_KT, PAGE_SIZE, BLOCK_N, BLOCK_D)
    if BLOCK_D == HEAD_DIM:
        k = tl.load(k_ptrs)
    else:
        k = tl.load(k_ptrs, mask=columns, other=0.0)
    s = dot(q, tl.trans(k.to(q.dtype)), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if HAS_SOFT_CAP:
        s = cap_logits(s * qk_scale, soft_cap)
    # A branch, where a second loop would have to fill its pipeline anew: 3 to 7% of short prompts on an H100.
    if (start < inner_start) | (start >= inner_end):
        visible = keys[None, :] <= last_key[:, None]
        if HAS_WINDOW:
            visible = visible & (keys[None, :] > last_key[:, None] - window)
        s = tl.where(visible, s, float("-inf"))
    # Rescaled always: whether any row needs it is known only after all warps have waited for each other, which costs more.
    p, m, l, acc = softmax_step(s, exponent, m, l, acc)
    v_ptrs = tile_pointers(v_ptr, v_offset, start, STRIDE_VT, PAGE_SIZE, BLOCK_N, BLOCK_D)
    there = (keys < end)[:, None]
    if BLOCK_D != HEAD_DIM:
        there = there & columns
    v = tl.load(v_ptrs, mask=there, other=0.0)
    return m, l, dot(p.to(q.dtype), v.to(q.dtype), acc)


@triton.jit(
    do_not_specialize=["batch_size", "window", "all_tokens"],
    do_not_specialize_on_alignment=["num_splits", "qo_indptr_ptr", "kv_indices_ptr", "kv_indptr_ptr", "kv_last_page_len_ptr"],
)
def prefill_attention(
    q_ptr, k_ptr, v_ptr, qo_indptr_ptr, kv_indices_ptr, kv_indptr_ptr, kv_last_page_len_ptr,
    sinks_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr,
    sm_scale, v_scale, soft_cap, window, batch_size, q_heads, num_splits, all_tokens,
    stride_qt, stride_qh, stride_qd, stride_kp, stride_kh, stride_vp, stride_vh, stride_ot, stride_oh, stride_od,
    STRIDE_KT: tl.constexpr, STRIDE_VT: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (num_splits * q_heads / PACK * query blocks,): blocks that read the same keys run side by side.

    out and lse, [num_splits * all_tokens, q_heads, ...], have the rows of split s from s * all_tokens on.

    PACK heads of a group are rows of one block, so that it reaches BLOCK_M // PACK tokens past the diagonal, not BLOCK_M. The rows
    that PACK leaves over are nobody's. stride_vp is None where it is stride_kp: then K and V have their pages' offsets together.
    """
    TOKENS: tl.constexpr = BLOCK_M // PACK
    split = tl.program_id(0) % num_splits
    first_head = tl.program_id(0) // num_splits % (q_heads // PACK) * PACK
    item = tl.program_id(0) // num_splits // (q_heads // PACK)
    b = 0
    first_item = 0
    if batch_size > 1:
        b, first_item = find_block(qo_indptr_ptr, batch_size, item, TOKENS, BLOCK_B)
    if b >= batch_size:  # the grid holds the most blocks that this batch could need
        return
    q_start = tl.load(qo_indptr_ptr + b)
    q_len = tl.load(qo_indptr_ptr + b + 1) - q_start
    blocks = tl.cdiv(q_len, TOKENS)
    if item - first_item >= blocks:
        return
    first_token = (blocks - 1 - (item - first_item)) * TOKENS  # of the sequence's new ones; the longest block first

    first_page = tl.load(kv_indptr_ptr + b)
    kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, b, True, PAGE_SIZE)
    rows = tl.arange(0, BLOCK_M)
    tokens = first_token + rows // PACK
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += (q_start + first_token).to(tl.int64) * stride_qt + first_head * stride_qh
    row_mask = tokens < q_len
    if TOKENS * PACK < BLOCK_M:
        row_mask = row_mask & (rows < TOKENS * PACK)
    q_mask = row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (rows // PACK * stride_qt + rows % PACK * stride_qh)[:, None] + offs_d[None, :] * stride_qd,
                mask=q_mask, other=0.0)  # fmt: skip  # [BLOCK_M, BLOCK_D]
    qk_scale = sm_scale
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr)
    exponent = qk_scale * LOG2E  # of the logits inside exp2
    if HAS_SOFT_CAP:
        exponent = LOG2E

    first_last_key = kv_len - q_len + first_token  # the last key that the block's first row sees; bottom-right aligned
    last_key = tl.zeros([BLOCK_M], tl.int32) + (kv_len - 1)
    end = kv_len
    inner_end = kv_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        last_key = kv_len - q_len + tokens
        end = tl.minimum(kv_len, first_last_key + TOKENS)
        inner_end = tl.maximum(first_last_key + 1, 0) // BLOCK_N * BLOCK_N
    start = 0
    inner_start = 0
    if HAS_WINDOW:
        start = tl.maximum(first_last_key + 1 - window, 0) // BLOCK_N * BLOCK_N
        inner_start = first_last_key + TOKENS - window

    kv_head = (first_head // GROUP).to(tl.int64)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    page_ids_ptr = kv_indices_ptr + first_page
    pages = tl.cdiv(end, PAGE_SIZE)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)
    stop = start + tiles * (split + 1) // num_splits * BLOCK_N
    start += tiles * split // num_splits * BLOCK_N
    page = page_ids(page_ids_ptr, start, pages, PAGE_SIZE, BLOCK_N)
    for n in range(start, stop, BLOCK_N):
        m, l, acc = attend(
            q, m, l, acc, k_ptr, v_ptr, page, n, end, inner_start, inner_end, last_key, qk_scale, exponent, soft_cap, window,
            stride_kp, stride_vp, STRIDE_KT, STRIDE_VT,
            HEAD_DIM, PAGE_SIZE, HAS_WINDOW, HAS_SOFT_CAP, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        page = page_ids(page_ids_ptr, n + BLOCK_N, pages, PAGE_SIZE, BLOCK_N)  # a whole tile ahead of the loads that need them

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + first_head + rows % PACK).to(tl.float32)
        m, l, alpha = add_sink(tl.where(split == 0, sink, float("-inf")), m, l)
        acc *= alpha[:, None]
    if v_scale_ptr is not None:
        v_scale *= tl.load(v_scale_ptr)
    o = acc * (v_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    slot = (split * all_tokens + q_start + first_token).to(tl.int64)
    out_ptr += slot * stride_ot + first_head * stride_oh
    row_mask = rows // PACK < q_len - first_token  # q's mask, computed anew: it would take registers all the way through the loop
    if TOKENS * PACK < BLOCK_M:
        row_mask = row_mask & (rows < TOKENS * PACK)
    tl.store(out_ptr + (rows // PACK * stride_ot + rows % PACK * stride_oh)[:, None] + offs_d[None, :] * stride_od,
             o.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :])  # fmt: skip
    if lse_ptr is not None:
        lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)
        lse_ptr += slot * q_heads + first_head
        tl.store(lse_ptr + rows // PACK * q_heads + rows % PACK, lse, mask=row_mask)


TUNABLES = {
    "BLOCK_M": (16, 32, 64, 128),  # rows a program: query heads of a group, for as many tokens as that leaves
    "BLOCK_N": (16, 32, 64, 128),  # KV tokens a tile
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),  # tiles in flight
    "maxnreg": (0, 128),  # registers a thread; 0 lets ptxas choose, 128 lets an SM hold two programs of 8 warps
    "num_splits": PREFILL_SPLITS,  # parts of a block's keys, where blocks do not fill waves of programs
}
JIT_FUNCTIONS = (
    dot, kv_length, cap_logits, add_sink, find_block, page_ids, page_offset, tile_pointers, softmax_step, attend, prefill_attention,
    prefill_reduce,
)  # fmt: skip
BLOCK_B = 128  # sequences looked at together when query blocks are counted


def launches(
    q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, config, *,
    qo_indptr, max_q_len, sm_scale, causal=True, window=None, soft_cap=None, sinks=None, k_scale=None, v_scale=None, v_factor=1.0,
) -> list[Launch]:  # fmt: skip
    """The launches of one prefill. q [tokens, q_heads, head_dim]; `cache` a PagedCache; out like q; lse [tokens, q_heads]."""
    batch_size, (tokens, q_heads, head_dim), block_m = kv_indptr.shape[0] - 1, q.shape, config["BLOCK_M"]
    group = q_heads // cache.kv_heads
    pack = packed_heads(group, max_q_len, lambda heads: block_m // heads)
    # Every sequence adds at most one partial block; with max_q_len the bound is the smaller of the two.
    blocks = min(tokens // (block_m // pack) + batch_size, ceil_div(max_q_len, block_m // pack) * batch_size)
    block_d, num_splits = max(16, next_power_of_2(head_dim)), config["num_splits"]
    attended, attended_lse = split_scratch(q, num_splits) if num_splits > 1 else (out, lse)
    attend = Launch(prefill_attention, (num_splits * q_heads // pack * blocks,), dict(
        q_ptr=q, k_ptr=cache.k, v_ptr=cache.v, qo_indptr_ptr=qo_indptr, kv_indices_ptr=kv_indices, kv_indptr_ptr=kv_indptr,
        kv_last_page_len_ptr=kv_last_page_len, sinks_ptr=sinks, k_scale_ptr=k_scale, v_scale_ptr=v_scale,
        out_ptr=attended, lse_ptr=attended_lse, sm_scale=sm_scale, v_scale=v_factor if num_splits == 1 else 1.0,
        soft_cap=soft_cap or 0.0, window=window or 0,
        batch_size=batch_size, q_heads=q_heads, num_splits=num_splits, all_tokens=tokens,
        stride_qt=q.stride(0), stride_qh=q.stride(1), stride_qd=q.stride(2),
        stride_kp=cache.k_strides[0], stride_kh=cache.k_strides[1], STRIDE_KT=cache.k_strides[2],
        stride_vp=cache.v_strides[0] if cache.v_strides[0] != cache.k_strides[0] else None,
        stride_vh=cache.v_strides[1], STRIDE_VT=cache.v_strides[2],
        stride_ot=attended.stride(0), stride_oh=attended.stride(1), stride_od=attended.stride(2),
        HEAD_DIM=head_dim, PAGE_SIZE=cache.page_size, GROUP=group, PACK=pack, CAUSAL=causal,
        HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None,
        BLOCK_M=block_m, BLOCK_N=config["BLOCK_N"], BLOCK_D=block_d, BLOCK_B=BLOCK_B,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
        **({"maxnreg": config["maxnreg"]} if config["maxnreg"] else {}),
    ))  # fmt: skip
    if num_splits == 1:
        return [attend]
    return [attend, reduce_launch(qo_indptr, attended, attended_lse, out, lse, num_splits, v_factor, supports_pdl())]


def invalid(config: Values, key: Key, workload: Workload) -> str | None:
    """Why a point need not run: it cannot fit, or its rows do not fill its warps."""
    block_m, block_n, warps, stages, maxnreg, splits = (config[name] for name in TUNABLES)
    row_bytes = max(16, next_power_of_2(key.head_dim)) * 2
    huge = key.head_dim > 256
    q_rows = block_m if huge and block_m >= 64 else 0  # elsewhere q may live in registers
    if (q_rows + 2 * stages * block_n) * row_bytes > 227 * 1024:
        return "tiles in flight exceed shared memory"
    values = block_m * (row_bytes // 2 + block_n) // (32 * warps)  # of the accumulator and a tile's logits, a thread
    two_fit = (block_m + 2 * stages * block_n) * row_bytes <= 227 * 1024 // 2 and 64 < values <= 96
    if maxnreg and not (warps == 8 and two_fit):
        return "a bound on registers by which no second program comes to an SM, or that spills"
    if not maxnreg and warps == 8 and two_fit:  # at least 10% slower at head_dim 64 and 128, on an H100
        return "without a bound on registers a program of 8 warps is alone on an SM"
    if key.head_dim <= 128 and warps == 8 and block_n < 64:  # 2.8% behind the best at least, on each of 51 workloads of an H100
        return "too few keys for 8 warps"
    if not huge and (block_m < 64 or block_n < 32):
        return "too few rows for wgmma, or too few keys"
    if huge and (block_m > 64 or (block_m == 64 and (warps < 8 or block_n > 32))):
        return "the accumulator and a tile exceed the registers"
    if block_m < 64 and exceeds_registers(block_m, block_n, key.head_dim, warps):
        return "the accumulator and a tile exceed the registers"
    if not huge and block_m < 16 * warps:
        return "fewer than 16 rows a warp"
    if block_m * row_bytes * 2 // (32 * warps) > 1024:  # bytes of fp32 accumulator a thread; 255 registers hold 1020
        return "the accumulator exceeds the registers"
    return far_from_even(splits, query_of(key, workload), block_m)


TEMPLATE = Template(
    name="prefill",
    tunables=TUNABLES,
    runtime=frozenset({"num_splits"}),
    invalid=invalid,
    default=lambda key, workload: default_config(query_of(key, workload)),
    problem=lambda key, workload, **kw: AttentionProblem(launches, key, workload, **kw),
    jit_functions=JIT_FUNCTIONS,
    fit=fit,
)
