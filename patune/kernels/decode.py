"""Paged decode, template "decode": split-K flash decoding in two stages.

Stage 1 gives every (KV head, share of a sequence) one program. The query heads of a group and the query tokens of a
sequence are packed into the rows of one MMA tile, so K and V are read once per KV head. A KV tile is BLOCK_N tokens,
gathered through the page table: several pages or a part of one. Shares are cut on the device: `num_splits` is the mean
number of shares a sequence, and a sequence gets shares in proportion to its own length, so a ragged batch is
balanced without the host knowing a length. A sequence with one share writes its output directly; stage 2 reduces the rest.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..workload import Key, Workload
from .defaults import SPLITS, default_config, fit, query_of
from .device import supports_pdl
from .primitives import LOG2E, add_sink, cap_logits, dot, kv_length, softmax_step
from .problem import AttentionProblem
from .sizes import MAX_GRID_Y, ceil_div, exceeds_registers, next_power_of_2
from .template import Launch, Template, Values

MIN_SHARE = tl.constexpr(128)  # tokens of a share that follows from its own sequence alone


@triton.jit
def first_key(kv_len, window, Q_LEN: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first key that any query of a sequence sees."""
    if HAS_WINDOW:
        return tl.maximum(kv_len - Q_LEN + 1 - window, 0)
    else:
        return kv_len * 0


@triton.jit
def share_size(kv_indptr_ptr, batch_size, num_splits, window, Q_LEN: tl.constexpr, PAGE_SIZE: tl.constexpr,
               BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Tokens a share: all that the batch must read, over num_splits shares a sequence, in whole tiles.

    Lengths sum to at most the pages in use, so there are at most num_splits * batch_size + batch_size - 1 shares.
    """
    pages = tl.load(kv_indptr_ptr + batch_size) - tl.load(kv_indptr_ptr)
    total = pages.to(tl.int64) * PAGE_SIZE
    if HAS_WINDOW:
        total = tl.minimum(total, batch_size.to(tl.int64) * (window + Q_LEN - 1))
    share = tl.cdiv(total, num_splits * batch_size).to(tl.int32)
    return tl.maximum(tl.cdiv(share, BLOCK_N), 1) * BLOCK_N


@triton.jit
def own_share_size(seen, num_splits, MIN_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens a share where a sequence's own keys alone decide: at most num_splits shares of at least MIN_TOKENS."""
    share = tl.maximum(tl.cdiv(seen, num_splits), MIN_TOKENS)
    return tl.cdiv(share, BLOCK_N) * BLOCK_N


@triton.jit
def count_shares(kv_len, share, window, mask, Q_LEN: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Shares of each sequence; an empty one has one, which writes zeros."""
    count = tl.cdiv(kv_len - first_key(kv_len, window, Q_LEN, HAS_WINDOW), share)
    return tl.where(mask, tl.maximum(count, 1), 0)


@triton.jit
def find_share(kv_indptr_ptr, kv_last_page_len_ptr, batch_size, num_splits, window, item, Q_LEN: tl.constexpr,
               PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Walk the batch's shares in order. Returns (the sequence of share `item`, that sequence's first share, share size).

    A share past the last one gives batch_size.
    """
    share = 1
    found = tl.full([], 0, tl.int64)  # sequences before it, and in the upper half their shares: one reduction for both
    total = 0
    for start in range(0, batch_size, BLOCK_B):
        offs = start + tl.arange(0, BLOCK_B)
        kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, offs, offs < batch_size, PAGE_SIZE)
        if start == 0:  # after the loads above have been sent, so that the latency is paid once
            share = share_size(kv_indptr_ptr, batch_size, num_splits, window, Q_LEN, PAGE_SIZE, BLOCK_N, HAS_WINDOW)
        count = count_shares(kv_len, share, window, offs < batch_size, Q_LEN, HAS_WINDOW)
        end = total + tl.cumsum(count, 0)
        before = (offs < batch_size) & (end <= item)
        found += tl.sum(tl.where(before, (count.to(tl.int64) << 32) + 1, 0), 0)
        if start + BLOCK_B < batch_size:
            total = tl.max(end, 0)
    return found.to(tl.int32), (found >> 32).to(tl.int32), share


@triton.jit
def shares_before(kv_indptr_ptr, kv_last_page_len_ptr, b, share, window, Q_LEN: tl.constexpr, PAGE_SIZE: tl.constexpr,
                  HAS_WINDOW: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """How many shares the sequences before b have."""
    first = 0
    for start in range(0, b, BLOCK_B):
        offs = start + tl.arange(0, BLOCK_B)
        kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, offs, offs < b, PAGE_SIZE)
        first += tl.sum(count_shares(kv_len, share, window, offs < b, Q_LEN, HAS_WINDOW), 0)
    return first


@triton.jit
def to_fp16(q):
    """q times a power of two that brings its largest element to about 2^14, as fp16, and that power.

    fp8 becomes fp16 in one instruction for two elements and bf16 in several: a decode of 32 x 4096 tokens went from 161 to
    107 us on an H100. fp16 has more mantissa than bf16 but less range, hence the factor.
    """
    size = tl.abs(q.to(tl.float32))
    largest = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
    q_scale = tl.exp2(14 - tl.floor(tl.log2(tl.maximum(largest, 1e-30))))
    return (q.to(tl.float32) * q_scale).to(tl.float16), q_scale


@triton.jit(
    do_not_specialize=["window", "batch_size", "num_splits"],
    do_not_specialize_on_alignment=["kv_indices_ptr", "kv_indptr_ptr", "kv_last_page_len_ptr"],
)
def decode_split(
    q_ptr, k_ptr, v_ptr, kv_indices_ptr, kv_indptr_ptr, kv_last_page_len_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    sm_scale, v_scale, soft_cap, window, batch_size, num_splits,
    stride_qt, stride_qh, stride_qd, stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt,
    stride_ot, stride_oh, stride_od,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, Q_LEN: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, OWN_SHARES: tl.constexpr, FP16_DOT: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Stage 1. Grid (kv_heads * row blocks, shares)."""
    ROWS: tl.constexpr = GROUP * Q_LEN  # row = query token * GROUP + head within the group
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    head_block = tl.program_id(0)
    kv_head = head_block // ROW_BLOCKS
    item = tl.program_id(1)
    if PDL:
        if num_splits > 1:
            gdc_launch_dependents()  # stage 2 may take its place as soon as this stage's last program has taken one
        gdc_wait()  # for whatever ran before, also for who may write the page table

    b = item
    first_item = item
    share = 0
    if num_splits > 1:
        if OWN_SHARES:
            b = item // num_splits
            first_item = b * num_splits
        elif batch_size == 1:
            b = 0
            first_item = 0
        else:
            b, first_item, share = find_share(kv_indptr_ptr, kv_last_page_len_ptr, batch_size, num_splits, window, item,
                                              Q_LEN, PAGE_SIZE, BLOCK_N, HAS_WINDOW, BLOCK_B)  # fmt: skip
    if b >= batch_size:  # the grid holds the most shares that this batch could need
        return

    first_page = tl.load(kv_indptr_ptr + b)
    kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, b, True, PAGE_SIZE)
    seen_from = first_key(kv_len, window, Q_LEN, HAS_WINDOW)
    if num_splits > 1:
        if OWN_SHARES:
            share = own_share_size(kv_len - seen_from, num_splits, MIN_SHARE, BLOCK_N)
        elif batch_size == 1:
            share = own_share_size(kv_len - seen_from, num_splits, 1, BLOCK_N)
    lo = seen_from + (item - first_item) * share
    hi = kv_len
    if num_splits > 1:
        hi = tl.minimum(lo + share, kv_len)
    if (lo >= hi) & (item > first_item):
        return

    rows = (head_block % ROW_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = kv_head.to(tl.int64) * GROUP + rows % GROUP
    tokens = b.to(tl.int64) * Q_LEN + rows // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    q_mask = (rows < ROWS)[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + tokens[:, None] * stride_qt + heads[:, None] * stride_qh + offs_d[None, :] * stride_qd,
                mask=q_mask, other=0.0)  # fmt: skip  # [BLOCK_M, BLOCK_D]
    qk_scale = sm_scale
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr)
    if FP16_DOT:
        q, q_scale = to_fp16(q)
        qk_scale /= q_scale
    exponent = qk_scale * LOG2E  # of the logits inside exp2
    if HAS_SOFT_CAP:
        exponent = LOG2E

    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    page_ids_ptr = kv_indices_ptr + first_page
    last_key = kv_len - Q_LEN + rows // GROUP  # of each row, bottom-right aligned
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Clamped, not masked: every load is in bounds and reads a real token, so stale NaN never meets a weight of 0.
    token = tl.minimum(lo + tl.arange(0, BLOCK_N), hi - 1)
    page = tl.load(page_ids_ptr + token // PAGE_SIZE, mask=token >= 0, other=0)
    for start in range(lo, hi, BLOCK_N):
        row = token % PAGE_SIZE
        k_offs = page.to(tl.int64) * stride_kp + row * stride_kt
        v_offs = page.to(tl.int64) * stride_vp + row * stride_vt
        # The next tile's page ids, a whole tile ahead of the loads that need them.
        token = tl.minimum(start + BLOCK_N + tl.arange(0, BLOCK_N), hi - 1)
        page = tl.load(page_ids_ptr + token // PAGE_SIZE)
        if BLOCK_D == HEAD_DIM:
            k = tl.load(k_ptr + k_offs[:, None] + offs_d[None, :])  # [BLOCK_N, BLOCK_D]
        else:
            k = tl.load(k_ptr + k_offs[:, None] + offs_d[None, :], mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        s = dot(q, tl.trans(k.to(q.dtype)), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # [BLOCK_M, BLOCK_N]
        if HAS_SOFT_CAP:
            s = cap_logits(s * qk_scale, soft_cap)
        keys = start + tl.arange(0, BLOCK_N)
        visible = (keys < hi)[None, :]
        if Q_LEN > 1:
            visible = visible & (keys[None, :] <= last_key[:, None])
        if HAS_WINDOW:
            visible = visible & (keys[None, :] > last_key[:, None] - window)
        s = tl.where(visible, s, float("-inf"))
        p, m, l, acc = softmax_step(s, exponent, m, l, acc)
        if BLOCK_D == HEAD_DIM:
            v = tl.load(v_ptr + v_offs[:, None] + offs_d[None, :])
        else:
            v = tl.load(v_ptr + v_offs[:, None] + offs_d[None, :], mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        acc = dot(p.to(q.dtype), v.to(q.dtype), acc)

    alone = True
    if num_splits > 1:
        alone = kv_len - seen_from <= share
    if alone:
        if v_scale_ptr is not None:
            v_scale *= tl.load(v_scale_ptr)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + heads, mask=rows < ROWS, other=0.0).to(tl.float32)
            m, l, alpha = add_sink(sink, m, l)
            acc *= alpha[:, None]
        o = acc * (v_scale / tl.where(l == 0.0, 1.0, l))[:, None]
        tl.store(out_ptr + tokens[:, None] * stride_ot + heads[:, None] * stride_oh + offs_d[None, :] * stride_od,
                 o.to(out_ptr.dtype.element_ty), mask=q_mask)  # fmt: skip
        if lse_ptr is not None:
            lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)
            q_heads = tl.num_programs(0) // ROW_BLOCKS * GROUP
            tl.store(lse_ptr + tokens * q_heads + heads, lse, mask=rows < ROWS)
    else:
        o = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l))
        # partials: [shares, kv_heads, ROWS, BLOCK_D] fp32, and their log-sum-exp in base 2 [shares, kv_heads, ROWS]
        slot = (item.to(tl.int64) * (tl.num_programs(0) // ROW_BLOCKS) + kv_head) * ROWS + rows
        tl.store(partial_ptr + slot[:, None] * BLOCK_D + offs_d[None, :], o, mask=(rows < ROWS)[:, None])
        tl.store(partial_lse_ptr + slot, lse, mask=rows < ROWS)


@triton.jit(
    do_not_specialize=["window", "batch_size", "num_splits"],
    do_not_specialize_on_alignment=["kv_indptr_ptr", "kv_last_page_len_ptr"],
)
def decode_reduce(
    kv_indptr_ptr, kv_last_page_len_ptr, sinks_ptr, v_scale_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    v_scale, window, batch_size, num_splits, stride_ot, stride_oh, stride_od,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, Q_LEN: tl.constexpr,
    HAS_WINDOW: tl.constexpr, OWN_SHARES: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Stage 2. Grid (q_heads, query tokens, BLOCK_D / BLOCK_DV); BLOCK_S shares are read at a time."""
    head = tl.program_id(0)
    token = tl.program_id(1)
    b = token // Q_LEN
    kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, b, True, PAGE_SIZE)
    seen = kv_len - first_key(kv_len, window, Q_LEN, HAS_WINDOW)
    first = b * num_splits
    if OWN_SHARES:
        share = own_share_size(seen, num_splits, MIN_SHARE, BLOCK_N)
    else:
        share = own_share_size(seen, num_splits, 1, BLOCK_N)
        if batch_size > 1:
            share = share_size(kv_indptr_ptr, batch_size, num_splits, window, Q_LEN, PAGE_SIZE, BLOCK_N, HAS_WINDOW)
            first = shares_before(kv_indptr_ptr, kv_last_page_len_ptr, b, share, window, Q_LEN, PAGE_SIZE, HAS_WINDOW, BLOCK_B)
    count = tl.cdiv(seen, share)

    if PDL:
        # All of the above needed only the page table, which is older than stage 1. Every program waits, also one that
        # then has nothing to do: whatever runs after this stage relies on it not ending before stage 1.
        gdc_wait()
        gdc_launch_dependents()  # the next kernel is launched while this one reduces: 0.3 us of 6.7, 0.5 of 19.8 on an H100
    if count <= 1:  # stage 1 wrote this row
        return

    kv_heads = tl.num_programs(0) // GROUP
    ROWS: tl.constexpr = GROUP * Q_LEN
    row = (head // GROUP) * ROWS + (token % Q_LEN) * GROUP + head % GROUP
    offs_d = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m = float("-inf")
    l = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, count, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        slot = (first + splits).to(tl.int64) * (kv_heads * ROWS) + row
        lse = tl.load(partial_lse_ptr + slot, mask=splits < count, other=float("-inf"))  # [BLOCK_S]
        o = tl.load(partial_ptr + slot[:, None] * BLOCK_D + offs_d[None, :], mask=(splits < count)[:, None], other=0.0)
        m_new = tl.maximum(m, tl.max(lse, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(lse - shift)
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(o * weight[:, None], 0)
        m = m_new
    if sinks_ptr is not None:
        m, l, alpha = add_sink(tl.load(sinks_ptr + head).to(tl.float32), m, l)
        acc *= alpha
    if v_scale_ptr is not None:
        v_scale *= tl.load(v_scale_ptr)
    o = acc * (v_scale / tl.where(l == 0.0, 1.0, l))
    out = out_ptr + token.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh + offs_d * stride_od
    tl.store(out, o.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    if lse_ptr is not None:
        if tl.program_id(2) == 0:
            lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)
            tl.store(lse_ptr + token.to(tl.int64) * tl.num_programs(0) + head, lse)


TUNABLES = {
    "BLOCK_N": (16, 32, 64, 128),  # KV tokens a tile
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),  # KV tiles in flight, and one more being read; 5 won nothing in 80 workloads
    "num_splits": SPLITS,  # mean shares a sequence
}
JIT_FUNCTIONS = (
    dot, kv_length, cap_logits, softmax_step, add_sink, share_size, own_share_size, first_key, count_shares, find_share,
    shares_before, to_fp16, decode_split, decode_reduce,
)  # fmt: skip


def launches(
    q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, config, *,
    sm_scale, q_len=1, window=None, soft_cap=None, sinks=None, k_scale=None, v_scale=None, v_factor=1.0, own_shares=False,
) -> list[Launch]:  # fmt: skip
    """The launches of one decode: stage 1 alone if num_splits is 1, else both stages.

    q [batch * q_len, q_heads, head_dim]; `cache` a PagedCache; out like q; lse [batch * q_len, q_heads] fp32 or None.
    own_shares: cut each sequence by its own length alone, so that the rest of the batch cannot change a bit of its result.
    """
    batch_size, q_heads, head_dim = kv_indptr.shape[0] - 1, q.shape[1], q.shape[2]
    group, num_splits = q_heads // cache.kv_heads, config["num_splits"]
    rows = group * q_len
    block_m, block_d = rows_a_program(rows, head_dim), max(16, next_power_of_2(head_dim))
    # share_size() says why there are at most this many; one sequence has exactly num_splits
    shares = num_splits * batch_size + (batch_size - 1 if num_splits > 1 and not own_shares else 0)
    if max(shares, batch_size * q_len) > MAX_GRID_Y:
        raise ValueError(
            f"q: {batch_size} sequences in {num_splits} splits each need more than a grid's {MAX_GRID_Y} programs; cut the batch"
        )
    slots = shares * cache.kv_heads * rows if num_splits > 1 else 0  # empty, not None: None would compile another variant
    partial = torch.empty(slots * block_d, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(slots, dtype=torch.float32, device=q.device)
    shared = dict(
        kv_indptr_ptr=kv_indptr, kv_last_page_len_ptr=kv_last_page_len, sinks_ptr=sinks, v_scale_ptr=v_scale,
        out_ptr=out, lse_ptr=lse, partial_ptr=partial, partial_lse_ptr=partial_lse, v_scale=v_factor,
        window=window or 0, batch_size=batch_size, num_splits=num_splits,
        stride_ot=out.stride(0), stride_oh=out.stride(1), stride_od=out.stride(2),
        HEAD_DIM=head_dim, PAGE_SIZE=cache.page_size, GROUP=group, Q_LEN=q_len, HAS_WINDOW=window is not None,
        OWN_SHARES=own_shares, PDL=supports_pdl(), BLOCK_N=config["BLOCK_N"], BLOCK_D=block_d,
        BLOCK_B=32 if batch_size <= 32 else 128,  # 32: every warp looks at the whole batch and none waits for another
        **({"launch_pdl": True} if supports_pdl() else {}),
    )  # fmt: skip
    split = Launch(decode_split, (cache.kv_heads * ceil_div(rows, block_m), shares), dict(
        shared, q_ptr=q, k_ptr=cache.k, v_ptr=cache.v, kv_indices_ptr=kv_indices, k_scale_ptr=k_scale,
        sm_scale=sm_scale, soft_cap=soft_cap or 0.0, HAS_SOFT_CAP=soft_cap is not None, BLOCK_M=block_m,
        FP16_DOT=q.dtype == torch.bfloat16 and cache.k.dtype.itemsize == 1,
        stride_qt=q.stride(0), stride_qh=q.stride(1), stride_qd=q.stride(2),
        stride_kp=cache.k_strides[0], stride_kh=cache.k_strides[1], stride_kt=cache.k_strides[2],
        stride_vp=cache.v_strides[0], stride_vh=cache.v_strides[1], stride_vt=cache.v_strides[2],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    ))  # fmt: skip
    if num_splits == 1:
        return [split]
    # A few rows leave most SMs idle, so each is cut. With shares of their own they all have one width: the order in which a
    # sum is taken depends on it, and it may not depend on the batch.
    columns = min(block_d, 64 if own_shares else 32 if batch_size * q_len * q_heads <= 256 else 128)
    reduce = Launch(decode_reduce, (q_heads, batch_size * q_len, block_d // columns), dict(
        shared, BLOCK_S=16, BLOCK_DV=columns, num_warps=2,  # not 4: 0 to 4% of a decode, more of a ragged one
    ))  # fmt: skip
    return [split, reduce]


def rows_a_program(rows: int, head_dim: int) -> int:
    """BLOCK_M for the queries of a KV head: all of them, as far as the registers hold their accumulators."""
    return min(max(16, next_power_of_2(rows)), 32 if head_dim > 256 else 64)


def own_splits(kv_heads: int) -> int:
    """The most shares of a sequence where it is cut by its own length alone: 16 of 8 KV heads are a program an SM."""
    return min(32, max(16, 128 // kv_heads))


def invalid(config: Values, key: Key, workload: Workload, sms_a_program: int = 2) -> str | None:
    """Why a point need not run: it cannot fit, or another point does the same with less, or has a program for fewer SMs."""
    block_n, warps, stages, splits = (config[name] for name in TUNABLES)
    row_bytes = max(16, next_power_of_2(key.head_dim)) * (1 if "float8" in key.kv_dtype else 2)
    if 2 * stages * block_n * row_bytes > 227 * 1024:  # an H100's; the compiled kernel tells it exactly
        return "tiles in flight exceed shared memory"
    if exceeds_registers(rows_a_program(key.q_heads_per_kv * workload.q_len, key.head_dim), block_n, key.head_dim, warps):
        return "the accumulator and a tile exceed the registers"
    if key.head_dim <= 256 and warps * 8 > block_n * (1 if warps == 8 else 2):
        return "too few keys a warp"  # 8 warps on 32 keys won nothing either; at head_dim 512 they are needed for the columns
    if splits > 1 and splits * block_n > workload.kv_len:
        return "less than a tile a share"
    programs = workload.batch_size * workload.kv_heads
    if splits > 1 and programs * splits > 20 * key.sm_count:
        return "more than 20 programs an SM"
    more_splits = splits < TUNABLES["num_splits"][-1] and 4 * splits * block_n <= workload.kv_len
    if programs * splits * sms_a_program < key.sm_count and more_splits:
        return "leaves most SMs idle"
    return None


TEMPLATE = Template(
    name="decode",
    tunables=TUNABLES,
    runtime=frozenset({"num_splits"}),
    invalid=invalid,
    default=lambda key, workload: default_config(query_of(key, workload)),
    problem=lambda key, workload, **kw: AttentionProblem(launches, key, workload, **kw),
    jit_functions=JIT_FUNCTIONS,
    fit=fit,
)
