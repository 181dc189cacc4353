"""The oracle: paged attention in plain torch, fp32, as DESIGN.md defines it. Slow, host-synchronising, exact."""

import math
from typing import Any

import torch

from .cache import paged_cache

SCORES = 1 << 26  # fp32 scores held at once: 256 MiB


def reference_paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    qo_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    sm_scale: float | None = None,
    *,
    causal: bool = True,
    kv_layout: str = "HND",
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of new tokens over their paged cache, both decode (one token a sequence) and prefill.

    q [tokens, q_heads, head_dim]; qo_indptr [batch+1] int32, in tokens; the rest as in `paged_prefill`.
    Returns fp32 [tokens, q_heads, head_dim], and lse [tokens, q_heads] (natural log of the sum over the scaled,
    capped logits and the sink) if asked. Rows that see no key are zeros with lse -inf (or the sink alone).
    """
    first, second = kv_cache if isinstance(kv_cache, tuple) else (kv_cache, None)
    cache = paged_cache(first, second, kv_layout)
    tokens, q_heads, head_dim = q.shape
    group = q_heads // cache.kv_heads
    scale = (1 / math.sqrt(head_dim) if sm_scale is None else sm_scale) * (1.0 if k_scale is None else float(k_scale))
    out = torch.zeros(tokens, q_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.full((tokens, q_heads), float("-inf"), dtype=torch.float32, device=q.device)
    q_starts, page_starts = qo_indptr.tolist(), kv_indptr.tolist()
    for b, last in enumerate(kv_last_page_len.tolist()):
        pages = kv_indices[page_starts[b] : page_starts[b + 1]].long()
        q_len = q_starts[b + 1] - q_starts[b]
        kv_len = (len(pages) - 1) * cache.page_size + last if len(pages) else 0
        k, v = (_tokens(x[pages], kv_layout)[:kv_len] for x in (cache.k, cache.v))  # [kv_len, kv_heads, head_dim]
        if kv_len == 0 and sinks is None:
            continue
        k, v = (x.float().transpose(0, 1) for x in (k, v))  # [kv_heads, kv_len, head_dim]
        keys = torch.arange(kv_len, device=q.device)
        step = max(1, SCORES // (q_heads * max(kv_len, 1)))
        for start in range(0, q_len, step):
            rows = torch.arange(start, min(start + step, q_len), device=q.device)
            tokens_of = q_starts[b] + rows
            last_key = (kv_len - q_len + rows)[:, None]
            visible = keys <= last_key if causal else torch.ones_like(keys <= last_key)  # [rows, kv_len]
            if sliding_window is not None:
                visible = visible & (keys > last_key - sliding_window)
            qs = q[tokens_of].float().transpose(0, 1).reshape(cache.kv_heads, group * len(rows), head_dim)
            s = (qs @ k.transpose(1, 2) * scale).view(q_heads, len(rows), kv_len)
            if logits_soft_cap is not None:
                s = logits_soft_cap * torch.tanh(s / logits_soft_cap)
            s = s.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                s = torch.cat([s, sinks.float()[:, None, None].expand(q_heads, len(rows), 1)], 2)
            log_sum = torch.logsumexp(s, 2)  # [q_heads, rows]
            weights = torch.exp(s - log_sum[..., None]).nan_to_num(0.0)[..., :kv_len]  # -inf - -inf: a row without keys
            o = weights.reshape(cache.kv_heads, group * len(rows), kv_len) @ v
            out[tokens_of] = o.view(q_heads, len(rows), head_dim).transpose(0, 1)
            lse[tokens_of] = log_sum.transpose(0, 1)
    if v_scale is not None:
        out *= float(v_scale)
    return (out, lse) if return_lse else out


def _tokens(pages: torch.Tensor, kv_layout: str) -> torch.Tensor:
    """Pages of K or V as [tokens, kv_heads, head_dim]."""
    return (pages.transpose(1, 2) if kv_layout == "HND" else pages).flatten(0, 1)
