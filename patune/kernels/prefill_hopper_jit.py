"""Device code of the template "prefill_hopper": warp-specialised causal attention over a paged cache, for sm_90.

A program is three warpgroups' worth of registers: two consumer groups of 64 query rows each, and three warps that feed them.
One warp finds work, one fills a ring of K tiles (and Q), one a ring of V tiles, by TMA, one box a page, straight from the pool.
K and V have a warp each because their slots come free at different times. A consumer computes S = Q K^T, the online softmax, and
O += P V with wgmma; P never leaves its registers. While one group is in its softmax the other one has the tensor cores (by chance,
or IN_TURN by two named barriers), and within a group the softmax of a tile overlaps the P V of the tile before. Long runs are at
the GPU's power limit, so an instruction saved pays twice: it leaves time, and a higher clock.

A program takes many items, the longest ones of the whole batch first. An item is up to 128 query rows of one KV head: TOKENS rows,
for as many tokens, of each of HEADS query heads, one head after the other, so that few new tokens a sequence fill it too. TOKENS is
a multiple of 8, the rows that shared memory swizzles together; 5 heads have 24 tokens and leave 8 rows idle. Keys are walked from
the diagonal down: the masked tiles, the tail of the last page among them, come first, and the rest needs no mask. Items beyond as
many waves of programs as they fill are cut along their keys into as many parts as fill one more, and prefill_join_jit.py joins
those.

Barriers. Every ring has `full` (TMA's bytes have landed) and `empty` (both groups have read it), each counted with one running
number of tiles that never restarts: slot g % STAGES, phase (g // STAGES) % 2. Q is free when the item's last K is. Items go to
the groups and to the loading warps through a ring of two records, so the next one is known before this one is done.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = gl.constexpr(1.4426950408889634)  # the kernel works in base 2: exp2 is one instruction, exp is two
ROWS = gl.constexpr(64)  # query rows of a consumer group: the M of one wgmma
GROUPS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)  # ROWS * GROUPS
SLACK = gl.constexpr(8.0)  # in base 2: how far a row's maximum may outgrow what its exponents are taken against
SLOT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))  # of a ring, see tile_layout
FIELDS = gl.constexpr(13)  # int32 slots of an item's record
MIN_KEYS = gl.constexpr(512)  # of a part of an item: less is not worth joining
TURN = gl.constexpr(8)  # named barriers TURN + group: the group's turn to issue; the compiler uses those below 8
TAIL = gl.constexpr(10)  # both groups have cleared their part of V


@gluon.jit
def sync(barrier):
    """Wait at a named barrier for both groups."""
    gl.inline_asm_elementwise("bar.sync $1, 256; mov.b32 $0, $1;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def signal(barrier):
    """Arrive at a named barrier where the other group waits."""
    gl.inline_asm_elementwise("bar.arrive $1, 256; mov.b32 $0, $1;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


# ---- which item is next


@gluon.jit
def clear_counter(counter_ptr):
    """Grid (1,): the counter that the next kernel's programs take items from. A launch, since a counter that each call leaves at 0
    for the next one would be shared by calls on two streams."""
    gdc_launch_dependents()
    gdc_wait()  # the memory may have been another kernel's until now
    gl.store(counter_ptr, 0)


@gluon.jit
def sequences(batch, start, PAGE_SIZE: gl.constexpr, TOKENS: gl.constexpr, BLOCK_B: gl.constexpr):
    """Query blocks and the level of the first one, of the sequences from `start` on; [BLOCK_B] each, 0 blocks after the last.

    A block is TOKENS query tokens. BLOCK_M // TOKENS of them, tokens that read almost the same keys, have one level: how many times
    BLOCK_M keys lie before them, which is their cost. The next ones of the sequence have the next level.
    """
    qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, batch_size = batch
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_B // 32], [32], [1], [0])
    b = start + gl.arange(0, BLOCK_B, layout)
    inside = b < batch_size
    q_len = gl.load(qo_indptr_ptr + b + 1, mask=inside, other=0) - gl.load(qo_indptr_ptr + b, mask=inside, other=0)
    pages = gl.load(kv_indptr_ptr + b + 1, mask=inside, other=0) - gl.load(kv_indptr_ptr + b, mask=inside, other=0)
    last = gl.load(kv_last_page_len_ptr + b, mask=inside, other=0)
    kv_len = gl.where(pages > 0, (pages - 1) * PAGE_SIZE + last, 0)
    return (q_len + TOKENS - 1) // TOKENS, gl.maximum(kv_len - q_len, 0) // BLOCK_M


@gluon.jit
def blocks_above(level, batch, PAGE_SIZE: gl.constexpr, TOKENS: gl.constexpr, BLOCK_B: gl.constexpr):
    """How many query blocks of the batch have a level above `level`, and one more than the highest level."""
    _, _, _, batch_size = batch
    LEVEL: gl.constexpr = BLOCK_M // TOKENS  # blocks of one
    count = 0
    levels = 0
    for start in range(0, batch_size, BLOCK_B):
        blocks, first = sequences(batch, start, PAGE_SIZE, TOKENS, BLOCK_B)
        count += gl.sum(gl.minimum(gl.maximum(blocks - (level + 1 - first) * LEVEL, 0), blocks), 0)
        levels = gl.maximum(levels, gl.max(first + (blocks + LEVEL - 1) // LEVEL, 0))
    return count, levels


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def find_block(x, heads, high, before, batch, PAGE_SIZE: gl.constexpr, TOKENS: gl.constexpr, BLOCK_B: gl.constexpr):
    """Item x of the batch, counted from the highest level down: its sequence, the first of the blocks that this has at the item's
    level, how many they are, the item's place among theirs, the level, and how many blocks are above it.

    It is at level `high`, above which `before` blocks are, or below: where the item before it was. The next item is mostly at the
    same level or near it, so steps down double until they are below it, and the rest is bisected.
    """
    LEVEL: gl.constexpr = BLOCK_M // TOKENS
    low = high
    step = 1
    while low == high:
        low = gl.maximum(high - step, -1)
        count, _ = blocks_above(low, batch, PAGE_SIZE, TOKENS, BLOCK_B)
        if count * heads <= x:
            high = low
            before = count
        step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        count, _ = blocks_above(middle, batch, PAGE_SIZE, TOKENS, BLOCK_B)
        if count * heads <= x:
            high = middle
            before = count
        else:
            low = middle
    _, _, _, batch_size = batch
    b = 0
    first_block = 0
    blocks_here = 0  # of the sequence, at this level
    place = 0  # among the sequence's items of this level
    rank = x - before * heads  # among all of this level
    for start in range(0, batch_size, BLOCK_B):
        blocks, first = sequences(batch, start, PAGE_SIZE, TOKENS, BLOCK_B)
        skipped = (high - first) * LEVEL
        here = gl.where(skipped >= 0, gl.minimum(gl.maximum(blocks - skipped, 0), LEVEL), 0)
        end = gl.associative_scan(here, 0, add) * heads
        ahead = end - here * heads
        hit = (ahead <= rank) & (rank < end)
        b += gl.sum(gl.where(hit, start + gl.arange(0, BLOCK_B, hit.type.layout), 0), 0)
        first_block += gl.sum(gl.where(hit, skipped, 0), 0)
        blocks_here += gl.sum(gl.where(hit, here, 0), 0)
        place += gl.sum(gl.where(hit, rank - ahead, 0), 0)
        rank -= gl.sum(here, 0) * heads
    return b, first_block, blocks_here, place, high, before


@gluon.jit
def put(records, slot, FIELD: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    records.index(slot * FIELDS + FIELD).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def get(records, slot, FIELD: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(records.index(slot * FIELDS + FIELD).load(layout), 0)


@gluon.jit
def find_items(
    items, batch, work, counter_ptr,
    PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr, CAUSAL: gl.constexpr,
    DYNAMIC: gl.constexpr, SPLITS: gl.constexpr, BLOCK_B: gl.constexpr,
):  # fmt: skip
    """The finding warp: a record of every item of this program, then one without tiles.

    With SPLITS the items beyond whole waves of programs are cut into as many parts as fill one more wave, at most num_splits, none
    with less than MIN_KEYS. tails_ptr then has, for prefill_join, how many such items there are and their parts, and from 4 on
    four numbers for each: its first token, how many of them are the sequence's, its first head, and the parts that it has keys for.
    """
    records, item_full, item_empty = items
    qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, batch_size = batch
    q_heads, num_splits, tails_ptr, stride_ot, stride_oh = work
    LEVEL: gl.constexpr = BLOCK_M // TOKENS
    heads = q_heads // HEADS
    blocks, levels = blocks_above(-1, batch, PAGE_SIZE, TOKENS, BLOCK_B)
    level = levels - 1
    before = 0
    programs = gl.num_programs(0)
    whole = blocks * heads  # items that are not cut
    tails = 0
    parts = 1
    if SPLITS:
        tails = whole % programs
        parts = gl.minimum(num_splits, programs // gl.maximum(tails, 1))
        tails = gl.where(parts > 1, tails, 0)
        whole -= tails
        if gl.program_id(0) == 0:
            gl.store(tails_ptr, tails)
            gl.store(tails_ptr + 1, parts)
    item = gl.program_id(0)
    turn = 0
    taken = 0  # items so far
    while item < whole + tails * parts:
        x = item
        split = 0
        if SPLITS:
            part = item - whole
            x = gl.where(part < 0, item, whole + part // parts)
            split = gl.where(part < 0, 0, part % parts)
        b = 0
        later = x // (LEVEL * heads) * LEVEL  # blocks of the one sequence after those of this level
        blocks_here = gl.minimum(blocks - later, LEVEL)
        first_block = blocks - later - blocks_here
        place = x - later * heads
        if batch_size > 1:
            b, first_block, blocks_here, place, level, before = find_block(
                x, heads, level, before, batch, PAGE_SIZE, TOKENS, BLOCK_B
            )
        head = place // blocks_here  # a head's blocks of a level run side by side, and share its keys in L2
        block = first_block + place - head * blocks_here
        head *= HEADS
        q_start = gl.load(qo_indptr_ptr + b)
        q_len = gl.load(qo_indptr_ptr + b + 1) - q_start
        first_page = gl.load(kv_indptr_ptr + b)
        pages = gl.load(kv_indptr_ptr + b + 1) - first_page
        kv_len = gl.where(pages > 0, (pages - 1) * PAGE_SIZE + gl.load(kv_last_page_len_ptr + b), 0)
        token = block * TOKENS
        last_key = kv_len - 1  # of the first row; bottom-right aligned
        end = kv_len
        if CAUSAL:
            last_key = kv_len - q_len + token
            end = gl.minimum(kv_len, last_key + TOKENS)
        tiles = (gl.maximum(end, 0) + BLOCK_N - 1) // BLOCK_N
        here = 1  # parts of this item
        first_tile = 0
        if SPLITS:
            here = gl.where(part < 0, 1, gl.maximum(gl.minimum(parts, tiles * BLOCK_N // MIN_KEYS), 1))
            if (part >= 0) & (split == 0):
                tail_ptr = tails_ptr + 4 + part // parts * 4
                gl.store(tail_ptr, q_start + token)
                gl.store(tail_ptr + 1, q_len - token)
                gl.store(tail_ptr + 2, head)
                gl.store(tail_ptr + 3, here)
            first_tile = tiles * split // here
            tiles = tiles * (split + 1) // here - first_tile
            part = gl.where(here > 1, part, -1)
        if split < here:
            first_key = first_tile * BLOCK_N
            if tiles == 0:  # without a key: one tile that is masked throughout
                tiles = 1
                first_key = 0
                last_key = -BLOCK_M
                kv_len = 0

            slot = taken % 2
            mbarrier.wait(item_empty.index(slot), ((taken // 2) & 1) ^ 1)
            put(records, slot, 0, tiles)
            put(records, slot, 1, last_key - first_key)  # the groups count keys from the item's first one
            put(records, slot, 2, kv_len - first_key)
            put(records, slot, 3, q_start + token)
            put(records, slot, 4, q_len - token)
            put(records, slot, 5, head)
            put(records, slot, 6, first_page)
            put(records, slot, 7, pages)
            put(records, slot, 8, first_key)
            if SPLITS:
                put(records, slot, 9, part)
            # Not the item's, but the groups have no registers to keep them in.
            put(records, slot, 10, q_heads)
            put(records, slot, 11, stride_ot // 8)  # `serves` asks for multiples of 16 bytes, so that stores are wide
            put(records, slot, 12, stride_oh // 8)
            mbarrier.arrive(item_full.index(slot), count=1)
            taken += 1
        turn += 1
        if not DYNAMIC:  # there and back again: who had the longest of one round has the shortest of the next
            item = turn * programs + gl.where(turn % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
        else:
            item = programs + gl.atomic_add(counter_ptr, 1)
    slot = taken % 2
    mbarrier.wait(item_empty.index(slot), ((taken // 2) & 1) ^ 1)
    put(records, slot, 0, 0)
    mbarrier.arrive(item_full.index(slot), count=1)


# ---- its tiles


@gluon.jit
def page_ids(page_ids_ptr, start, last_page, any_page, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr):
    """Of the tile's boxes, all loads before the first use; past the end the last page again, whose rows nobody sees."""
    ids = ()
    for i in gl.static_range(BLOCK_N // BOX):
        page = gl.minimum((start + i * BOX) // PAGE_SIZE, last_page)
        ids = ids + (gl.load(page_ids_ptr + page, mask=any_page, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return ids


@gluon.jit
def inner_page_ids(page_ids_ptr, start, there, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr):
    """page_ids of a tile that does not reach the end, if it is there: one address for all loads, and no page to clamp."""
    ids = ()
    first = page_ids_ptr + start.to(gl.uint32) // PAGE_SIZE
    for i in gl.static_range(BLOCK_N // BOX):
        ids = ids + (gl.load(first + i * BOX // PAGE_SIZE, mask=there, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return ids


@gluon.constexpr_function
def group_boxes(group, rows, part):
    """Boxes of `part` rows that bring a group's part of an item's `rows`."""
    return min(ROWS.value, rows - group * ROWS.value) // part


@gluon.jit
def load_tiles(
    desc, ring, strides, items, kv_indices_ptr, query,
    PAGE_SIZE: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr, IS_K: gl.constexpr,
):  # fmt: skip
    """A loading warp: the items' tiles of K, and Q, or of V. A tile is one box a page (or the part of a page that is the tile)."""
    slots, full, empty = ring
    page_rows, head_rows, head_columns = strides
    records, item_full, item_empty = items
    q_desc, q, q_full = query
    PART: gl.constexpr = q_desc.block_type.shape[0]  # tokens of one head that a box of Q brings
    STAGES: gl.constexpr = slots.shape[0]
    BLOCK_N: gl.constexpr = slots.shape[1] * 8
    BOX: gl.constexpr = desc.block_type.nbytes // (slots.shape[2] * 64 * 2)  # its rows
    # Page ids are read that many tiles ahead, so that no tile waits for them: with boxes of one message, 2% at head_dim 128.
    AHEAD: gl.constexpr = 2 if BLOCK_N // BOX <= 8 else 1  # what the registers hold
    taken = 0
    g = 0  # tiles so far
    mbarrier.wait(item_full.index(0), 0)
    tiles = get(records, 0, 0)
    while tiles > 0:
        slot = taken % 2
        token = get(records, slot, 3)
        head = get(records, slot, 5)
        page_ids_ptr = kv_indices_ptr + get(records, slot, 6)
        pages = get(records, slot, 7)
        first_key = get(records, slot, 8)
        mbarrier.arrive(item_empty.index(slot), count=1)
        row = head_rows * (head // GROUP)
        column = head_columns * (head // GROUP)
        last_page = gl.maximum(pages - 1, 0)
        key = first_key + (tiles - 1) * BLOCK_N
        ids = page_ids(page_ids_ptr, key, last_page, pages > 0, PAGE_SIZE, BLOCK_N, BOX)
        if AHEAD == 2:
            next_ids = inner_page_ids(page_ids_ptr, key - BLOCK_N, tiles > 1, PAGE_SIZE, BLOCK_N, BOX)
        for i in range(tiles):
            stage = g % STAGES
            mbarrier.wait(empty.index(stage), ((g // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_N // BOX * desc.block_type.nbytes)
            page_row = row + key % PAGE_SIZE  # the first one but where a page is larger than the tile
            for j in gl.static_range(BLOCK_N // BOX):
                first_row = ids[j] * page_rows + page_row
                if len(desc.block_type.shape) == 4:
                    box = slots.index(stage).slice(j * BOX // 8, BOX // 8, 0)
                    tma.async_copy_global_to_shared(desc, [0, 0, first_row, column], full.index(stage), box)
                else:  # rows of 128 bytes: a plain box is one message, too, and 2% faster
                    box = slots._reinterpret(slots.dtype, [STAGES, BLOCK_N, 64], desc.layout).index(stage).slice(j * BOX, BOX, 0)
                    tma.async_copy_global_to_shared(desc, [first_row, column], full.index(stage), box)
            if IS_K:
                if i == 0:
                    last = gl.maximum(g - 1, 0)  # tile of the item before, whose Q is there until its scores are done
                    mbarrier.wait(empty.index(last % STAGES), (last // STAGES) & 1, pred=g > 0)
                    for c in gl.static_range(GROUPS):
                        mbarrier.expect(q_full.index(c), group_boxes(c, HEADS * TOKENS, PART) * q_desc.block_type.nbytes)
                        for j in gl.static_range(group_boxes(c, HEADS * TOKENS, PART)):
                            at = c * ROWS + j * PART
                            rows = q.index(c).slice(j * PART, PART, 0)
                            where = [token + at % TOKENS, head + at // TOKENS, 0]
                            tma.async_copy_global_to_shared(q_desc, where, q_full.index(c), rows)
            later_ids = inner_page_ids(page_ids_ptr, key - AHEAD * BLOCK_N, i + AHEAD < tiles, PAGE_SIZE, BLOCK_N, BOX)
            if AHEAD == 2:
                ids = next_ids
                next_ids = later_ids
            else:
                ids = later_ids
            key -= BLOCK_N
            g += 1
        taken += 1
        mbarrier.wait(item_full.index(taken % 2), (taken // 2) & 1)
        tiles = get(records, taken % 2, 0)


# ---- the consumers


@gluon.jit
def by_thread(x):
    """x [rows, n] of a wgmma as [rows, n / 8, 8]: reduced over its middle, every thread has its own part of a row, two of the 8."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 8])


@gluon.jit
def softmax_step(s, last_key, start, exponent, m, l, MASKED: gl.constexpr):
    """The online softmax in base 2 over one tile of logits s * exponent. Returns p, m, l and the factor for what came before.

    m, which exponents are taken against, follows a row's maximum only where that has outgrown it by SLACK. So the factor is mostly
    1 and `rescale` idle: 2% at head_dim 128, 8% at 256. Weights reach 2 ** SLACK, which fp16 holds; p, l and lse are as exact.
    l is a row's sum, or [rows, 8], see by_thread. With MASKED, keys after a row's last one are hidden, and a row may have seen
    none so far: its m is -inf.
    """
    BY_THREAD: gl.constexpr = len(l.shape) == 2
    if MASKED:
        keys = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        s = gl.where(keys[None, :] <= (last_key - start)[:, None], s, float("-inf"))
    if BY_THREAD:  # maxima, too: two short chains a row
        top = gl.convert_layout(gl.max(gl.max(by_thread(s), 1), 1), m.type.layout, assert_trivial=True) * exponent
    else:
        top = gl.max(s, 1) * exponent
    m_new = gl.where(top > m + SLACK, top, m)
    shift = m_new
    if MASKED:
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * exponent - shift[:, None])
    alpha = gl.exp2(m - shift)
    if BY_THREAD:
        l = l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout), assert_trivial=True)[:, None] + gl.sum(by_thread(p), 1)
    else:
        l = l * alpha + gl.sum(p, 1)
    return p, m_new, l, alpha


@gluon.constexpr_function
def rescale_asm(n):
    """A thread's n values, which stay where they are, times its rows' factors, operands 2n on: two of one row, two of another."""
    changed = f"setp.neu.f32 p, ${2 * n}, 1.0; setp.neu.or.f32 p, ${2 * n + 2}, 1.0, p; vote.sync.any.pred p, p, 0xffffffff;"
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return f"{{ .reg .pred p; {changed} @!p bra.uni unchanged; {products} unchanged: }}"


@gluon.constexpr_function
def rescale_constraints(n):
    return ",".join([*["=f"] * n, *map(str, range(n)), *["f"] * n])


@gluon.jit
def rescale(acc, alpha):
    """acc * alpha, which a warp whose factors are all 1 skips."""
    alpha = gl.zeros_like(acc) + gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    N: gl.constexpr = acc.shape[1] // 2  # a thread's part
    ASM: gl.constexpr = rescale_asm(N)
    CONSTRAINTS: gl.constexpr = rescale_constraints(N)
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, [acc, alpha], dtype=gl.float32, is_pure=True, pack=N)


@gluon.jit
def pack(p, v):
    """Weights as they go to the next tile: two neighbours of 16 bits in a register. In fp32 they would leave no room for acc to be
    rescaled beside Q K, 4% at head_dim 128, and a tensor of 16 bits is unpacked and packed again by ptxas."""
    low, high = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    CONVERT: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if v.dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CONVERT, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def as_operand(w, v, acc):
    """The packed weights as P of P V."""
    low, high = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [w], dtype=(v.dtype, v.dtype), is_pure=True, pack=1)
    p = gl.join(low, high).reshape([w.shape[0], w.shape[1] * 2])
    return gl.convert_layout(p, gl.DotOperandLayout(0, acc.type.layout, 2), assert_trivial=True)


@gluon.jit
def step(
    q, ks, vs, k_full, k_empty, v_full, v_empty, g, t, w, m, l, alpha, acc, last_key, exponent,
    GROUP_ID: gl.constexpr, MASKED: gl.constexpr, IN_TURN: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of tile t, the g-th, beside P V of the tile before. IN_TURN, K is waited for one tile ahead."""
    STAGES: gl.constexpr = ks.shape[0]
    BLOCK_N: gl.constexpr = ks.shape[1]
    stage = g % STAGES
    before = (g - 1) % STAGES
    S_LAYOUT: gl.constexpr = m.type.layout.parent
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    p = as_operand(w, vs, acc)
    if IN_TURN:
        sync(TURN + GROUP_ID)
    else:
        mbarrier.wait(k_full.index(stage), (g // STAGES) & 1)
    s = warpgroup_mma(q, ks.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = rescale(acc, alpha)  # here, where the tensor cores have work
    acc = warpgroup_mma(p, vs.index(before), acc, is_async=True)
    if IN_TURN:
        signal(TURN + 1 - GROUP_ID)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    p, m, l, alpha = softmax_step(s, last_key, t * BLOCK_N, exponent, m, l, MASKED)
    w = pack(p, vs)
    # These waits stand here, not before their use, for ptxas: it would move the wait for P V above the softmax, but not
    # across the branches of these.
    if IN_TURN:
        mbarrier.wait(k_full.index((g + 1) % STAGES), ((g + 1) // STAGES) & 1, pred=t > 0)
    mbarrier.wait(v_full.index(stage), (g // STAGES) & 1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    return w, m, l, alpha, acc


@gluon.jit
def clear_idle_rows(q, FIRST: gl.constexpr):
    """Zeros into the group's rows from FIRST on, which no item fills: of what lies there a warp's maxima might be NaN, and then it
    would rescale at every tile."""
    D: gl.constexpr = q.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [2, 1, 16], [4, 1, 1], [2, 1, 0])
    for row in gl.static_range(FIRST, ROWS, 8):
        q.slice(row, 8, 0).store(gl.zeros([8, 1, D], q.dtype, layout))
    fence_async_shared()


@gluon.jit
def clear_tail(v, rows, GROUP_ID: gl.constexpr):
    """Zeros into the tile's rows from `rows` on: they may hold a NaN, which a weight of 0 would not silence."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 2, 16], [1, 1, 4, 1], [3, 2, 1, 0])
    PARTS: gl.constexpr = v.shape[0]  # 8 rows each
    for i in gl.static_range(GROUP_ID, PARTS, GROUPS):
        if (i + 1) * 8 > rows:
            part = v.slice(i, 1, 0)
            x = part.load(layout)
            row = i * 8 + gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
            part.store(gl.where((row < rows)[None, None, :, None], x, 0.0).to(x.dtype))
    fence_async_shared()
    sync(TAIL)


@gluon.jit
def consume(
    q, q_full, k_ring, v_ring, items, results,
    HEADS: gl.constexpr, TOKENS: gl.constexpr, CAUSAL: gl.constexpr, HAS_LSE: gl.constexpr, SPLITS: gl.constexpr,
    GROUP_ID: gl.constexpr,
    IN_TURN: gl.constexpr,
):  # fmt: skip
    """A consumer group: 64 query rows of every item."""
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    records, item_full, item_empty = items
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, exponent, v_scale = results
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1] * 8
    D: gl.constexpr = k_tiles.shape[2] * 64
    TILE: gl.constexpr = tile_layout(BLOCK_N, D)
    ks = k_tiles._reinterpret(k_tiles.dtype, [STAGES, BLOCK_N, D], TILE)
    vs = v_tiles._reinterpret(v_tiles.dtype, [STAGES, BLOCK_N, D], TILE)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows = GROUP_ID * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    q = q._reinterpret(q.dtype, [GROUPS, ROWS, D], gl.NVMMASharedLayout(128, 16, 2)).index(GROUP_ID)
    q_full = q_full.index(GROUP_ID)
    if IN_TURN:
        if GROUP_ID == 1:
            signal(TURN)  # the first turn is group 0's
    taken = 0
    g = 0
    mbarrier.wait(item_full.index(0), 0)
    tiles = get(records, 0, 0)
    while tiles > 0:
        slot = taken % 2
        first_last_key = get(records, slot, 1)  # the last key of the first row
        kv_len = get(records, slot, 2)
        last_key = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, S_LAYOUT)) + kv_len - 1
        full_end = kv_len
        if CAUSAL:
            last_key = gl.minimum(first_last_key + rows % TOKENS, kv_len - 1)
            FIRST: gl.constexpr = GROUP_ID * ROWS if TOKENS == BLOCK_M else 0  # of the group's tokens
            full_end = gl.minimum(first_last_key + FIRST + 1, kv_len)
        full = gl.minimum(gl.maximum(full_end, 0) // BLOCK_N, tiles - 1)  # tiles that all rows see in full, the last one aside

        # The tile at the end: nothing to overlap with yet.
        stage = g % STAGES
        phase = (g // STAGES) & 1
        start = (tiles - 1) * BLOCK_N
        if start + BLOCK_N > kv_len:  # here, where the registers are free
            mbarrier.wait(v_full.index(stage), phase)
            clear_tail(v_tiles.index(stage), kv_len - start, GROUP_ID)
        zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        if D == 64:  # where the softmax takes longer than the matmuls: 3%; elsewhere not faster, or slower
            l = gl.sum(by_thread(zero), 1)
        else:
            l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
        mbarrier.wait(q_full, taken & 1)
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q, ks.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, m, l, alpha = softmax_step(s, last_key, start, exponent, m, l, True)
        w = pack(p, vs)
        mbarrier.wait(v_full.index(stage), phase)
        if IN_TURN:
            mbarrier.wait(k_full.index((g + 1) % STAGES), ((g + 1) // STAGES) & 1, pred=tiles > 1)

        g += 1
        for t in range(tiles - 2, full - 1, -1):
            w, m, l, alpha, acc = step(
                q, ks, vs, k_full, k_empty, v_full, v_empty, g, t, w, m, l, alpha, acc, last_key, exponent,
                GROUP_ID, True, IN_TURN,
            )  # fmt: skip
            g += 1
        for t in range(full - 1, -1, -1):
            w, m, l, alpha, acc = step(
                q, ks, vs, k_full, k_empty, v_full, v_empty, g, t, w, m, l, alpha, acc, last_key, exponent,
                GROUP_ID, False, IN_TURN,
            )  # fmt: skip
            g += 1

        stage = (g - 1) % STAGES
        acc = rescale(acc, alpha)
        acc = warpgroup_mma(as_operand(w, vs, acc), vs.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)

        token = get(records, slot, 3)
        valid = get(records, slot, 4)
        head = get(records, slot, 5)
        part = -1
        if SPLITS:
            part = get(records, slot, 9)
        q_heads = get(records, slot, 10)
        stride_ot = get(records, slot, 11) * 8
        stride_oh = get(records, slot, 12) * 8
        mbarrier.arrive(item_empty.index(slot), count=1)
        if D == 64:
            l = gl.convert_layout(gl.sum(l, 1), m.type.layout, assert_trivial=True)
        factor = v_scale / gl.where(l == 0.0, 1.0, l)
        o = acc * gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))[:, None]
        if part < 0:
            store_rows(out_ptr, o, token, valid, head, stride_ot, stride_oh, GROUP_ID, HEADS, TOKENS)
            if HAS_LSE:
                lse = gl.where(l == 0.0, float("-inf"), (m + gl.log2(l)) / LOG2E)
                slots = (token + rows % TOKENS).to(gl.int64) * q_heads + head + rows // TOKENS
                gl.store(lse_ptr + slots, lse, mask=is_wanted(rows, valid, HEADS, TOKENS))
        elif SPLITS:
            store_rows(partial_ptr, o, part * BLOCK_M, BLOCK_M, 0, D, 0, GROUP_ID, 1, BLOCK_M)
            lse = gl.where(l == 0.0, float("-inf"), (m + gl.log2(l)) / LOG2E)
            gl.store(partial_lse_ptr + part * BLOCK_M + rows, lse)

        taken += 1
        mbarrier.wait(item_full.index(taken % 2), (taken // 2) & 1)
        tiles = get(records, taken % 2, 0)


@gluon.jit
def is_wanted(rows, valid, HEADS: gl.constexpr, TOKENS: gl.constexpr):
    """Whether rows are of the item's `valid` tokens and of its heads."""
    wanted = rows % TOKENS < valid
    if HEADS * TOKENS < BLOCK_M:
        wanted = wanted & (rows < HEADS * TOKENS)
    return wanted


@gluon.jit
def store_rows(
    out_ptr, o, token, valid, head, stride_ot, stride_oh, GROUP_ID: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr
):
    """o to the item's rows of the output, 16 bytes a thread after an exchange within groups of four threads."""
    D: gl.constexpr = o.shape[1]
    layout: gl.constexpr = row_layout(D)
    o = gl.convert_layout(o.to(out_ptr.dtype.element_ty), layout)
    rows = GROUP_ID * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, gl.SliceLayout(0, layout))
    offsets = (token + rows % TOKENS).to(gl.int64) * stride_ot + (head + rows // TOKENS) * stride_oh
    gl.store(out_ptr + offsets[:, None] + columns[None, :], o, mask=is_wanted(rows, valid, HEADS, TOKENS)[:, None])


@gluon.constexpr_function
def row_layout(D):
    """[64, D] with 4 neighbouring columns a thread, its rows where the wgmma accumulator has them."""
    wide = [[0, 1 << i] for i in range(4, D.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *wide],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, D],
    )


@gluon.constexpr_function
def tile_layout(n, d):
    """A tile [n, d] in a slot [n / 8, d / 64, 8, 64] of a ring: 8 rows of 64 columns together, swizzled, then the other columns,
    then the other rows. So any 8 rows are one piece, and a box of them one message of TMA."""
    atom = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 8], [2, 16], [4, 32]]
    columns = [[0, 1 << i] for i in range(6, d.bit_length() - 1)]
    rows = [[1 << i, 0] for i in range(3, n.bit_length() - 1)]
    return gl.SharedLinearLayout([*atom, *columns, *rows], [], 1024)


@gluon.jit(
    do_not_specialize=[
        "batch_size", "q_heads", "num_splits",
        "k_page_rows", "k_head_rows", "k_head_columns", "v_page_rows", "v_head_rows", "v_head_columns",
    ],
    do_not_specialize_on_alignment=["qo_indptr_ptr", "kv_indices_ptr", "kv_indptr_ptr", "kv_last_page_len_ptr"],
)  # fmt: skip
def prefill_attention_hopper(
    q_desc, k_desc, v_desc, qo_indptr_ptr, kv_indices_ptr, kv_indptr_ptr, kv_last_page_len_ptr, counter_ptr, out_ptr, lse_ptr,
    partial_ptr, partial_lse_ptr, tails_ptr, sm_scale, v_scale, batch_size, q_heads, num_splits, stride_ot, stride_oh,
    k_page_rows, k_head_rows, k_head_columns, v_page_rows, v_head_rows, v_head_columns,
    PAGE_SIZE: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, TOKENS: gl.constexpr, CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_B: gl.constexpr, IN_TURN: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Any grid (programs,): each takes its part of the items.

    q and out [tokens, q_heads, D]. What is cut goes to partial [programs, BLOCK_M, D] and partial_lse [programs, BLOCK_M], fp32,
    and tails [4 + 4 * programs] says what it is; nothing is cut where they are None.
    """
    D: gl.constexpr = q_desc.block_type.shape[2]
    q = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, 1, D], q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N // 8, D // 64, 8, 64], SLOT)
    vs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N // 8, D // 64, 8, 64], SLOT)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    records = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=GROUPS + 2)  # and the loading warps
    if HEADS * TOKENS < BLOCK_M:
        clear_idle_rows(q.index(GROUPS - 1), HEADS * TOKENS - ROWS)
    gdc_wait()  # for whatever ran before; the other warps begin after it
    # What comes next may take the places that this kernel's programs leave: 1.3 us of the 14.6 of one prompt of 512. Not sooner: a
    # decode beside this kernel counts on what ran before it being complete.
    gdc_launch_dependents()
    k_ring = (ks, k_full, k_empty)
    v_ring = (vs, v_full, v_empty)
    items = (records, item_full, item_empty)
    exponent = sm_scale * LOG2E
    HAS_LSE: gl.constexpr = lse_ptr is not None
    if not HAS_LSE:
        lse_ptr = out_ptr  # a partition takes no None
    DYNAMIC: gl.constexpr = counter_ptr is not None
    if not DYNAMIC:
        counter_ptr = qo_indptr_ptr
    SPLITS: gl.constexpr = partial_ptr is not None
    if not SPLITS:
        partial_ptr = out_ptr
        partial_lse_ptr = out_ptr
        tails_ptr = qo_indptr_ptr
    results = (out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, exponent, v_scale)
    batch = (qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, batch_size)
    work = (q_heads, num_splits, tails_ptr, stride_ot, stride_oh)
    query = (q_desc, q, q_full)
    k_strides = (k_page_rows, k_head_rows, k_head_columns)
    v_strides = (v_page_rows, v_head_rows, v_head_columns)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    IS_K: gl.constexpr = True
    IS_V: gl.constexpr = False
    gl.warp_specialize(
        [
            (consume, (q, q_full, k_ring, v_ring, items, results, HEADS, TOKENS, CAUSAL, HAS_LSE, SPLITS, FIRST, IN_TURN)),
            (consume, (q, q_full, k_ring, v_ring, items, results, HEADS, TOKENS, CAUSAL, HAS_LSE, SPLITS, SECOND, IN_TURN)),
            (load_tiles, (k_desc, k_ring, k_strides, items, kv_indices_ptr, query, PAGE_SIZE, GROUP, HEADS, TOKENS, IS_K)),
            (load_tiles, (v_desc, v_ring, v_strides, items, kv_indices_ptr, query, PAGE_SIZE, GROUP, HEADS, TOKENS, IS_V)),
            (
                find_items,
                (items, batch, work, counter_ptr, PAGE_SIZE, BLOCK_N, HEADS, TOKENS, CAUSAL, DYNAMIC, SPLITS, BLOCK_B),
            ),
        ],
        [4, 1, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
