"""Paged prefill on Hopper, template "prefill_hopper": what `paged_prefill` runs where `serves` says so; prefill_hopper_jit.py is
its device code.

It is a template of its own, not a tunable of "prefill": the two share no tunable but the tile, only one of them compiles
for other GPUs, and each keeps its own landscape, stale only when its own device code changes. `paged_prefill` asks the table
for both and takes the faster one where both were measured on the call's workload, else this one.
"""

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..workload import Key, Workload
from . import prefill_hopper_jit as jit
from .cache import PagedCache
from .defaults import (
    PREFILL_SPLITS,
    block_tokens,
    default_config,
    fit,
    hbm_blocks,
    in_one_wave,
    packed_heads,
    prefill_blocks,
    query_of,
)  # fmt: skip
from .device import device_of
from .prefill_join_jit import prefill_join
from .prefill_space import far_from_even
from .problem import AttentionProblem
from .registry import candidates
from .sizes import ceil_div, next_power_of_2
from .template import Launch, Template, Values
from .tma import aligned, is_addressable, pool_arguments, swizzled

ROWS, BLOCK_M = jit.ROWS.value, jit.BLOCK_M.value
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # a thread; with 24 the producers spill, and 504 is all that three groups have
JOINED = 4096  # fp32 numbers at once in a program that joins parts of an item, a warp: 128 registers
BLOCK_B = 64  # sequences looked at together when an item is found; more make the finding warp spill
STATIC, DYNAMIC = 1, 2
FREE, IN_TURN = 1, 2
TUNABLES = {
    "BLOCK_N": (64, 128),  # KV tokens a tile
    "num_stages": (2, 3, 4),  # tiles in each of the rings of K and V
    "schedule": (STATIC, DYNAMIC),  # of a program an SM: items dealt out, or taken from a counter when the one before is on its way
    "issue": (FREE, IN_TURN),  # how the two groups share the tensor cores
    "num_splits": PREFILL_SPLITS,  # parts of an item's keys, where items do not fill waves of programs
}
JIT_FUNCTIONS = (
    jit.sync, jit.signal, jit.sequences, jit.blocks_above, jit.add, jit.find_block, jit.put, jit.get, jit.find_items,
    jit.page_ids, jit.inner_page_ids, jit.group_boxes, jit.load_tiles, jit.softmax_step, jit.rescale_asm, jit.rescale_constraints,
    jit.rescale, jit.by_thread, jit.pack, jit.as_operand, jit.step, jit.clear_idle_rows, jit.clear_tail, jit.consume, jit.is_wanted,
    jit.store_rows, jit.row_layout, jit.tile_layout, jit.prefill_attention_hopper, jit.clear_counter, prefill_join,
)  # fmt: skip


def serves(
    capability: str | None, q, cache: PagedCache, out, *, window=None, soft_cap=None, sinks=None, k_scale=None, v_scale=None
) -> bool:
    """Whether the kernel takes a call: on Hopper, q and cache of 16 bits that TMA can address, and nothing extra."""
    extras = (window, soft_cap, sinks, k_scale, v_scale)  # scales are tensors here; a float is folded into others before
    return (
        "prefill_hopper" in candidates("prefill", capability, cache.head_dim, cache.page_size)
        and all(x is None for x in extras)
        and q.dtype in (torch.bfloat16, torch.float16)
        and cache.k.dtype == q.dtype
        and q.stride(2) == out.stride(2) == 1
        and aligned(q, q.stride(0), q.stride(1))
        and aligned(out, out.stride(0), out.stride(1))
        and q.stride(0) >= (q.shape[1] - 1) * q.stride(1) + q.shape[2]
        and is_addressable(cache)
    )


def launches(
    q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, config, *,
    qo_indptr, max_q_len, sm_scale, causal=True, v_factor=1.0, programs=None,
) -> list[Launch]:  # fmt: skip
    """The launches of one prefill that `serves` takes: its counter's, its own, and one to join its splits, the first and the last
    only where there are such. Arguments as in prefill.launches; programs: how many at most, where it is not to have all SMs."""
    batch_size, (tokens, q_heads, head_dim), block_n = kv_indptr.shape[0] - 1, q.shape, config["BLOCK_N"]
    num_splits, group = config["num_splits"], q_heads // cache.kv_heads
    heads = packed_heads(group, max_q_len)
    block = block_tokens(heads)
    # Every sequence adds at most one partial block; with max_q_len the bound is the smaller of the two.
    blocks = min(tokens // block + batch_size, ceil_div(max_q_len, block) * batch_size)
    items = blocks * q_heads // heads
    programs = min(items * num_splits, programs or device_of(q).sm_count)
    counter = partial = partial_lse = tails = None
    before: list[Launch] = []
    if config["schedule"] == DYNAMIC:
        counter = torch.empty(1, dtype=torch.int32, device=q.device)
        before = [Launch(jit.clear_counter, (1,), dict(counter_ptr=counter, num_warps=1, launch_pdl=True))]
    if num_splits > 1:
        partial = torch.empty(programs, BLOCK_M, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(programs, BLOCK_M, dtype=torch.float32, device=q.device)
        tails = torch.empty(4 + 4 * programs, dtype=torch.int32, device=q.device)
    attend = Launch(jit.prefill_attention_hopper, (programs,), dict(
        q_desc=TensorDescriptor(
            q, [tokens, q_heads, head_dim], [q.stride(0), q.stride(1), 1],
            [min(ROWS, block & -block), 1, head_dim], swizzled(128, 2, 3),
        ),
        **pool_arguments(cache, block_n, one_message=head_dim > 64),
        qo_indptr_ptr=qo_indptr, kv_indices_ptr=kv_indices, kv_indptr_ptr=kv_indptr, kv_last_page_len_ptr=kv_last_page_len,
        counter_ptr=counter,
        out_ptr=out, lse_ptr=lse, partial_ptr=partial, partial_lse_ptr=partial_lse, tails_ptr=tails,
        sm_scale=sm_scale, v_scale=v_factor, batch_size=batch_size, q_heads=q_heads, num_splits=num_splits,
        stride_ot=out.stride(0), stride_oh=out.stride(1),
        PAGE_SIZE=cache.page_size, GROUP=group, HEADS=heads, TOKENS=block, CAUSAL=causal, BLOCK_N=block_n,
        STAGES=config["num_stages"],
        BLOCK_B=BLOCK_B, IN_TURN=config["issue"] == IN_TURN,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS, CONSUMER_REGISTERS=CONSUMER_REGISTERS, num_warps=4,
        launch_pdl=True,
    ))  # fmt: skip
    if num_splits == 1:
        return [*before, attend]
    block_s = next_power_of_2(num_splits)
    rows = max(1, min(4, JOINED // (block_s * head_dim)))
    return [*before, attend, Launch(prefill_join, (min(items, programs // 2) * BLOCK_M // rows,), dict(
        tails_ptr=tails, partial_ptr=partial, partial_lse_ptr=partial_lse, out_ptr=out, lse_ptr=lse, q_heads=q_heads,
        stride_ot=out.stride(0), stride_oh=out.stride(1), HEAD_DIM=head_dim, HEADS=heads, TOKENS=block, ITEM=BLOCK_M,
        BLOCK_R=rows, BLOCK_S=block_s, PDL=True, num_warps=1, launch_pdl=True,
    ))]  # fmt: skip


def programs_beside(query: dict, num_splits: int, decode_tokens: int) -> int | None:
    """The programs of a prefill with which it and a decode of so many KV tokens beside it end first; None if it has no more items
    than SMs, all where items are cut to fill the last wave.

    A decode needs as many SMs as hbm_blocks() to have all of HBM, so the prefill leaves it some, but has 3 of 4 or more. Items
    behind a long prefix take equally long and come in whole waves; of others, long ones go first, and programs end together. Time
    is in keys that a block walks, as in prefill_splits; a decode slows a prefill beside it by 0.3 of its share of HBM. On an H100,
    of 512 items and 32 x 8k tokens: 772 us by 128 programs, 696 by 103, 830 by 86; of 2048 items and 256 x 1k: 1160, 1043 by 108,
    1319.
    """
    if in_one_wave(query):
        return None
    sms, blocks = query["sm_count"], prefill_blocks(query)
    if num_splits > 1:
        return sms
    equal = query["kv_len"] >= 4 * query["q_len"]
    fed = hbm_blocks(query)
    walk, decode = query["kv_len"] - query["q_len"] / 2 + 128, decode_tokens * query["kv_heads"] / fed

    def end(programs: int) -> float:
        waves, share = -(-blocks // programs) if equal else blocks / programs, (sms - programs) / fed
        prefill = waves * walk * (1 + 0.3 * share)
        return prefill + max(0.0, decode - share * prefill)

    return min(range(sms, -(-3 * sms // 4) - 1, -1), key=end)


def invalid(config: Values, key: Key, workload: Workload) -> str | None:
    """Why a point need not run: it cannot fit, its rings are short where longer ones fit, or its splits do not suit the SMs."""
    block_n, stages, splits = config["BLOCK_N"], config["num_stages"], config["num_splits"]
    if key.head_dim > 128 and block_n > 64:
        return "the accumulators of scores and output exceed the registers"
    tiles = (BLOCK_M + 2 * stages * block_n) * key.head_dim * 2
    if tiles + 1024 > 227 * 1024:  # and the barriers
        return "tiles in flight exceed shared memory"
    if key.head_dim <= 128 and stages * block_n < 256:
        return "a ring holds less than 256 tokens"
    if config["schedule"] == DYNAMIC and in_one_wave(query_of(key, workload)):
        return "a program has one item, dealt out or taken"
    return far_from_even(splits, query_of(key, workload))


TEMPLATE = Template(
    name="prefill_hopper",
    tunables=TUNABLES,
    runtime=frozenset({"num_splits"}),
    invalid=invalid,
    default=lambda key, workload: default_config(query_of(key, workload)),
    problem=lambda key, workload, **kw: AttentionProblem(launches, key, workload, **kw),
    jit_functions=JIT_FUNCTIONS,
    fit=fit,
)
