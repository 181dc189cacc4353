"""Partials of attention reduced within a cluster: programs that run at the same time and reach each other's shared memory.

Each program of a cluster keeps a part of the output's columns. To every program it sends that one's columns of its accumulator, and
its rows' maxima and sums. What it is sent arrives in its inbox, whose barrier counts the bytes: as many for every program, so
none asks who has sent.

Gluon has no words for this yet, hence the PTX: `mapa` for an address in another program, `st.async` for a store that the barrier
there counts, `barrier.cluster` for the inboxes being there before anybody writes to them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BARRIER_BYTES = gl.constexpr(16)
ALIGNMENT = 1024


@gluon.constexpr_function
def inbox_bytes(rows, head_dim, programs):
    """Of a program's inbox: its barrier, the accumulators of its columns, and every program's maxima and sums."""
    used = BARRIER_BYTES.value + rows * (4 * head_dim + 8 * programs)
    return (used + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT  # what follows are tiles, which TMA swizzles by their address


@gluon.constexpr_function
def _reserve(bytes):
    return f"{{ .shared .align {ALIGNMENT} .b8 inbox[{bytes}]; mov.u32 $0, inbox; }}"


@gluon.jit
def reserve_inbox(ROWS: gl.constexpr, D: gl.constexpr, CLUSTER: gl.constexpr):
    """The address of this program's inbox; its barrier awaits what the whole cluster will send. Call it once, before partitions."""
    inbox = gl.inline_asm_elementwise(
        _reserve(inbox_bytes(ROWS, D, CLUSTER)), "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
    gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first mbarrier.init.shared::cta.b64 [$1], 1;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;
        @first fence.mbarrier_init.release.cluster;
        mov.u32 $0, 0;
        }""",
        "=r,r,r", [inbox, ROWS * (4 * D + 8 * CLUSTER)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return inbox


@gluon.jit
def enter(CLUSTER: gl.constexpr):
    """Every warp of every program says once that the inbox of its program is there."""
    if CLUSTER > 1:
        gl.inline_asm_elementwise(
            "barrier.cluster.arrive.release.aligned; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )  # fmt: skip


@gluon.jit
def wait_for_all():
    """Until all warps of the cluster have entered."""
    gl.inline_asm_elementwise(
        "barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def wait_for_inbox(inbox):
    """Until all that this program expects has arrived."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred complete;
        wait:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [$1], 0;
        @!complete bra.uni wait;
        mov.u32 $0, 0;
        }""",
        "=r,r", [inbox], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def thread():
    return gl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def address_in(address, program):
    """The address, one of this program's shared memory, in that of another program of the cluster."""
    return gl.inline_asm_elementwise(
        "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", [address, program], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def send_4(address, x, barrier, inside):
    """x, of which a thread has 4 neighbouring elements, to the addresses, where `inside` is 1."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        setp.ne.u32 inside, $16, 0;
        @inside st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [$4], {$8, $9, $10, $11}, [$12];
        mov.u32 $0, 0;
        mov.u32 $1, 0;
        mov.u32 $2, 0;
        mov.u32 $3, 0;
        }""",
        "=r,=r,=r,=r,r,r,r,r,f,f,f,f,r,r,r,r,r,r,r,r", [address, x, barrier, inside], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def send_pair(address, x, y, barrier, inside):
    """The pairs (x, y) to the addresses, where `inside` is 1."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        setp.ne.u32 inside, $5, 0;
        @inside st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [$1], {$2, $3}, [$4];
        mov.u32 $0, 0;
        }""",
        "=r,r,f,f,r,r", [address, x, y, barrier, inside], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def receive(address):
    return gl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def receive_pair(address):
    return gl.inline_asm_elementwise(
        "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [address], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def reduce_in_cluster(o, m, l, inbox, rank, ROWS: gl.constexpr, CLUSTER: gl.constexpr):
    """The cluster's states as one: o [16, D // CLUSTER], this program's columns, not yet divided by l; m and l [16], in base 2.

    o [16, D], m and l [16] are this program's state. Rows from ROWS on mean nothing, before and after.
    """
    ROWS_M: gl.constexpr = o.shape[0]
    D: gl.constexpr = o.shape[1]
    PART: gl.constexpr = D // CLUSTER  # columns that a program keeps
    WARPS: gl.constexpr = gl.num_warps()
    ACCUMULATORS: gl.constexpr = BARRIER_BYTES  # [programs, ROWS, PART] fp32
    MAXIMA_AND_SUMS: gl.constexpr = BARRIER_BYTES + ROWS * D * 4  # [programs, ROWS, 2] fp32
    wait_for_all()

    OWN: gl.constexpr = o.type.layout
    row = gl.arange(0, ROWS_M, gl.SliceLayout(1, OWN))[:, None]
    column = gl.arange(0, D, gl.SliceLayout(0, OWN))[None, :]
    its_inbox = address_in(inbox + gl.zeros_like(column), column // PART)
    address = its_inbox + ACCUMULATORS + ((rank * ROWS + row) * PART + column % PART) * 4
    all = gl.zeros_like(address)
    send_4(address, o, all + its_inbox, all + (row < ROWS).to(gl.int32))

    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1], [32 // ROWS_M, ROWS_M], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS_M, gl.SliceLayout(0, PAIRS))[None, :]
    to = gl.arange(0, CLUSTER, gl.SliceLayout(1, PAIRS))[:, None]
    all = gl.zeros([CLUSTER, ROWS_M], gl.float32, PAIRS)
    its_inbox = address_in(inbox + gl.zeros_like(to), to)
    address = its_inbox + MAXIMA_AND_SUMS + (rank * ROWS + row) * 8
    once = thread() < CLUSTER * ROWS_M  # where there are fewer pairs than threads, several hold the same one
    inside = gl.zeros_like(address) + ((row < ROWS) & once).to(gl.int32)
    m = gl.convert_layout(m, gl.SliceLayout(0, PAIRS))[None, :]
    l = gl.convert_layout(l, gl.SliceLayout(0, PAIRS))[None, :]
    send_pair(address, all + m, all + l, gl.zeros_like(address) + its_inbox, inside)
    wait_for_inbox(inbox)

    LANES: gl.constexpr = PART if PART < 32 else 32
    MINE: gl.constexpr = gl.BlockedLayout([CLUSTER, 1, 1], [1, 32 // LANES, LANES], [1, WARPS, 1], [2, 1, 0])
    ML: gl.constexpr = gl.SliceLayout(2, MINE)  # a thread holds all programs' values of its rows
    R: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, MINE))
    row = gl.arange(0, ROWS_M, gl.SliceLayout(0, ML))
    state = (gl.arange(0, CLUSTER, gl.SliceLayout(1, ML)) * ROWS)[:, None] + gl.where(row < ROWS, row, 0)[None, :]
    m, l = receive_pair(inbox + MAXIMA_AND_SUMS + state * 8)
    top = gl.max(m, 0)
    weight = gl.exp2(m - gl.where(top == float("-inf"), 0.0, top)[None, :])
    l = gl.sum(l * weight, 0)
    column = gl.arange(0, PART, gl.SliceLayout(0, gl.SliceLayout(1, MINE)))[None, None, :]
    o = gl.sum(receive(inbox + ACCUMULATORS + (state[:, :, None] * PART + column) * 4) * weight[:, :, None], 0)
    return o, gl.convert_layout(top, R, assert_trivial=True), gl.convert_layout(l, R, assert_trivial=True)


JIT_FUNCTIONS = (
    reserve_inbox, enter, wait_for_all, wait_for_inbox, thread, address_in, send_4, send_pair, receive, receive_pair,
    reduce_in_cluster,
)  # fmt: skip
