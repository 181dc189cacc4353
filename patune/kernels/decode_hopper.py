"""Paged decode on Hopper, template "decode_hopper": stage 1 that `paged_decode` may run where `serves` says so;
decode_hopper_jit.py is its device code. Stage 2, the cut into shares and the partials are those of the template "decode".

It is a template of its own for the reasons that prefill_hopper.py gives. `paged_decode` asks the table for both and takes the
faster one where both were measured on the call's workload, else this one.
"""

from ..workload import Key, Workload
from . import cluster_jit, decode
from . import decode_hopper_jit as jit
from .cache import PagedCache
from .defaults import CLUSTERS, SPLITS, default_config, fit, query_of
from .problem import AttentionProblem
from .registry import FP8, candidates
from .template import Launch, Template, Values
from .tma import is_addressable, pool_arguments

PRODUCER_REGISTERS = 48  # a thread
REGISTERS = {1: 152, 2: 128}  # a thread, the mean over two groups of four warps, by programs an SM: no config spills with them
SM_REGISTERS = 65536
SM_SHARED_BYTES, BLOCK_SHARED_BYTES = 228 * 1024, 227 * 1024
BESIDE_BYTES = 2048  # a program: barriers, maxima and sums, and what the driver keeps, rounded up
TUNABLES = {
    "BLOCK_N": (64, 128, 256),  # KV tokens a tile
    "num_stages": (2, 3, 4, 5, 6),  # tiles in the ring: also how many programs an SM holds, see programs_an_sm()
    "cluster": CLUSTERS,  # programs that reduce a sequence among themselves, without stage 2: all its shares, or 1
    "num_splits": SPLITS,  # mean shares a sequence
}
JIT_FUNCTIONS = (
    *decode.JIT_FUNCTIONS, *cluster_jit.JIT_FUNCTIONS, jit.add, jit.pick, jit.place, jit.own_share, jit.find_share, jit.begin,
    jit.page_ids, jit.produce, jit.to_fp16, jit.unpack, jit.clear_tail, jit.as_operand, jit.attend, jit.merge, jit.consume,
    jit.idle, jit.decode_split_hopper,
)  # fmt: skip
_SHARED = (
    "q_ptr", "kv_indices_ptr", "kv_indptr_ptr", "kv_last_page_len_ptr", "out_ptr", "lse_ptr", "partial_ptr", "partial_lse_ptr",
    "sm_scale", "k_scale_ptr", "v_scale_ptr", "v_scale", "batch_size", "stride_qt", "stride_qh", "stride_ot", "stride_oh",
    "GROUP", "Q_LEN", "PAGE_SIZE", "BLOCK_N", "BLOCK_B",
)  # fmt: skip


def serves(capability: str | None, q, cache: PagedCache, out, *, q_len=1, window=None, soft_cap=None, sinks=None) -> bool:
    """Whether the kernel takes a call: on Hopper, few rows, a cache like the 16-bit q or fp8 that TMA can address, no extras."""
    rows, types = q.shape[1] // cache.kv_heads * q_len, (str(q.dtype)[6:], str(cache.k.dtype)[6:])
    return (
        "decode_hopper" in candidates("decode", capability, cache.head_dim, cache.page_size, rows, *types)
        and window is soft_cap is sinks is None
        and q.stride(2) == out.stride(2) == 1
        and is_addressable(cache)
    )


def is_wide(rows: int, head_dim: int) -> bool:
    """Whether queries and accumulators, padded to 8 rows or to 16, exceed what registers a thread has in one of two programs an SM.

    The kernel then takes the queries from shared memory anew for every tile.
    """
    return (8 if rows <= 8 else 16) * head_dim > 2048


def shared_bytes(block_n: int, stages: int, head_dim: int, itemsize: int, rows: int = 0, cluster: int = 1) -> int:
    """Of one program: the ring, of `itemsize` bytes an element of the cache, queries that registers cannot hold, and what a cluster
    sends it for its rows."""
    queries = 4 * 16 * head_dim * 2 if is_wide(rows, head_dim) else 0
    inbox = cluster_jit.inbox_bytes(rows, head_dim, cluster) if cluster > 1 else 0
    return 2 * stages * block_n * head_dim * itemsize + queries + inbox + BESIDE_BYTES


def programs_an_sm(block_n: int, stages: int, head_dim: int, itemsize: int, rows: int = 0, cluster: int = 1) -> int:
    """How many programs an SM holds at once, 1 or 2.

    Launched programmatically, the next call's programs go to whichever SM is free first. Where an SM can hold more of them than its
    share of the grid, they pile up there; a ring that leaves room for no more than that share spreads them.
    """
    fit = SM_SHARED_BYTES // shared_bytes(block_n, stages, head_dim, itemsize, rows, cluster)
    return 1 if is_wide(rows, head_dim) else min(2, max(1, fit))


def launches(
    q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, config, *,
    sm_scale, q_len=1, k_scale=None, v_scale=None, v_factor=1.0,
) -> list[Launch]:  # fmt: skip
    """The launches of one decode that `serves` takes; arguments as in decode.launches."""
    block_n, stages, cluster = config["BLOCK_N"], config["num_stages"], config["cluster"]
    if cluster not in (1, config["num_splits"]):
        raise ValueError(f"config: a cluster of {cluster} is for as many splits, not for {config['num_splits']}; or let it be 1")
    plain, *reduce = decode.launches(
        q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse,
        dict(config, num_warps=4, num_splits=config["num_splits"] if cluster == 1 else 1),  # no partials and no stage 2
        sm_scale=sm_scale, q_len=q_len, k_scale=k_scale, v_scale=v_scale, v_factor=v_factor,
    )  # fmt: skip
    rows = q.shape[1] // cache.kv_heads * q_len
    programs = programs_an_sm(block_n, stages, cache.head_dim, cache.k.element_size(), rows, cluster)
    split = Launch(jit.decode_split_hopper, plain.grid, dict(
        {name: plain.args[name] for name in _SHARED}, **pool_arguments(cache, block_n), num_splits=config["num_splits"], beside=0,
        STAGES=stages, PRODUCER_REGISTERS=PRODUCER_REGISTERS, CLUSTER=cluster,
        num_warps=4, maxnreg=REGISTERS[programs], launch_pdl=True,
    ), cluster)  # fmt: skip
    return [split, *reduce]


def invalid(config: Values, key: Key, workload: Workload) -> str | None:
    """Why a point need not run: it cannot fit, or another point does the same with less."""
    block_n, stages, cluster = config["BLOCK_N"], config["num_stages"], config["cluster"]
    rows, itemsize = key.q_heads_per_kv * workload.q_len, 1 if key.kv_dtype in FP8 else 2
    if rows > 16:
        return "more than 16 queries a KV head"
    if block_n > 128 and itemsize > 1:
        return "a tile of more than 128 tokens is for fp8"
    if cluster not in (1, config["num_splits"]):
        return "a cluster is all shares of a sequence"
    if cluster > 1 and workload.ragged:
        return "as many shares of a short sequence as of a long one"
    if shared_bytes(block_n, stages, key.head_dim, itemsize, rows, cluster) > BLOCK_SHARED_BYTES:
        return "tiles in flight exceed shared memory"
    if stages < TUNABLES["num_stages"][-1] and programs_an_sm(block_n, stages + 1, key.head_dim, itemsize, rows, cluster) == 2:
        return "a longer ring leaves room for as many programs"
    # Without stage 2 half of an H100 is enough: 64 programs in clusters of 8 read 32 MiB in 16.5 us, 128 with stage 2 in 17.5.
    return decode.invalid(dict(config, num_warps=4), key, workload, 2 if cluster == 1 else 3)


TEMPLATE = Template(
    name="decode_hopper",
    tunables=TUNABLES,
    runtime=frozenset({"num_splits"}),
    invalid=invalid,
    default=lambda key, workload: default_config(query_of(key, workload)),
    problem=lambda key, workload, **kw: AttentionProblem(launches, key, workload, **kw),
    jit_functions=JIT_FUNCTIONS,
    fit=fit,
)
