"""KV append, template "append": writes the new tokens' K and V into their pages.

One program copies BLOCK_T tokens of one KV head. A token whose batch index is negative is padding and is skipped, and so is
one whose position lies past its sequence's page list: append never writes into a page that the sequence does not own.
Without batch indices and positions, programs find those of their tokens, which are then their sequences' last ones.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..workload import Key, Workload
from .defaults import default_config, query_of
from .device import supports_pdl
from .indices import place
from .primitives import kv_length
from .problem import AppendProblem
from .sizes import MAX_GRID_Y, ceil_div, next_power_of_2
from .template import Launch, Template, Values


@triton.jit
def to_cache(x, scale, scale_ptr, dtype: tl.constexpr, LIMIT: tl.constexpr):
    """x / scale in the cache's type, saturated at LIMIT if there is one: e4m3 has no infinity to overflow into."""
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr)
    x = x.to(tl.float32) / scale
    if LIMIT > 0:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return x.to(dtype)


@triton.jit(
    do_not_specialize=["first_token", "num_tokens", "batch_size"],
    do_not_specialize_on_alignment=[
        "batch_indices_ptr",
        "positions_ptr",
        "qo_indptr_ptr",
        "kv_indices_ptr",
        "kv_indptr_ptr",
        "kv_last_page_len_ptr",
    ],
)
def append_kv(
    k_ptr, v_ptr, batch_indices_ptr, positions_ptr, qo_indptr_ptr, k_cache_ptr, v_cache_ptr, kv_indices_ptr, kv_indptr_ptr,
    kv_last_page_len_ptr, k_scale_ptr, v_scale_ptr, k_scale, v_scale, first_token, num_tokens, batch_size,
    stride_kt, stride_kh, stride_kd, stride_vt, stride_vh, stride_vd,
    stride_kcp, stride_kch, stride_kct, stride_vcp, stride_vch, stride_vct,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, token blocks)."""
    if PDL:
        gdc_wait()  # for whatever ran before
        gdc_launch_dependents()  # attention, which comes next, begins beside this and waits before it reads
    head = tl.program_id(0).to(tl.int64)
    tokens = first_token + tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask = tokens < num_tokens
    if positions_ptr is not None:
        b = tl.load(batch_indices_ptr + tokens, mask=mask, other=-1)
        position = tl.load(positions_ptr + tokens, mask=mask, other=-1)
    else:
        b, position = place(
            tokens, num_tokens, qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, batch_size, PAGE_SIZE, BLOCK_T, BLOCK_B
        )
    mask = mask & (b >= 0) & (position >= 0)
    tokens = tokens.to(tl.int64)
    page_slot = tl.load(kv_indptr_ptr + b, mask=mask, other=0) + position // PAGE_SIZE
    mask = mask & (page_slot < tl.load(kv_indptr_ptr + b + 1, mask=mask, other=0))
    page = tl.load(kv_indices_ptr + page_slot, mask=mask, other=0).to(tl.int64)
    row = position % PAGE_SIZE
    both = mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + tokens[:, None] * stride_kt + head * stride_kh + offs_d[None, :] * stride_kd, mask=both)
    v = tl.load(v_ptr + tokens[:, None] * stride_vt + head * stride_vh + offs_d[None, :] * stride_vd, mask=both)
    k_offs = page * stride_kcp + head * stride_kch + row * stride_kct
    v_offs = page * stride_vcp + head * stride_vch + row * stride_vct
    k = to_cache(k, k_scale, k_scale_ptr, k_cache_ptr.dtype.element_ty, LIMIT)
    v = to_cache(v, v_scale, v_scale_ptr, v_cache_ptr.dtype.element_ty, LIMIT)
    tl.store(k_cache_ptr + k_offs[:, None] + offs_d[None, :], k, mask=both)
    tl.store(v_cache_ptr + v_offs[:, None] + offs_d[None, :], v, mask=both)


TUNABLES = {
    "BLOCK_T": (1, 2, 4, 8, 16, 32),  # tokens a program
    "num_warps": (1, 2, 4, 8),
}
JIT_FUNCTIONS = (kv_length, place, to_cache, append_kv)
BLOCK_B = 128  # sequences looked at together when tokens are placed


def launches(
    k, v, batch_indices, positions, cache, kv_indices, kv_indptr, config, *,
    qo_indptr=None, kv_last_page_len=None, k_scale=None, v_scale=None, k_factor=1.0, v_factor=1.0,
) -> list[Launch]:  # fmt: skip
    """The launches of one append: one, or as many as a grid's limit asks for.

    k and v [tokens, kv_heads, head_dim]; `cache` a PagedCache. Where batch_indices and positions are None, tokens are the last ones
    of their sequences, which follow from qo_indptr and kv_last_page_len.
    """
    tokens, kv_heads, head_dim = k.shape
    limit = torch.finfo(cache.k.dtype).max if cache.k.dtype.itemsize == 1 else 0
    step = MAX_GRID_Y * config["BLOCK_T"]
    return [Launch(append_kv, (kv_heads, ceil_div(min(tokens - first, step), config["BLOCK_T"])), dict(
        k_ptr=k, v_ptr=v, batch_indices_ptr=batch_indices, positions_ptr=positions, qo_indptr_ptr=qo_indptr,
        k_cache_ptr=cache.k, v_cache_ptr=cache.v, kv_indices_ptr=kv_indices, kv_indptr_ptr=kv_indptr,
        kv_last_page_len_ptr=kv_last_page_len, k_scale_ptr=k_scale, v_scale_ptr=v_scale, k_scale=k_factor, v_scale=v_factor,
        first_token=first, num_tokens=tokens, batch_size=kv_indptr.shape[0] - 1,
        stride_kt=k.stride(0), stride_kh=k.stride(1), stride_kd=k.stride(2),
        stride_vt=v.stride(0), stride_vh=v.stride(1), stride_vd=v.stride(2),
        stride_kcp=cache.k_strides[0], stride_kch=cache.k_strides[1], stride_kct=cache.k_strides[2],
        stride_vcp=cache.v_strides[0], stride_vch=cache.v_strides[1], stride_vct=cache.v_strides[2],
        HEAD_DIM=head_dim, PAGE_SIZE=cache.page_size, LIMIT=limit, PDL=supports_pdl(),
        BLOCK_T=config["BLOCK_T"], BLOCK_D=next_power_of_2(head_dim), BLOCK_B=BLOCK_B, num_warps=config["num_warps"],
        **({"launch_pdl": True} if supports_pdl() else {}),
    )) for first in range(0, tokens, step)]  # fmt: skip


def invalid(config: Values, key: Key, workload: Workload) -> str | None:
    """Why a point need not run: less than 8 bytes of K a thread, or more registers than a thread has."""
    elements = config["BLOCK_T"] * next_power_of_2(key.head_dim) // (32 * config["num_warps"])
    if elements < 4 and config["num_warps"] > 1:
        return "less than 8 bytes a thread"
    if elements > 64:
        return "more than 64 elements a thread"
    return None


TEMPLATE = Template(
    name="append",
    tunables=TUNABLES,
    runtime=frozenset(),
    invalid=invalid,
    default=lambda key, workload: default_config(query_of(key, workload)),
    problem=lambda key, workload, **kw: AppendProblem(launches, key, workload, **kw),
    jit_functions=JIT_FUNCTIONS,
)
