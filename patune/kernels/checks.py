"""Argument checks of the public functions: one line that names the argument, what was expected, got, and the way out."""

import math
import os

import torch
import triton

from .cache import LAYOUTS, PagedCache, paged_cache

FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_HEAD_DIM = 256
MAX_PAGE_SIZE = 256
INTERPRETED = triton.knobs.runtime.interpret  # fixed when kernels are imported, and torch.compile cannot trace the knob


def require(condition: bool, argument: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{argument}: {message}")


def check_device(q: torch.Tensor, argument: str = "q") -> None:
    on_cpu = q.device.type == "cpu" and INTERPRETED
    require(
        q.device.type in ("cuda", "meta") or on_cpu,
        argument,
        f"expected a CUDA tensor, got one on {q.device}; move it, or set TRITON_INTERPRET=1 to run on the CPU for tests",
    )


def check_rows(x: torch.Tensor, argument: str, heads: int | None = None, head_dim: int | None = None) -> None:
    """x is [tokens, heads, head_dim] of a supported float type."""
    require(x.ndim == 3, argument, f"expected [tokens, heads, head_dim], got shape {tuple(x.shape)}")
    require(x.dtype in FLOAT_TYPES, argument, f"expected bfloat16, float16 or float32, got {x.dtype}")
    require(heads is None or x.shape[1] == heads, argument, f"expected {heads} heads, got {x.shape[1]}")
    require(head_dim is None or x.shape[2] == head_dim, argument, f"expected head_dim {head_dim}, got {x.shape[2]}")
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{argument}: requires grad, but patune has no backward; call under torch.no_grad()")


def check_cache(
    q: torch.Tensor, kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_layout: str, argument: str = "q"
) -> tuple[torch.Tensor, torch.Tensor | None, PagedCache]:
    """The cache fits q's dtype, device and head_dim. Returns (kv_cache or k, v or None, the view the kernels use)."""
    require(kv_layout in LAYOUTS, "kv_layout", f"expected 'HND' or 'NHD', got {kv_layout!r}")
    pair = isinstance(kv_cache, tuple | list)
    if pair:
        require(len(kv_cache) == 2, "kv_cache", f"expected one tensor or a (k, v) pair, got {len(kv_cache)} tensors")
        first, second = kv_cache
        require(first.shape == second.shape, "kv_cache", f"k is {tuple(first.shape)} but v is {tuple(second.shape)}")
        require(first.dtype == second.dtype, "kv_cache", f"k is {first.dtype} but v is {second.dtype}")
        require(second.device == q.device, "kv_cache", f"v is on {second.device} but {argument} is on {q.device}")
    else:
        first, second = kv_cache, None
    dims = "[pages, kv_heads, page_size, head_dim]" if kv_layout == "HND" else "[pages, page_size, kv_heads, head_dim]"
    if pair:
        require(first.ndim == 4, "kv_cache", f"expected a pair of {dims} for {kv_layout}, got shape {tuple(first.shape)}")
    else:
        dims = dims.replace("[pages, ", "[pages, 2, ")
        good = first.ndim == 5 and first.shape[1] == 2
        require(good, "kv_cache", f"expected {dims} for {kv_layout}, got shape {tuple(first.shape)}")
    require(first.device == q.device, "kv_cache", f"is on {first.device} but {argument} is on {q.device}")
    cache = paged_cache(first, second, kv_layout)
    fp8 = first.dtype in FP8_TYPES
    require(fp8 or first.dtype == q.dtype, "kv_cache", f"expected {q.dtype} like {argument}, or fp8, got {first.dtype}")
    require(cache.k.stride(3) == 1 and cache.v.stride(3) == 1, "kv_cache", "head_dim must be contiguous; pass a contiguous cache")
    require(cache.head_dim == q.shape[2], "kv_cache", f"head_dim is {cache.head_dim} but {argument} has {q.shape[2]}")
    if cache.head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"kv_cache: head_dim {cache.head_dim} is not supported, at most {MAX_HEAD_DIM}")
    require(
        1 <= cache.page_size <= MAX_PAGE_SIZE,
        "kv_cache",
        f"page_size is {cache.page_size}, expected 1 to {MAX_PAGE_SIZE}; is kv_layout {kv_layout!r} right?",
    )
    return first, second, cache


def check_heads(q: torch.Tensor, cache: PagedCache) -> None:
    whole = cache.kv_heads > 0 and q.shape[1] > 0 and q.shape[1] % cache.kv_heads == 0
    require(whole, "q", f"{q.shape[1]} query heads are no multiple of the cache's {cache.kv_heads} KV heads")


def check_indices(device: torch.device, batch_size: int | None = None, **tensors: torch.Tensor | None) -> None:
    """1-D contiguous int32 tensors on `device`. `*_indptr` have batch+1 entries, kv_last_page_len has batch."""
    for name, x in tensors.items():
        if x is None:
            continue
        require(x.dtype == torch.int32, name, f"expected int32, got {x.dtype}; use .to(torch.int32)")
        require(x.ndim == 1, name, f"expected 1 dimension, got shape {tuple(x.shape)}")
        require(x.device == device, name, f"is on {x.device}, expected {device}")
        require(x.stride(0) == 1 or x.shape[0] <= 1, name, "must be contiguous; call .contiguous()")
        if name.endswith("_indptr"):
            require(x.shape[0] >= 1, name, "expected batch+1 entries, got none")
        if batch_size is not None and name != "kv_indices":
            want = batch_size + name.endswith("_indptr")
            require(x.shape[0] == want, name, f"expected {want} entries for a batch of {batch_size}, got {x.shape[0]}")


def check_options(q: torch.Tensor, sliding_window: int | None, logits_soft_cap: float | None, sinks: torch.Tensor | None) -> None:
    require(sliding_window is None or sliding_window >= 1, "sliding_window", f"expected at least 1 or None, got {sliding_window}")
    finite = logits_soft_cap is None or (logits_soft_cap > 0 and math.isfinite(logits_soft_cap))
    require(finite, "logits_soft_cap", f"expected a positive number or None, got {logits_soft_cap}")
    if sinks is not None:
        require(sinks.shape == (q.shape[1],), "sinks", f"expected [{q.shape[1]}], a logit a query head, got {tuple(sinks.shape)}")
        require(sinks.device == q.device, "sinks", f"is on {sinks.device} but q is on {q.device}")
        require(sinks.stride(0) == 1 or q.shape[1] == 1, "sinks", "must be contiguous; call .contiguous()")


def check_scale(q: torch.Tensor, sm_scale: float | None) -> float:
    """The logits' scale; the kernels rely on it being positive, because they take a row's maximum before they scale."""
    if sm_scale is None:
        return 1 / math.sqrt(q.shape[2])
    require(sm_scale > 0 and math.isfinite(sm_scale), "sm_scale", f"expected a positive number or None, got {sm_scale}")
    return float(sm_scale)


def split_scale(scale: float | torch.Tensor | None, name: str, device: torch.device) -> tuple[torch.Tensor | None, float]:
    """A scale as (tensor on the device or None, host factor): tensors are read by the kernel, never by the host."""
    if isinstance(scale, torch.Tensor):
        require(scale.numel() == 1, name, f"expected one element (per-tensor scale), got shape {tuple(scale.shape)}")
        require(scale.device == device, name, f"is on {scale.device}, expected {device}; or pass a float")
        require(scale.dtype == torch.float32, name, f"expected float32, got {scale.dtype}")
        return scale, 1.0
    require(scale is None or scale > 0, name, f"expected a positive number, got {scale}")
    return None, 1.0 if scale is None else float(scale)


def check_out(out: torch.Tensor | None, q: torch.Tensor) -> None:
    if out is not None:
        require(out.shape == q.shape, "out", f"expected {tuple(q.shape)} like q, got {tuple(out.shape)}")
        require(
            out.dtype == q.dtype and out.device == q.device,
            "out",
            f"expected {q.dtype} on {q.device}, got {out.dtype} on {out.device}",
        )


def check_values(
    cache: PagedCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    qo_indptr: torch.Tensor | None = None,
    num_tokens: int = 0,
) -> None:
    """Under PATUNE_CHECK=1: the page table's values, at the price of a host sync. Off, the kernels trust them."""
    if os.environ.get("PATUNE_CHECK") != "1" or kv_indptr.device.type == "meta" or torch.compiler.is_compiling():
        return
    starts, pages = kv_indptr.tolist(), cache.k.shape[0]
    require(starts[0] >= 0, "kv_indptr", f"starts at {starts[0]}, expected 0 or more")
    for b, (a, z) in enumerate(zip(starts, starts[1:], strict=False)):
        require(z >= a, "kv_indptr", f"decreases from {a} to {z} at sequence {b}")
    require(starts[-1] <= kv_indices.shape[0], "kv_indptr", f"ends at {starts[-1]} but kv_indices has {kv_indices.shape[0]} pages")
    used = kv_indices[starts[0] : starts[-1]]
    if used.numel():
        low, high = int(used.min()), int(used.max())
        require(low >= 0, "kv_indices", f"holds the negative page {low}")
        require(high < pages, "kv_indices", f"holds page {high} but the cache has {pages} pages")
    if kv_last_page_len is not None:
        for b, last in enumerate(kv_last_page_len.tolist()):
            if starts[b + 1] > starts[b]:
                in_page = 1 <= last <= cache.page_size
                require(in_page, "kv_last_page_len", f"is {last} for sequence {b}, expected 1 to page_size {cache.page_size}")
    if qo_indptr is not None:
        rows = qo_indptr.tolist()
        require(rows[0] == 0, "qo_indptr", f"starts at {rows[0]}, expected 0")
        for b, (a, z) in enumerate(zip(rows, rows[1:], strict=False)):
            require(z >= a, "qo_indptr", f"decreases from {a} to {z} at sequence {b}")
        require(rows[-1] <= num_tokens, "qo_indptr", f"ends at {rows[-1]} but q has {num_tokens} tokens")
