"""The public kernels: check the arguments, allocate the output, call the operator."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from . import bound, checks, ops  # noqa: F401  ops registers the operators
from .append import TEMPLATE as APPEND
from .cache import PagedCache
from .checks import bad
from .decode import TEMPLATE as DECODE
from .decode_hopper import TEMPLATE as DECODE_HOPPER
from .prefill import TEMPLATE as PREFILL
from .prefill_hopper import TEMPLATE as PREFILL_HOPPER
from .template import Template, Values

Scale = float | torch.Tensor | None
Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def paged_decode(
    q: torch.Tensor,
    kv_cache: Cache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    sm_scale: float | None = None,
    *,
    kv_layout: str = "HND",
    q_len_per_seq: int = 1,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    max_kv_len: int | None = None,
    ragged: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    config: Values | None = None,
) -> Any:
    """Attention of q_len_per_seq new tokens a sequence over its paged KV cache, which already holds their K and V.

    q: [batch * q_len_per_seq, q_heads, head_dim], bf16, fp16 or fp32, any strides; head_dim at most 512.
    kv_cache: one tensor [pages, 2, kv_heads, page_size, head_dim] (HND) or [pages, 2, page_size, kv_heads, head_dim]
        (NHD), or a (k, v) pair without the 2; q's dtype, or fp8 (e4m3fn, e5m2). q_heads must be a multiple of
        kv_heads, page_size 1 to 256.
    kv_indices: [pages in use] int32, page ids. kv_indptr: [batch+1] int32, in pages. kv_last_page_len: [batch] int32.
    sm_scale: 1/sqrt(head_dim) if None. Query i of a sequence sees keys up to kv_len - q_len_per_seq + i.
    sliding_window: keep the last W keys, the query's own included. logits_soft_cap: c * tanh(logits / c).
    sinks: [q_heads], a logit a head that takes part in the softmax's denominator only.
    k_scale, v_scale: what the cache's values are multiplied with; a float, or one fp32 element on the device.
    max_kv_len: the longest sequence as far as the host knows; helps the choice of a config, never the result.
    ragged: False promises sequences of about one length, also where a graph is replayed, and lets each have its own cluster of
        programs, which is faster for a small batch; True says that they differ. None: by max_kv_len, and nothing is promised.
        It helps the choice of a config, never the result.
    deterministic: a sequence's result is the same to the bit whatever else is in the batch, and wherever it stands in it.
        Without, splits follow from the whole batch; two calls with the same arguments agree to the bit either way.
    config: tunables to use instead of the table's. out: where to write, like q.

    Returns out like q; with return_lse a tuple of it and lse, fp32 [tokens, q_heads], the natural log of the sum of exp of
    the scaled logits. A sequence of length 0 gives zeros and lse -inf. No host sync; runs under CUDA-graph capture, where
    one graph is right for any lengths that fit its tensors. Raises ValueError or NotImplementedError that names the argument.
    """
    k, v = kv_cache if isinstance(kv_cache, tuple) and len(kv_cache) == 2 else (kv_cache, None)
    found = bound.find(
        q, k, v, kv_indices, kv_indptr, kv_last_page_len, sinks, k_scale, v_scale, out,
        sm_scale, kv_layout, q_len_per_seq, sliding_window, logits_soft_cap, max_kv_len, ragged, deterministic, return_lse, config,
    )  # fmt: skip
    key, pointers, repeated = found or (None, [], None)
    if repeated is not None:
        return _repeat(repeated, pointers, q, out, return_lse)
    given = _attention(q, kv_cache, kv_layout, sm_scale, sliding_window, logits_soft_cap, sinks, k_scale, v_scale)
    if q_len_per_seq < 1:
        raise bad("q_len_per_seq", f"expected at least 1, got {q_len_per_seq}")
    checks.check_indices(q.device, kv_indices=kv_indices, kv_indptr=kv_indptr)
    batch_size = kv_indptr.shape[0] - 1
    checks.check_indices(q.device, batch_size, kv_last_page_len=kv_last_page_len)
    if q.shape[0] != batch_size * q_len_per_seq:
        raise bad(
            "q", f"expected {batch_size * q_len_per_seq} tokens for {batch_size} sequences of {q_len_per_seq}, got {q.shape[0]}"
        )
    checks.check_out(out, q)
    checks.check_values(given.cache, kv_indices, kv_indptr, kv_last_page_len)
    out = _out(q) if out is None else out
    lse = _lse(q) if return_lse else None
    template = DECODE_HOPPER if config is not None and set(config) == set(DECODE_HOPPER.tunables) else DECODE
    arguments = (
        q, *given.kv, kv_indices, kv_indptr, kv_last_page_len, out, lse, given.sm_scale * given.k_factor, kv_layout, q_len_per_seq,
        max_kv_len, ragged, sliding_window, logits_soft_cap, sinks, *given.scales, given.v_factor, deterministic,
        _values(template, config), template.name,
    )  # fmt: skip
    with nullcontext() if key is None else bound.waiting(key):
        torch.ops.patune.paged_decode(*arguments)
    return (out, lse) if return_lse else out


def paged_prefill(
    q: torch.Tensor,
    kv_cache: Cache,
    qo_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    sm_scale: float | None = None,
    *,
    max_q_len: int,
    causal: bool = True,
    kv_layout: str = "HND",
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    config: Values | None = None,
) -> Any:
    """Attention of a ragged batch of new tokens over a paged KV cache, which already holds their K and V.

    q: [tokens, q_heads, head_dim]; sequence b owns rows qo_indptr[b] to qo_indptr[b+1] (int32, [batch+1]), the last q_len of its
        kv_len keys. max_q_len: the most new tokens of a sequence, a host int; a larger value costs only idle programs.
    causal: query i sees keys up to kv_len - q_len + i; False lets it see all (then no sliding_window).
    The other arguments, the result and the errors are those of `paged_decode`. Rows of q past qo_indptr[-1] are not written.
    """
    k, v = kv_cache if isinstance(kv_cache, tuple) and len(kv_cache) == 2 else (kv_cache, None)
    found = bound.find(
        q, k, v, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, sinks, k_scale, v_scale, out,
        "prefill", sm_scale, max_q_len, causal, kv_layout, sliding_window, logits_soft_cap, return_lse, config,
    )  # fmt: skip
    key, pointers, repeated = found or (None, [], None)
    if repeated is not None:
        return _repeat(repeated, pointers, q, out, return_lse)
    given = _attention(q, kv_cache, kv_layout, sm_scale, sliding_window, logits_soft_cap, sinks, k_scale, v_scale)
    if max_q_len < 0:
        raise bad("max_q_len", f"expected at least 0, got {max_q_len}")
    if sliding_window is not None and not causal:
        raise NotImplementedError("sliding_window: needs causal=True; a window around non-causal rows is not supported")
    checks.check_indices(q.device, kv_indices=kv_indices, kv_indptr=kv_indptr)
    checks.check_indices(q.device, kv_indptr.shape[0] - 1, kv_last_page_len=kv_last_page_len, qo_indptr=qo_indptr)
    checks.check_out(out, q)
    checks.check_values(given.cache, kv_indices, kv_indptr, kv_last_page_len, qo_indptr, q.shape[0], max_q_len)
    out = _out(q) if out is None else out
    lse = _lse(q) if return_lse else None
    template = PREFILL_HOPPER if config is not None and set(config) == set(PREFILL_HOPPER.tunables) else PREFILL
    arguments = (
        q, *given.kv, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, out, lse, given.sm_scale * given.k_factor, kv_layout,
        max_q_len, causal, sliding_window, logits_soft_cap, sinks, *given.scales, given.v_factor,
        _values(template, config), template.name,
    )  # fmt: skip
    with nullcontext() if key is None else bound.waiting(key):
        torch.ops.patune.paged_prefill(*arguments)
    return (out, lse) if return_lse else out


def append_paged_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: Cache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    kv_layout: str = "HND",
    k_scale: Scale = None,
    v_scale: Scale = None,
    config: Values | None = None,
) -> None:
    """Write new K and V [tokens, kv_heads, head_dim] into their pages, divided by k_scale and v_scale.

    Token t goes to position positions[t] of sequence batch_indices[t] (both [tokens] int32, see
    `get_batch_indices_positions`); a negative batch index is padding and is skipped. The page table must already hold the
    pages of the new tokens. fp8 caches saturate. The other arguments and the errors are those of `paged_decode`.
    """
    k_cache, v_cache = kv_cache if isinstance(kv_cache, tuple) and len(kv_cache) == 2 else (kv_cache, None)
    found = bound.find(
        k, v, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, k_scale, v_scale,
        "append", kv_layout, config,
    )  # fmt: skip
    key, pointers, repeated = found or (None, [], None)
    if repeated is not None:
        return repeated.run(pointers)
    checks.check_device(k, "k")
    checks.check_rows(k, "k")
    first, second, cache = checks.check_cache(k, kv_cache, kv_layout, "k")
    checks.check_rows(k, "k", cache.kv_heads)
    checks.check_rows(v, "v", cache.kv_heads, cache.head_dim)
    if not (v.shape == k.shape and v.dtype == k.dtype and v.device == k.device):
        raise bad("v", f"expected {k.dtype} {tuple(k.shape)} like k")
    checks.check_indices(k.device, kv_indices=kv_indices, kv_indptr=kv_indptr)
    checks.check_indices(k.device, kv_indptr.shape[0] - 1, kv_last_page_len=kv_last_page_len)
    checks.check_indices(k.device, k.shape[0], batch_indices=batch_indices, positions=positions)
    k_tensor, k_factor = checks.split_scale(k_scale, "k_scale", k.device)
    v_tensor, v_factor = checks.split_scale(v_scale, "v_scale", k.device)
    checks.check_values(cache, kv_indices, kv_indptr, kv_last_page_len, batch_indices=batch_indices, positions=positions)
    arguments = (
        k, v, batch_indices, positions, first, second, kv_indices, kv_indptr, kv_last_page_len, kv_layout, k_tensor, v_tensor,
        k_factor, v_factor, _values(APPEND, config),
    )  # fmt: skip
    with nullcontext() if key is None else bound.waiting(key):
        torch.ops.patune.append_paged_kv_cache(*arguments)


def paged_attention_with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: Cache,
    qo_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    sm_scale: float | None = None,
    *,
    num_prefill: int,
    num_decode: int,
    max_q_len: int | None = None,
    num_prefill_tokens: int | None = None,
    max_kv_len: int | None = None,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    kv_layout: str = "HND",
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> torch.Tensor:
    """One step of a mixed batch: append k and v, then causal attention of the prefill rows, then of the decode rows.

    The first num_prefill sequences own the first num_prefill_tokens rows of q, k and v (default: all but num_decode, so a
    batch with padding rows has to give it), as qo_indptr [num_prefill+num_decode+1] says; the next num_decode sequences own
    one row each; rows after them are padding: they write no KV and come back as zeros. max_q_len: the most new tokens of a
    prefill sequence, if the host knows. The page table and kv_last_page_len already count the new tokens. batch_indices and
    positions, from `get_batch_indices_positions`, save their computation where one step serves many layers. Everything else
    is as in `paged_decode` and `paged_prefill`.

    Returns [tokens, q_heads, head_dim] like q. Mutates the cache and nothing else; no host sync. Prefill and decode may run beside
    each other; what the caller launches next on the current stream waits for both.
    """
    k_cache, v_cache = kv_cache if isinstance(kv_cache, tuple) and len(kv_cache) == 2 else (kv_cache, None)
    found = bound.find(
        q, k, v, k_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, batch_indices, positions, sinks, k_scale,
        v_scale, "mixed", sm_scale, num_prefill, num_decode, max_q_len, num_prefill_tokens, max_kv_len, kv_layout, sliding_window,
        logits_soft_cap,
    )  # fmt: skip
    key, pointers, repeated = found or (None, [], None)
    if repeated is not None:
        return _repeat(repeated, pointers, q, None, return_lse=False)
    given = _attention(q, kv_cache, kv_layout, sm_scale, sliding_window, logits_soft_cap, sinks, k_scale, v_scale)
    for name, x in (("k", k), ("v", v)):
        checks.check_rows(x, name, given.cache.kv_heads, given.cache.head_dim)
        good = x.shape[0] == q.shape[0] and x.dtype == q.dtype and x.device == q.device
        if not good:
            raise bad(name, f"expected {q.shape[0]} tokens of {q.dtype} on {q.device} like q, got {tuple(x.shape)} {x.dtype}")
    if num_prefill < 0:
        raise bad("num_prefill", f"expected at least 0, got {num_prefill}")
    if max_q_len is not None and max_q_len < 0:
        raise bad("max_q_len", f"expected at least 0 or None, got {max_q_len}")
    if num_decode < 0:
        raise bad("num_decode", f"expected at least 0, got {num_decode}")
    if num_prefill_tokens is None:
        num_prefill_tokens = q.shape[0] - num_decode if num_prefill else 0
    if not (0 <= num_prefill_tokens <= q.shape[0] - num_decode):
        raise bad(
            "num_prefill_tokens",
            f"{num_prefill_tokens} prefill rows and {num_decode} decode rows do not fit q's {q.shape[0]} tokens",
        )
    checks.check_indices(q.device, kv_indices=kv_indices)
    checks.check_indices(
        q.device, num_prefill + num_decode, qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_last_page_len=kv_last_page_len
    )
    if (batch_indices is None) != (positions is None):
        raise bad("positions", "give both batch_indices and positions, or neither")
    checks.check_indices(q.device, q.shape[0], batch_indices=batch_indices, positions=positions)
    checks.check_values(
        given.cache, kv_indices, kv_indptr, kv_last_page_len, qo_indptr, q.shape[0], max_q_len,
        (num_prefill, num_prefill_tokens), batch_indices, positions,
    )  # fmt: skip
    arguments = (
        q, k, v, *given.kv, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, batch_indices, positions, given.sm_scale, kv_layout,
        num_prefill, num_decode, num_prefill_tokens, max_q_len, max_kv_len, sliding_window, logits_soft_cap, sinks,
        *given.scales, given.k_factor, given.v_factor,
    )  # fmt: skip
    with nullcontext() if key is None else bound.waiting(key):
        return torch.ops.patune.paged_attention_with_cache(*arguments)


def merge_states(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from the attention over each.

    o_a, o_b [tokens, heads, head_dim]; lse_a, lse_b [tokens, heads] fp32, natural log. Returns (o like o_a, lse). A side with lse
    -inf saw no key and counts for nothing; both -inf give zeros and -inf. (o_a e^lse_a + o_b e^lse_b) / (e^lse_a + e^lse_b),
    Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    if o_a.shape != o_b.shape:
        raise bad("o_b", f"expected {tuple(o_a.shape)} like o_a, got {tuple(o_b.shape)}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != o_a.shape[:2]:
            raise bad(name, f"expected {tuple(o_a.shape[:2])}, got {tuple(lse.shape)}")
    lse = torch.logaddexp(lse_a.float(), lse_b.float())
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - shift)[..., None], torch.exp(lse_b - shift)[..., None]
    a = torch.where(weight_a > 0, o_a.float() * weight_a, 0.0)  # where: an o of NaN with weight 0 counts for nothing
    b = torch.where(weight_b > 0, o_b.float() * weight_b, 0.0)
    return (a + b).to(o_a.dtype), lse


def _repeat(repeated: bound.Bound, pointers: list[int], q: torch.Tensor, out: torch.Tensor | None, return_lse: bool) -> Any:
    """What attention of q returns, by what is bound to its key."""
    if out is None:
        out = _out(q)
        pointers.append(out.data_ptr())
    if not return_lse:
        repeated.run(pointers)
        return out
    lse = _lse(q)
    pointers.append(lse.data_ptr())
    repeated.run(pointers)
    return out, lse


class _Attention(NamedTuple):
    """What decode, prefill and the mixed step share, checked."""

    kv: tuple[torch.Tensor, torch.Tensor | None]  # the cache as the operators take it
    cache: PagedCache
    sm_scale: float
    scales: tuple[torch.Tensor | None, torch.Tensor | None]  # k_scale and v_scale where they are tensors, 1 elsewhere
    k_factor: float
    v_factor: float


def _attention(
    q: torch.Tensor, kv_cache: Cache, kv_layout: str, sm_scale: float | None, sliding_window: int | None,
    logits_soft_cap: float | None, sinks: torch.Tensor | None, k_scale: Scale, v_scale: Scale,
) -> _Attention:  # fmt: skip
    checks.check_device(q)
    checks.check_rows(q, "q")
    first, second, cache = checks.check_cache(q, kv_cache, kv_layout)
    checks.check_heads(q, cache)
    checks.check_options(q, sliding_window, logits_soft_cap, sinks)
    k_tensor, k_factor = checks.split_scale(k_scale, "k_scale", q.device)
    v_tensor, v_factor = checks.split_scale(v_scale, "v_scale", q.device)
    return _Attention((first, second), cache, checks.check_scale(q, sm_scale), (k_tensor, v_tensor), k_factor, v_factor)


def _out(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(*q.shape)  # a torch.Size is read as a sequence: 0.8 us more


def _lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


def _values(template: Template, config: Values | None) -> list[int] | None:
    """A caller's config as the operator takes it: the tunables' values in the template's order."""
    if config is None:
        return None
    unknown, missing = set(config) - set(template.tunables), set(template.tunables) - set(config)
    if unknown:
        raise bad("config", f"unknown tunable {', '.join(sorted(unknown))}; {template.name} has {', '.join(template.tunables)}")
    if missing:
        raise bad("config", f"lacks {', '.join(sorted(missing))}")
    for name, values in template.tunables.items():
        if config[name] < (least := min(1, *values)):
            raise bad("config", f"{name} must be at least {least}")
    return [int(config[name]) for name in template.tunables]
