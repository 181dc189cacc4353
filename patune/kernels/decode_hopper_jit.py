"""Device code of the template "decode_hopper": stage 1 of a paged decode, warp-specialised, for sm_90.

Grid, cut into shares, partials and results are those of the plain template's stage 1, so its stage 2 reduces them. A program is a
producer warp, which finds the share and streams its KV tiles by TMA into a ring in shared memory, one box a page, and consumer
warps, which own a part of every tile's tokens each, with an online softmax of their own: one batched MMA, the batch over warps.
Nothing crosses warps until the share ends; then their states are merged through the idle ring.

An fp8 cache stays fp8 in the ring; in the registers it becomes fp16, which holds every value of e4m3 and e5m2, and so does Q.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .cluster_jit import enter, reduce_in_cluster, reserve_inbox
from .decode import own_share_size

LOG2E = gl.constexpr(1.4426950408889634)  # the kernel works in base 2: exp2 is one instruction, exp is two


# ---- which share is this program's


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def pick(hit, x):
    return gl.sum(gl.where(hit, x, 0), 0)


@gluon.jit
def place(CLUSTER: gl.constexpr):
    """This program's KV head, of how many, and its share. The programs of a cluster are neighbours: the shares of a sequence."""
    head = gl.program_id(0) // CLUSTER
    item = gl.program_id(1) * CLUSTER + gl.program_id(0) % CLUSTER
    return head, gl.num_programs(0) // CLUSTER, item


@gluon.jit
def own_share(batch, b, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of sequence b, its first page, its KV tokens, and the tokens of a share where they alone decide."""
    kv_indptr_ptr, kv_last_page_len_ptr, _, num_splits = batch
    first_page = gl.load(kv_indptr_ptr + b)
    pages = gl.load(kv_indptr_ptr + b + 1) - first_page
    last_page_len = gl.load(kv_last_page_len_ptr + b)
    kv_len = gl.where(pages > 0, (pages - 1) * PAGE_SIZE + last_page_len, 0)
    return first_page, kv_len, own_share_size(kv_len, num_splits, 1, BLOCK_N)


@gluon.jit
def find_share(batch, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_B: gl.constexpr, CLUSTER: gl.constexpr):
    """This program's share: (its sequence's first page and KV tokens, its first tile, its tiles, the sequence, whether it is all of
    it, whether there is a share).

    Cut as `decode_reduce` assumes: by share_size() over the batch, a sequence of its own by own_share_size(), as in a cluster.
    """
    kv_indptr_ptr, kv_last_page_len_ptr, batch_size, num_splits = batch
    _, _, item = place(CLUSTER)
    b = item // num_splits
    first_item = b * num_splits
    found = item >= 0
    if CLUSTER > 1 or (num_splits == 1) | (batch_size == 1):
        first_page, kv_len, share = own_share(batch, b, PAGE_SIZE, BLOCK_N)
    else:
        # Every warp looks at the whole batch and none waits for another.
        layout: gl.constexpr = gl.BlockedLayout([BLOCK_B // 32], [32], [gl.num_warps()], [0])
        start_page = gl.load(kv_indptr_ptr)
        pages = gl.load(kv_indptr_ptr + batch_size) - start_page
        share = pages
        b = item * 0
        first_item = b
        first_page = b
        kv_len = b
        shares = b
        total = b
        for start in range(0, batch_size, BLOCK_B):
            offs = start + gl.arange(0, BLOCK_B, layout)
            inside = offs < batch_size
            first = gl.load(kv_indptr_ptr + offs, mask=inside, other=0)
            n = gl.load(kv_indptr_ptr + offs + 1, mask=inside, other=0) - first
            last_page_len = gl.load(kv_last_page_len_ptr + offs, mask=inside, other=0)
            if start == 0:  # after the loads above have been sent, so that the latency is paid once
                share = gl.cdiv(pages.to(gl.int64) * PAGE_SIZE, num_splits * batch_size).to(gl.int32)
                share = gl.maximum(gl.cdiv(share, BLOCK_N), 1) * BLOCK_N
            n = gl.where(n > 0, (n - 1) * PAGE_SIZE + last_page_len, 0)
            count = gl.where(inside, gl.maximum(gl.cdiv(n, share), 1), 0)  # an empty sequence has one: it writes zeros
            end = total + gl.associative_scan(count, 0, add)
            hit = (end - count <= item) & (item < end)
            b += pick(hit, offs)
            first_item += pick(hit, end - count)
            first_page += pick(hit, first)
            kv_len += pick(hit, n)
            shares += pick(hit, count)
            total += gl.sum(count, 0)
        found = shares > 0
    tile = (item - first_item) * (share // BLOCK_N)
    tiles = gl.maximum(gl.minimum(share // BLOCK_N, gl.cdiv(kv_len, BLOCK_N) - tile), 0)
    return first_page, kv_len, tile, tiles, b, kv_len <= share, found & ((tiles > 0) | (item == first_item))


# ---- when to begin


@gluon.jit
def begin(beside):
    """Wait for what ran before. Beside the kernel before it this one need not: that one has waited for the rest."""
    if beside == 0:
        gdc_wait()


# ---- the producer


@gluon.jit
def page_ids(kv_indices_ptr, first_page, kv_len, first_box, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr):
    """The page ids of 32 boxes, one a lane. Past the sequence's end they repeat its last one."""
    box = first_box + gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    page = gl.minimum(box * BOX, gl.maximum(kv_len - 1, 0)) // PAGE_SIZE
    return gl.load(kv_indices_ptr + first_page + page, mask=(box >= 0) & (kv_len > 0), other=0)


@gluon.jit
def produce(
    k_desc, v_desc, k_strides, v_strides, kv_indices_ptr, batch, beside, ring, full, empty,
    PAGE_SIZE: gl.constexpr, BLOCK_B: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """The producer warp: every tile of this program's share into the ring."""
    STAGES: gl.constexpr = full.shape[0]
    BLOCK_N: gl.constexpr = ring.shape[1]
    BOX: gl.constexpr = k_desc.block_type.shape[0]
    BOXES: gl.constexpr = BLOCK_N // BOX  # a tile
    AHEAD: gl.constexpr = 32 // BOXES  # tiles whose page ids one load brings
    enter(CLUSTER)
    begin(beside)
    gdc_launch_dependents()
    first_page, kv_len, tile, tiles, _, _, _ = find_share(batch, PAGE_SIZE, BLOCK_N, BLOCK_B, CLUSTER)
    k_page_rows, k_head_rows, k_head_columns = k_strides
    v_page_rows, v_head_rows, v_head_columns = v_strides
    head, _, _ = place(CLUSTER)
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    ids = page_ids(kv_indices_ptr, first_page, kv_len, tile * BOXES, PAGE_SIZE, BOX)
    g = gl.to_tensor(0)  # tiles so far
    for start in range(0, tiles, AHEAD):
        these = ids
        ids = page_ids(kv_indices_ptr, first_page, kv_len, (tile + start + AHEAD) * BOXES, PAGE_SIZE, BOX)  # while TMA runs
        for t in range(gl.minimum(AHEAD, tiles - start)):
            stage = g % STAGES
            mbarrier.wait(empty.index(stage), ((g // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * BOXES * k_desc.block_type.nbytes)
            page_row = (tile + g) * BLOCK_N % PAGE_SIZE  # the first one but where a page is larger than the tile
            for i in gl.static_range(BOXES):
                page = pick(lane == t * BOXES + i, these)
                k_row = page * k_page_rows + head * k_head_rows + page_row
                v_row = page * v_page_rows + head * v_head_rows + page_row
                k_box = ring.index(2 * stage).slice(i * BOX, BOX, 0)
                v_box = ring.index(2 * stage + 1).slice(i * BOX, BOX, 0)
                tma.async_copy_global_to_shared(k_desc, [k_row, head * k_head_columns], full.index(stage), k_box)
                tma.async_copy_global_to_shared(v_desc, [v_row, head * v_head_columns], full.index(stage), v_box)
            g += 1


# ---- the consumers


@gluon.jit
def to_fp16(q):
    """q [warps, D, queries] times a power of two that brings its largest element to about 2^14, as fp16, and that power:
    decode.to_fp16 in Gluon."""
    size = gl.abs(q.to(gl.float32))
    size = gl.where(size < float("inf"), size, 0.0)
    largest = gl.max(gl.max(gl.max(size, 1), 1), 0)
    q_scale = gl.exp2(14 - gl.floor(gl.log2(gl.maximum(largest, 1e-30))))
    return (q.to(gl.float32) * q_scale).to(gl.float16), q_scale


@gluon.jit
def unpack(x, IS_E5M2: gl.constexpr):
    """The two fp8 in each 16 bits of x as fp16: the lower ones, the upper ones. Four values take three instructions, e5m2's two."""
    # An e5m2 is the upper byte of an fp16; e4m3 are converted by neighbours, so the lower ones are brought together first.
    E5M2: gl.constexpr = "prmt.b32 $0, $2, 0, 0x2404; prmt.b32 $1, $2, 0, 0x3414;"
    E4M3: gl.constexpr = """{
        .reg .b32 t;
        .reg .b16 lower, upper;
        prmt.b32 t, $2, 0, 0x3120;
        mov.b32 {lower, upper}, t;
        cvt.rn.f16x2.e4m3x2 $0, lower;
        cvt.rn.f16x2.e4m3x2 $1, upper;
    }"""
    return gl.inline_asm_elementwise(
        E5M2 if IS_E5M2 else E4M3, "=r,=r,r", [x], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
    )


@gluon.jit
def clear_tail(v, rows):
    """Zeros into the tile's rows from `rows` on: they may hold a NaN, which a weight of 0 would not silence."""
    STEP: gl.constexpr = 8  # rows: what a swizzled tile can be sliced by, and few registers
    D: gl.constexpr = v.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    for i in gl.static_range(v.shape[0] // STEP):
        if (i + 1) * STEP > rows:
            part = v.slice(i * STEP, STEP, 0)
            x = part.load(layout)
            row = i * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
            part.store(gl.where((row < rows)[:, None], x, 0).to(x.dtype))
    fence_async_shared()


@gluon.jit
def as_operand(p, LP: gl.constexpr):
    """p [warps, keys, queries], left by an MMA, as the second operand of one: blocks of 8 by 8 are transposed in the registers."""
    KEYS: gl.constexpr = p.shape[1]
    QUERIES: gl.constexpr = p.shape[2]
    p = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], dtype=p.dtype, is_pure=False, pack=2
    )
    p = p.reshape([p.shape[0], KEYS // 8, 8, QUERIES // 8, 8]).permute((0, 1, 4, 3, 2)).reshape([p.shape[0], KEYS, QUERIES])
    return gl.convert_layout(p, LP, assert_trivial=True)


@gluon.jit
def attend(
    q_ptr, exponent, ring, full, empty, tiles, valid, stride_qt, stride_qh,
    GROUP: gl.constexpr, Q_LEN: gl.constexpr, QUERIES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Attention over the share's tiles, of which `valid` tokens are left in the sequence. Each warp its own tokens of a tile.

    Everything is transposed, keys by queries: of an MMA's sides, the queries' is the one that can be 8. Returns acc [warps, D,
    queries], its maximum m and sum l in base 2 [warps, queries].
    """
    STAGES: gl.constexpr = full.shape[0]
    BLOCK_N: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    PART: gl.constexpr = BLOCK_N // WARPS  # tokens of a tile that are a warp's
    FP8: gl.constexpr = ring.dtype.primitive_bitwidth == 8
    WIDTH: gl.constexpr = 4 if FP8 else 2  # neighbouring columns that a thread holds of Q and K: 32 bits of K
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    LK: gl.constexpr = gl.DotOperandLayout(0, L, WIDTH)
    LQ: gl.constexpr = gl.DotOperandLayout(1, L, WIDTH)
    LV: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LP: gl.constexpr = gl.DotOperandLayout(1, L, 2)
    values = ring  # of V
    if FP8:  # in pairs: what is transposed on its way to the registers has 16 bits
        PAIRS: gl.constexpr = gl.NVMMASharedLayout(ring.layout.swizzle_byte_width, element_bitwidth=16, rank=2)
        values = ring._reinterpret(gl.int16, [2 * STAGES, BLOCK_N, D // 2], PAIRS)

    row = gl.arange(0, QUERIES, gl.SliceLayout(0, gl.SliceLayout(1, LQ)))[None, None, :]
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(2, LQ)))[None, :, None]
    row = gl.zeros([WARPS, D, QUERIES], gl.int32, LQ) + row
    q = gl.load(q_ptr + ((row // GROUP) * stride_qt + (row % GROUP) * stride_qh + column), mask=row < GROUP * Q_LEN, other=0.0)
    if FP8 and q.dtype == gl.bfloat16:
        q, q_scale = to_fp16(q)
        exponent /= q_scale
    WIDE: gl.constexpr = D * QUERIES > 2048  # then every tile takes q: it and acc together exceed the registers
    if WIDE:
        Q_SHARED: gl.constexpr = gl.SwizzledSharedLayout(4 * WIDTH, 1, 16 // WIDTH, order=[2, 1, 0])
        q_tile = gl.allocate_shared_memory(q.dtype, [WARPS, QUERIES, D], Q_SHARED).permute((0, 2, 1))
        q_tile.store(q)

    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    key = gl.arange(0, PART, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None] + warp * PART
    if Q_LEN > 1:  # bottom-right aligned: a query sees as many keys less as there are queries after it
        key = key + (Q_LEN - 1 - gl.arange(0, QUERIES, gl.SliceLayout(0, gl.SliceLayout(1, L))) // GROUP)[None, None, :]

    g = gl.to_tensor(0)
    m = gl.full([WARPS, QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, L))
    l = gl.zeros([WARPS, QUERIES], gl.float32, gl.SliceLayout(1, L))
    acc = gl.zeros([WARPS, D, QUERIES], gl.float32, L)
    for _ in range(tiles):
        stage = g % STAGES
        k_tile = ring.index(2 * stage)
        v_tile = values.index(2 * stage + 1)
        mbarrier.wait(full.index(stage), (g // STAGES) & 1)
        if WIDE:
            q = q_tile.load(LQ)
        if valid < BLOCK_N:
            clear_tail(v_tile, valid)
        k = k_tile.reshape([WARPS, PART, D]).load(LK).to(q.dtype)
        s = mma_v2(k, q, gl.zeros([WARPS, PART, QUERIES], gl.float32, L))
        v = v_tile.reshape([WARPS, PART, v_tile.shape[1]]).permute((0, 2, 1)).load(LV)
        mbarrier.arrive(empty.index(stage), count=1)  # before what takes time
        s = gl.where(key < valid, s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1) * exponent)
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s * exponent - shift[:, None, :])
        alpha = gl.exp2(m - shift)
        l = l * alpha + gl.sum(p, 1)
        acc = acc * alpha[:, None, :]
        m = m_new
        if FP8:  # the even columns, then the odd ones; so in acc
            v = gl.join(*unpack(v, ring.dtype == gl.float8e5)).permute((0, 3, 1, 2)).reshape([WARPS, D, PART])
            v = gl.convert_layout(v, LV, assert_trivial=True)
        acc = mma_v2(v, as_operand(p.to(q.dtype), LP), acc)
        valid -= BLOCK_N
        g += 1
    if FP8:
        acc = acc.reshape([WARPS, 2, D // 2, QUERIES]).permute((0, 2, 1, 3)).reshape([WARPS, D, QUERIES])
    return acc, m, l


@gluon.jit
def merge(acc, m, l, meet, meet_ml, LO: gl.constexpr):
    """The warps' states as one: o [queries, D] not yet divided by l, m and l [queries], in slices of the layout LO."""
    ML: gl.constexpr = gl.SliceLayout(2, LO)  # a thread holds all warps' values of its rows
    R: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, LO))
    meet.permute((0, 2, 1)).store(acc)
    meet_ml.index(0).store(m)
    meet_ml.index(1).store(l)
    m = meet_ml.index(0).load(ML)
    top = gl.max(m, 0)
    weight = gl.exp2(m - gl.expand_dims(gl.where(top == float("-inf"), 0.0, top), 0))
    l = gl.sum(meet_ml.index(1).load(ML) * weight, 0)
    o = gl.sum(meet.load(LO) * weight[:, :, None], 0)
    return o, gl.convert_layout(top, R, assert_trivial=True), gl.convert_layout(l, R, assert_trivial=True)


@gluon.jit
def consume(
    q_ptr, results, batch, beside, strides, exponent, v_scale, scales, ring, full, empty, meet, meet_ml, inbox,
    GROUP: gl.constexpr, Q_LEN: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK_B: gl.constexpr, CLUSTER: gl.constexpr,
    HAS_LSE: gl.constexpr, HAS_K_SCALE: gl.constexpr, HAS_V_SCALE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The consumer warps: the share's attention, to the output where it is the whole sequence, else to a partial; in a cluster, the
    cluster's part of the output."""
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr = results
    stride_qt, stride_qh, stride_ot, stride_oh = strides
    k_scale_ptr, v_scale_ptr = scales
    BLOCK_N: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    ROWS: gl.constexpr = GROUP * Q_LEN  # row = query token * GROUP + head within the group
    LO: gl.constexpr = gl.BlockedLayout(
        [WARPS, 1, 4], [1, 128 // D if D < 128 else 1, D // 4 if D < 128 else 32], [1, WARPS, 1], [2, 1, 0]
    )
    enter(CLUSTER)
    begin(beside)
    _, kv_len, tile, tiles, b, alone, found = find_share(batch, PAGE_SIZE, BLOCK_N, BLOCK_B, CLUSTER)
    if CLUSTER > 1 or found:
        head, kv_heads, item = place(CLUSTER)
        first_token = b.to(gl.int64) * Q_LEN
        first_head = head.to(gl.int64) * GROUP
        q_ptr += first_token * stride_qt + first_head * stride_qh
        valid = kv_len - tile * BLOCK_N
        if HAS_K_SCALE:
            exponent *= gl.load(k_scale_ptr)
        acc, m, l = attend(
            q_ptr, exponent, ring, full, empty, tiles, valid, stride_qt, stride_qh, GROUP, Q_LEN, meet.shape[1], WARPS
        )
        o, m, l = merge(acc, m, l, meet, meet_ml, LO)
        first_column = 0
        if CLUSTER > 1:
            first_column = item % CLUSTER * (D // CLUSTER)
            o, m, l = reduce_in_cluster(o, m, l, inbox, item % CLUSTER, ROWS, CLUSTER)
        rows = gl.arange(0, o.shape[0], gl.SliceLayout(1, o.type.layout))
        columns = first_column + gl.arange(0, o.shape[1], gl.SliceLayout(0, o.type.layout))
        inside = rows < ROWS
        o = o / gl.where(l == 0.0, 1.0, l)[:, None]
        if CLUSTER > 1 or alone:
            if HAS_V_SCALE:
                v_scale *= gl.load(v_scale_ptr)
            tokens = first_token + rows // GROUP
            heads = first_head + rows % GROUP
            pointers = out_ptr + (tokens * stride_ot + heads * stride_oh)[:, None] + columns[None, :]
            gl.store(pointers, (o * v_scale).to(out_ptr.dtype.element_ty), mask=inside[:, None])
            if HAS_LSE:
                lse = gl.where(l == 0.0, float("-inf"), (m + gl.log2(l)) / LOG2E)
                gl.store(lse_ptr + tokens * (kv_heads * GROUP) + heads, lse, mask=inside & (first_column == 0))
        else:
            # partials: [shares, kv_heads, ROWS, D] fp32, and their log-sum-exp in base 2 [shares, kv_heads, ROWS]
            slot = (item.to(gl.int64) * kv_heads + head) * ROWS + rows
            lse = gl.where(l == 0.0, float("-inf"), m + gl.log2(l))
            gl.store(partial_ptr + slot[:, None] * D + columns[None, :], o, mask=inside[:, None])
            gl.store(partial_lse_ptr + slot, lse, mask=inside)


@gluon.jit
def idle(CLUSTER: gl.constexpr):
    """A warp that is there only because registers are dealt out to four warps at a time, and that its cluster waits for.

    In the programs that are launched last it waits for what this kernel runs beside, so that who waits for this kernel waits for
    both.
    """
    enter(CLUSTER)
    if gl.program_id(1) == gl.num_programs(1) - 1:  # not the very last one alone: head_dim 256 with 16 queries would spill more
        gdc_wait()


@gluon.jit(
    do_not_specialize=[
        "batch_size", "num_splits", "beside",
        "k_page_rows", "k_head_rows", "k_head_columns", "v_page_rows", "v_head_rows", "v_head_columns",
    ],
    do_not_specialize_on_alignment=["kv_indices_ptr", "kv_indptr_ptr", "kv_last_page_len_ptr"],
)  # fmt: skip
def decode_split_hopper(
    q_ptr, k_desc, v_desc, kv_indices_ptr, kv_indptr_ptr, kv_last_page_len_ptr, k_scale_ptr, v_scale_ptr,
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, sm_scale, v_scale, batch_size, num_splits, beside,
    k_page_rows, k_head_rows, k_head_columns, v_page_rows, v_head_rows, v_head_columns,
    stride_qt, stride_qh, stride_ot, stride_oh,
    GROUP: gl.constexpr, Q_LEN: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_B: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Stage 1. Grid (kv_heads, shares), or (kv_heads * CLUSTER, batch) in clusters along x. GROUP * Q_LEN is at most 16."""
    WARPS: gl.constexpr = gl.num_warps()
    D: gl.constexpr = k_desc.block_type.shape[1]
    inbox = 0
    if CLUSTER > 1:
        inbox = reserve_inbox(GROUP * Q_LEN, D, CLUSTER)
    # K tile of stage s at 2 s, V tile at 2 s + 1; a barrier says full or empty for both.
    ring = gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES, BLOCK_N, D], k_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # The ring is idle once the last tile has been read, so the warps' states meet in it.
    QUERIES: gl.constexpr = 8 if GROUP * Q_LEN <= 8 else 16  # a side of the MMA tile
    meet = ring._reinterpret(gl.float32, [WARPS, QUERIES, D], gl.SwizzledSharedLayout(4, 1, 8, order=[2, 1, 0]))
    meet_ml = gl.allocate_shared_memory(gl.float32, [2, WARPS, QUERIES], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
    HAS_LSE: gl.constexpr = lse_ptr is not None
    if not HAS_LSE:
        lse_ptr = partial_lse_ptr  # a partition takes no None
    HAS_K_SCALE: gl.constexpr = k_scale_ptr is not None
    if not HAS_K_SCALE:
        k_scale_ptr = partial_lse_ptr
    HAS_V_SCALE: gl.constexpr = v_scale_ptr is not None
    if not HAS_V_SCALE:
        v_scale_ptr = partial_lse_ptr
    batch = (kv_indptr_ptr, kv_last_page_len_ptr, batch_size, num_splits)
    results = (out_ptr, lse_ptr, partial_ptr, partial_lse_ptr)
    strides = (stride_qt, stride_qh, stride_ot, stride_oh)
    scales = (k_scale_ptr, v_scale_ptr)
    k_strides = (k_page_rows, k_head_rows, k_head_columns)
    v_strides = (v_page_rows, v_head_rows, v_head_columns)
    exponent = sm_scale * LOG2E
    gl.warp_specialize(
        [
            (consume, (q_ptr, results, batch, beside, strides, exponent, v_scale, scales, ring, full, empty, meet, meet_ml, inbox,
                       GROUP, Q_LEN, PAGE_SIZE, BLOCK_B, CLUSTER, HAS_LSE, HAS_K_SCALE, HAS_V_SCALE, WARPS)),
            (produce, (k_desc, v_desc, k_strides, v_strides, kv_indices_ptr, batch, beside, ring, full, empty,
                       PAGE_SIZE, BLOCK_B, CLUSTER)),
            (idle, (CLUSTER,)),
            (idle, (CLUSTER,)),
        ],
        [1, 1, 2], [PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
