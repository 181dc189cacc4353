"""KV append, template "append": writes the new tokens' K and V into their pages.

One program copies BLOCK_T tokens of one KV head. A token whose batch index is negative is padding and is skipped, and so is
one whose position lies past its sequence's page list: append never writes into a page that the sequence does not own.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..workload import Key, Workload
from .defaults import default_config, query_of
from .device import supports_pdl
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
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["batch_indices_ptr", "positions_ptr", "kv_indices_ptr", "kv_indptr_ptr"],
)
def append_kv(
    k_ptr, v_ptr, batch_indices_ptr, positions_ptr, k_cache_ptr, v_cache_ptr, kv_indices_ptr, kv_indptr_ptr,
    k_scale_ptr, v_scale_ptr, k_scale, v_scale, num_tokens,
    stride_kt, stride_kh, stride_kd, stride_vt, stride_vh, stride_vd,
    stride_kcp, stride_kch, stride_kct, stride_vcp, stride_vch, stride_vct,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, token blocks)."""
    if PDL:
        gdc_wait()  # for whatever ran before
        gdc_launch_dependents()  # attention, which comes next, begins beside this and waits before it reads
    head = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask = tokens < num_tokens
    b = tl.load(batch_indices_ptr + tokens, mask=mask, other=-1)
    position = tl.load(positions_ptr + tokens, mask=mask, other=-1)
    mask = mask & (b >= 0) & (position >= 0)
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
JIT_FUNCTIONS = (to_cache, append_kv)


def launches(
    k, v, batch_indices, positions, cache, kv_indices, kv_indptr, config, *,
    k_scale=None, v_scale=None, k_factor=1.0, v_factor=1.0,
) -> list[Launch]:  # fmt: skip
    """The launches of one append: one, or as many as a grid's limit asks for.

    k and v [tokens, kv_heads, head_dim]; `cache` a PagedCache.
    """
    tokens, kv_heads, head_dim = k.shape
    limit = torch.finfo(cache.k.dtype).max if cache.k.dtype.itemsize == 1 else 0
    step = MAX_GRID_Y * config["BLOCK_T"]
    parts = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    return [Launch(append_kv, (kv_heads, ceil_div(part.stop - part.start, config["BLOCK_T"])), dict(
        k_ptr=k[part], v_ptr=v[part], batch_indices_ptr=batch_indices[part], positions_ptr=positions[part],
        k_cache_ptr=cache.k, v_cache_ptr=cache.v, kv_indices_ptr=kv_indices, kv_indptr_ptr=kv_indptr,
        k_scale_ptr=k_scale, v_scale_ptr=v_scale, k_scale=k_factor, v_scale=v_factor, num_tokens=part.stop - part.start,
        stride_kt=k.stride(0), stride_kh=k.stride(1), stride_kd=k.stride(2),
        stride_vt=v.stride(0), stride_vh=v.stride(1), stride_vd=v.stride(2),
        stride_kcp=cache.k_strides[0], stride_kch=cache.k_strides[1], stride_kct=cache.k_strides[2],
        stride_vcp=cache.v_strides[0], stride_vch=cache.v_strides[1], stride_vct=cache.v_strides[2],
        HEAD_DIM=head_dim, PAGE_SIZE=cache.page_size, LIMIT=limit, PDL=supports_pdl(),
        BLOCK_T=config["BLOCK_T"], BLOCK_D=next_power_of_2(head_dim), num_warps=config["num_warps"],
        **({"launch_pdl": True} if supports_pdl() else {}),
    )) for part in parts]  # fmt: skip


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
