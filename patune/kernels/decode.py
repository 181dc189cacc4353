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
from .defaults import SPLITS, adapt, default_config, query_of
from .device import supports_pdl
from .primitives import LOG2E, add_sink, cap_logits, dot, kv_length, softmax_step
from .problem import AttentionProblem
from .sizes import MAX_GRID_Y, ceil_div, next_power_of_2
from .template import Launch, Template, Values


@triton.jit
def share_size(kv_indptr_ptr, batch_size, num_splits, window, Q_LEN, PAGE_SIZE, BLOCK_N, HAS_WINDOW):
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
def first_key(kv_len, window, Q_LEN, HAS_WINDOW: tl.constexpr):
    """The first key that any query of a sequence sees."""
    if HAS_WINDOW:
        return tl.maximum(kv_len - Q_LEN + 1 - window, 0)
    else:
        return kv_len * 0


@triton.jit
def find_share(kv_indptr_ptr, kv_last_page_len_ptr, batch_size, share, window, target, BY_ITEM: tl.constexpr,
               Q_LEN: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Walk the batch's shares in order. Returns (a sequence, the first share of that sequence).

    The sequence is the one that holds share `target` if BY_ITEM, else sequence `target` itself. A share past the
    last one gives batch_size.
    """
    b = 0
    first = 0
    total = 0
    for start in range(0, batch_size, BLOCK_B):
        offs = start + tl.arange(0, BLOCK_B)
        kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, offs, offs < batch_size, PAGE_SIZE)
        count = tl.cdiv(kv_len - first_key(kv_len, window, Q_LEN, HAS_WINDOW), share)
        count = tl.where(offs < batch_size, tl.maximum(count, 1), 0)  # an empty sequence has one: it writes zeros
        end = total + tl.cumsum(count, 0)
        before = (offs < batch_size) & ((end <= target) if BY_ITEM else (offs < target))
        b += tl.sum(before.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(before, end, 0), 0))
        total = tl.max(end, 0)
    return b, first


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
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Stage 1. Grid (kv_heads * row blocks, shares)."""
    ROWS: tl.constexpr = GROUP * Q_LEN  # row = query token * GROUP + head within the group
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    head_block = tl.program_id(0)
    kv_head = head_block // ROW_BLOCKS
    item = tl.program_id(1)
    if PDL:  # stage 2 may take its place as soon as the last program of this stage has taken one
        gdc_launch_dependents()

    share = 0
    first_item = item
    b = item
    if num_splits > 1:
        share = share_size(kv_indptr_ptr, batch_size, num_splits, window, Q_LEN, PAGE_SIZE, BLOCK_N, HAS_WINDOW)
        if batch_size == 1:
            b = 0
            first_item = 0
        else:
            b, first_item = find_share(kv_indptr_ptr, kv_last_page_len_ptr, batch_size, share, window, item, True,
                                       Q_LEN, PAGE_SIZE, HAS_WINDOW, BLOCK_B)  # fmt: skip
    if b >= batch_size:  # the grid holds the most shares that this batch could need
        return

    first_page = tl.load(kv_indptr_ptr + b)
    kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, b, True, PAGE_SIZE)
    seen_from = first_key(kv_len, window, Q_LEN, HAS_WINDOW)
    lo = seen_from + (item - first_item) * share
    hi = kv_len
    if num_splits > 1:
        hi = tl.minimum(lo + share, kv_len)
    if (lo >= hi) & (item > first_item):
        return

    rows = (head_block % ROW_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + rows % GROUP
    tokens = b.to(tl.int64) * Q_LEN + rows // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    q_mask = (rows < ROWS)[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + tokens[:, None] * stride_qt + heads[:, None] * stride_qh + offs_d[None, :] * stride_qd,
                mask=q_mask, other=0.0)  # fmt: skip  # [BLOCK_M, BLOCK_D]
    qk_scale = sm_scale
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr)
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
    HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Stage 2. Grid (q_heads, query tokens, BLOCK_D / BLOCK_DV); BLOCK_S shares are read at a time."""
    head = tl.program_id(0)
    token = tl.program_id(1)
    b = token // Q_LEN
    kv_len = kv_length(kv_indptr_ptr, kv_last_page_len_ptr, b, True, PAGE_SIZE)
    share = share_size(kv_indptr_ptr, batch_size, num_splits, window, Q_LEN, PAGE_SIZE, BLOCK_N, HAS_WINDOW)
    count = tl.cdiv(kv_len - first_key(kv_len, window, Q_LEN, HAS_WINDOW), share)
    first = 0
    if (batch_size > 1) & (count > 1):
        _, first = find_share(kv_indptr_ptr, kv_last_page_len_ptr, batch_size, share, window, b, False,
                              Q_LEN, PAGE_SIZE, HAS_WINDOW, BLOCK_B)  # fmt: skip

    if PDL:
        # All of the above needed only the page table, which is older than stage 1. Every program waits, also one that
        # then has nothing to do: whatever runs after this stage relies on it not ending before stage 1.
        gdc_wait()
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
    out = out_ptr + token.to(tl.int64) * stride_ot + head * stride_oh + offs_d * stride_od
    tl.store(out, o.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    if lse_ptr is not None:
        if tl.program_id(2) == 0:
            lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)
            tl.store(lse_ptr + token.to(tl.int64) * tl.num_programs(0) + head, lse)


TUNABLES = {
    "BLOCK_N": (16, 32, 64, 128),  # KV tokens a tile
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),  # KV tiles in flight, and one more being read
    "num_splits": SPLITS,  # mean shares a sequence
}
JIT_FUNCTIONS = (dot, kv_length, cap_logits, softmax_step, add_sink, share_size, first_key, find_share, decode_split, decode_reduce)
BLOCK_B = 128  # sequences looked at together when shares are counted


def launches(
    q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, config, *,
    sm_scale, q_len=1, window=None, soft_cap=None, sinks=None, k_scale=None, v_scale=None, v_factor=1.0,
) -> list[Launch]:  # fmt: skip
    """The launches of one decode: stage 1 alone if num_splits is 1, else both stages.

    q [batch * q_len, q_heads, head_dim]; `cache` a PagedCache; out like q; lse [batch * q_len, q_heads] fp32 or None.
    """
    batch_size, q_heads, head_dim = kv_indptr.shape[0] - 1, q.shape[1], q.shape[2]
    group, num_splits = q_heads // cache.kv_heads, config["num_splits"]
    rows = group * q_len
    block_m = min(max(16, next_power_of_2(rows)), 64)
    block_d = max(16, next_power_of_2(head_dim))
    # share_size() says why there are at most this many; one sequence has exactly num_splits
    shares = num_splits if batch_size == 1 else num_splits * batch_size + (batch_size - 1 if num_splits > 1 else 0)
    if max(shares, batch_size * q_len) > MAX_GRID_Y:
        raise ValueError(
            f"q: {batch_size} sequences in {num_splits} splits each need more than a grid's {MAX_GRID_Y} programs; cut the batch"
        )
    slots = shares * cache.kv_heads * rows if num_splits > 1 else 0  # empty, not None: None would compile another variant
    partial = torch.empty(slots * block_d, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(slots, dtype=torch.float32, device=q.device)
    pdl = supports_pdl()
    shared = dict(
        kv_indptr_ptr=kv_indptr, kv_last_page_len_ptr=kv_last_page_len, sinks_ptr=sinks, v_scale_ptr=v_scale,
        out_ptr=out, lse_ptr=lse, partial_ptr=partial, partial_lse_ptr=partial_lse, v_scale=v_factor,
        window=window or 0, batch_size=batch_size, num_splits=num_splits,
        stride_ot=out.stride(0), stride_oh=out.stride(1), stride_od=out.stride(2),
        HEAD_DIM=head_dim, PAGE_SIZE=cache.page_size, GROUP=group, Q_LEN=q_len, HAS_WINDOW=window is not None, PDL=pdl,
        BLOCK_N=config["BLOCK_N"], BLOCK_D=block_d, BLOCK_B=BLOCK_B,
    )  # fmt: skip
    split = Launch(decode_split, (cache.kv_heads * ceil_div(rows, block_m), shares), dict(
        shared, q_ptr=q, k_ptr=cache.k, v_ptr=cache.v, kv_indices_ptr=kv_indices, k_scale_ptr=k_scale,
        sm_scale=sm_scale, soft_cap=soft_cap or 0.0, HAS_SOFT_CAP=soft_cap is not None, BLOCK_M=block_m,
        stride_qt=q.stride(0), stride_qh=q.stride(1), stride_qd=q.stride(2),
        stride_kp=cache.k_strides[0], stride_kh=cache.k_strides[1], stride_kt=cache.k_strides[2],
        stride_vp=cache.v_strides[0], stride_vh=cache.v_strides[1], stride_vt=cache.v_strides[2],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    ))  # fmt: skip
    if num_splits == 1:
        return [split]
    # A few rows leave most SMs idle, so each is cut into 32 columns; many rows fill the GPU as they are.
    block_dv = min(block_d, 32 if batch_size * q_len * q_heads <= 256 else 128)
    reduce = Launch(decode_reduce, (q_heads, batch_size * q_len, block_d // block_dv), dict(
        shared, BLOCK_S=16, BLOCK_DV=block_dv, num_warps=2 if block_dv == 32 else 4, **({"launch_pdl": True} if pdl else {}),
    ))  # fmt: skip
    return [split, reduce]


def invalid(config: Values, key: Key, workload: Workload) -> str | None:
    """Why a point need not run: it cannot fit, or another point does the same with less."""
    block_n, warps, stages, splits = (config[name] for name in TUNABLES)
    row_bytes = max(16, next_power_of_2(key.head_dim)) * (1 if "float8" in key.kv_dtype else 2)
    if 2 * stages * block_n * row_bytes > 227 * 1024:  # an H100's; the compiled kernel tells it exactly
        return "tiles in flight exceed shared memory"
    if warps * 8 > block_n * 2:
        return "fewer than 4 keys a warp"
    if splits > 1 and splits * block_n > workload.kv_len:
        return "less than a tile a share"
    programs = workload.batch_size * workload.kv_heads
    if splits > 1 and programs * splits > 20 * key.sm_count:
        return "more than 20 programs an SM"
    if programs * splits * 2 < key.sm_count and splits < TUNABLES["num_splits"][-1] and 4 * splits * block_n <= workload.kv_len:
        return "leaves most SMs idle"
    return None


def fit(config: Values, key: Key, of: Workload, to: Workload) -> dict[str, int]:
    """A config for another workload: an SM gets as many programs, so the splits change."""
    return adapt(dict(config=config, batch_size=of.batch_size, kv_heads=of.kv_heads, sm_count=key.sm_count), query_of(key, to))


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
