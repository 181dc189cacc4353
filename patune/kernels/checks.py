"""Argument checks of the public functions: one line that names the argument, what was expected, got, and the way out."""

import math
import os

import torch
import triton

from .cache import LAYOUTS, PagedCache, paged_cache

FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_HEAD_DIM = 512
MAX_PAGE_SIZE = 256
MAX_HEAD_OFFSET = 1 << 31  # elements; the kernels' offsets over tokens and pages are 64-bit, over query heads 32-bit
_environment = vars(os.environ)["_data"]  # which os.environ takes 0.6 us to say that something is not in
INTERPRETED = triton.knobs.runtime.interpret  # fixed when kernels are imported, and torch.compile cannot trace the knob


def bad(argument: str, message: str) -> ValueError:
    """The error for an argument. Raised under an `if`: torch.compile must not format symbolic sizes of a good call."""
    return ValueError(f"{argument}: {message}")


def check_device(q: torch.Tensor, argument: str = "q") -> None:
    on_cpu = q.device.type == "cpu" and INTERPRETED
    if not (q.device.type in ("cuda", "meta") or on_cpu):
        raise bad(
            argument,
            f"expected a CUDA tensor, got one on {q.device}; move it, or set TRITON_INTERPRET=1 to run on the CPU for tests",
        )


def check_rows(x: torch.Tensor, argument: str, heads: int | None = None, head_dim: int | None = None) -> None:
    """x is [tokens, heads, head_dim] of a supported float type."""
    if x.ndim != 3:
        raise bad(argument, f"expected [tokens, heads, head_dim], got shape {tuple(x.shape)}")
    if x.dtype not in FLOAT_TYPES:
        raise bad(argument, f"expected bfloat16, float16 or float32, got {x.dtype}")
    if heads is not None and x.shape[1] != heads:
        raise bad(argument, f"expected {heads} heads, got {x.shape[1]}")
    if head_dim is not None and x.shape[2] != head_dim:
        raise bad(argument, f"expected head_dim {head_dim}, got {x.shape[2]}")
    if (x.shape[1] - 1) * x.stride(1) >= MAX_HEAD_OFFSET:
        raise NotImplementedError(f"{argument}: its heads lie more than 2^31 elements apart; call .contiguous()")
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{argument}: requires grad, but patune has no backward; call under torch.no_grad()")


def check_cache(
    q: torch.Tensor, kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_layout: str, argument: str = "q"
) -> tuple[torch.Tensor, torch.Tensor | None, PagedCache]:
    """The cache fits q's dtype, device and head_dim. Returns (kv_cache or k, v or None, the view the kernels use)."""
    if kv_layout not in LAYOUTS:
        raise bad("kv_layout", f"expected 'HND' or 'NHD', got {kv_layout!r}")
    page = "kv_heads, page_size, head_dim]" if kv_layout == "HND" else "page_size, kv_heads, head_dim]"
    first: torch.Tensor
    second: torch.Tensor | None = None
    if isinstance(kv_cache, torch.Tensor):
        first = kv_cache
        if first.ndim != 5 or first.shape[1] != 2:
            raise bad("kv_cache", f"expected [pages, 2, {page} for {kv_layout}, got shape {tuple(first.shape)}")
    else:
        if len(kv_cache) != 2:
            raise bad("kv_cache", f"expected one tensor or a (k, v) pair, got {len(kv_cache)} tensors")
        first, second = kv_cache
        if first.shape != second.shape:
            raise bad("kv_cache", f"k is {tuple(first.shape)} but v is {tuple(second.shape)}")
        if first.dtype != second.dtype:
            raise bad("kv_cache", f"k is {first.dtype} but v is {second.dtype}")
        if second.device != q.device:
            raise bad("kv_cache", f"v is on {second.device} but {argument} is on {q.device}")
        if first.ndim != 4:
            raise bad("kv_cache", f"expected a pair of [pages, {page} for {kv_layout}, got shape {tuple(first.shape)}")
    if first.device != q.device:
        raise bad("kv_cache", f"is on {first.device} but {argument} is on {q.device}")
    cache = paged_cache(first, second, kv_layout)
    if first.dtype != q.dtype and first.dtype not in FP8_TYPES:
        raise bad("kv_cache", f"expected {q.dtype} like {argument}, or fp8, got {first.dtype}")
    if cache.k.stride(3) != 1 or cache.v.stride(3) != 1:
        raise bad("kv_cache", "head_dim must be contiguous; pass a contiguous cache")
    if cache.head_dim != q.shape[2]:
        raise bad("kv_cache", f"head_dim is {cache.head_dim} but {argument} has {q.shape[2]}")
    if cache.head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"kv_cache: head_dim {cache.head_dim} is not supported, at most {MAX_HEAD_DIM}")
    if not 1 <= cache.page_size <= MAX_PAGE_SIZE:
        raise bad("kv_cache", f"page_size is {cache.page_size}, expected 1 to {MAX_PAGE_SIZE}; is kv_layout {kv_layout!r} right?")
    return first, second, cache


def check_heads(q: torch.Tensor, cache: PagedCache) -> None:
    if cache.kv_heads == 0 or q.shape[1] == 0 or q.shape[1] % cache.kv_heads:
        raise bad("q", f"{q.shape[1]} query heads are no multiple of the cache's {cache.kv_heads} KV heads")


def check_indices(device: torch.device, batch_size: int | None = None, **tensors: torch.Tensor | None) -> None:
    """1-D contiguous int32 tensors on `device`. `*_indptr` have batch+1 entries, kv_last_page_len has batch."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype != torch.int32:
            raise bad(name, f"expected int32, got {x.dtype}; use .to(torch.int32)")
        if x.ndim != 1:
            raise bad(name, f"expected 1 dimension, got shape {tuple(x.shape)}")
        if x.device != device:
            raise bad(name, f"is on {x.device}, expected {device}")
        if x.stride(0) != 1 and x.shape[0] > 1:
            raise bad(name, "must be contiguous; call .contiguous()")
        if name.endswith("_indptr") and x.shape[0] < 1:
            raise bad(name, "expected batch+1 entries, got none")
        if batch_size is not None and name != "kv_indices":
            want = batch_size + 1 if name.endswith("_indptr") else batch_size
            if x.shape[0] != want:
                raise bad(name, f"expected {want} entries for a batch of {batch_size}, got {x.shape[0]}")


def check_options(q: torch.Tensor, sliding_window: int | None, logits_soft_cap: float | None, sinks: torch.Tensor | None) -> None:
    if sliding_window is not None and sliding_window < 1:
        raise bad("sliding_window", f"expected at least 1 or None, got {sliding_window}")
    if logits_soft_cap is not None and not (logits_soft_cap > 0 and math.isfinite(logits_soft_cap)):
        raise bad("logits_soft_cap", f"expected a positive number or None, got {logits_soft_cap}")
    if sinks is not None:
        if sinks.shape != (q.shape[1],):
            raise bad("sinks", f"expected [{q.shape[1]}], a logit a query head, got {tuple(sinks.shape)}")
        if sinks.device != q.device:
            raise bad("sinks", f"is on {sinks.device} but q is on {q.device}")
        if sinks.stride(0) != 1 and q.shape[1] > 1:
            raise bad("sinks", "must be contiguous; call .contiguous()")


def check_scale(q: torch.Tensor, sm_scale: float | None) -> float:
    """The logits' scale; the kernels rely on it being positive, because they take a row's maximum before they scale."""
    if sm_scale is None:
        return 1 / math.sqrt(q.shape[2])
    if not (sm_scale > 0 and math.isfinite(sm_scale)):
        raise bad("sm_scale", f"expected a positive number or None, got {sm_scale}")
    return float(sm_scale)


def split_scale(scale: float | torch.Tensor | None, name: str, device: torch.device) -> tuple[torch.Tensor | None, float]:
    """A scale as (tensor on the device or None, host factor): tensors are read by the kernel, never by the host."""
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise bad(name, f"expected one element (per-tensor scale), got shape {tuple(scale.shape)}")
        if scale.device != device:
            raise bad(name, f"is on {scale.device}, expected {device}; or pass a float")
        if scale.dtype != torch.float32:
            raise bad(name, f"expected float32, got {scale.dtype}")
        return scale, 1.0
    if scale is not None and scale <= 0:
        raise bad(name, f"expected a positive number, got {scale}")
    return None, 1.0 if scale is None else float(scale)


def check_out(out: torch.Tensor | None, q: torch.Tensor) -> None:
    if out is not None:
        check_rows(out, "out")
        if out.shape != q.shape:
            raise bad("out", f"expected {tuple(q.shape)} like q, got {tuple(out.shape)}")
        if out.dtype != q.dtype or out.device != q.device:
            raise bad("out", f"expected {q.dtype} on {q.device}, got {out.dtype} on {out.device}")


def values_are_checked() -> bool:
    return _environment.get(b"PATUNE_CHECK") == b"1"


def check_values(
    cache: PagedCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    qo_indptr: torch.Tensor | None = None,
    num_tokens: int = 0,
    max_q_len: int | None = None,
    num_prefill_rows: tuple[int, int] | None = None,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Under PATUNE_CHECK=1: the page table's values, at the price of a host sync. Off, the kernels trust them."""
    if torch.compiler.is_compiling() or not values_are_checked() or kv_indptr.device.type == "meta":
        return
    starts, pages = kv_indptr.tolist(), cache.k.shape[0]
    if starts[0] < 0:
        raise bad("kv_indptr", f"starts at {starts[0]}, expected 0 or more")
    _check_increases("kv_indptr", starts)
    if starts[-1] > kv_indices.shape[0]:
        raise bad("kv_indptr", f"ends at {starts[-1]} but kv_indices has {kv_indices.shape[0]} pages")
    used = kv_indices[starts[0] : starts[-1]]
    if used.numel():
        low, high = int(used.min()), int(used.max())
        if low < 0:
            raise bad("kv_indices", f"holds the negative page {low}")
        if high >= pages:
            raise bad("kv_indices", f"holds page {high} but the cache has {pages} pages")
    for b, last in enumerate(kv_last_page_len.tolist()):
        if starts[b + 1] > starts[b] and not 1 <= last <= cache.page_size:
            raise bad("kv_last_page_len", f"is {last} for sequence {b}, expected 1 to page_size {cache.page_size}")
    if qo_indptr is not None:
        rows = qo_indptr.tolist()
        if rows[0] != 0:
            raise bad("qo_indptr", f"starts at {rows[0]}, expected 0")
        _check_increases("qo_indptr", rows)
        if rows[-1] > num_tokens:
            raise bad("qo_indptr", f"ends at {rows[-1]} but q has {num_tokens} tokens")
        prefill = slice(0, num_prefill_rows[0] if num_prefill_rows else len(rows) - 1)
        longest = max([z - a for a, z in zip(rows, rows[1:])][prefill], default=0)
        if max_q_len is not None and longest > max_q_len:
            raise bad("max_q_len", f"is {max_q_len} but a sequence has {longest} new tokens")
        if num_prefill_rows is not None:
            sequences, tokens = num_prefill_rows
            want = [tokens + i for i in range(len(rows) - sequences)]
            if rows[sequences:] != want:
                raise bad("qo_indptr", f"is {rows} but {sequences} prefill sequences have {tokens} tokens and each later one has 1")
    if batch_indices is not None and positions is not None:
        capacity = [(z - a) * cache.page_size for a, z in zip(starts, starts[1:])]
        for t, (b, position) in enumerate(zip(batch_indices.tolist(), positions.tolist())):
            if b >= len(capacity):
                raise bad("batch_indices", f"holds sequence {b} but the batch has {len(capacity)}")
            unused = position == -1 and b >= 0 and capacity[b] == 0  # a decode slot of length 0
            if b >= 0 and not unused and not 0 <= position < capacity[b]:
                raise bad("positions", f"is {position} for token {t} but the pages of sequence {b} hold {capacity[b]} tokens")


def _check_increases(name: str, indptr: list[int]) -> None:
    for b, (a, z) in enumerate(zip(indptr, indptr[1:])):
        if z < a:
            raise bad(name, f"decreases from {a} to {z} at sequence {b}")
