"""The paged KV cache as the kernels see it: K and V with strides, whatever the layout."""

from typing import NamedTuple

import torch

LAYOUTS = ("HND", "NHD")


class PagedCache(NamedTuple):
    """K and V of a paged cache; strides in elements, in the order (page, head, token)."""

    k: torch.Tensor
    v: torch.Tensor
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    page_size: int
    kv_heads: int
    head_dim: int


def paged_cache(kv_cache: torch.Tensor, v_cache: torch.Tensor | None, kv_layout: str) -> PagedCache:
    """View a cache tensor [pages, 2, ...] (v_cache None) or a pair of [pages, ...] in either layout.

    HND is [pages, (2,) kv_heads, page_size, head_dim], NHD [pages, (2,) page_size, kv_heads, head_dim].
    """
    k, v = (kv_cache[:, 0], kv_cache[:, 1]) if v_cache is None else (kv_cache, v_cache)
    head, token = (1, 2) if kv_layout == "HND" else (2, 1)
    return PagedCache(
        k, v,
        (k.stride(0), k.stride(head), k.stride(token)), (v.stride(0), v.stride(head), v.stride(token)),
        k.shape[token], k.shape[head], k.shape[3],
    )  # fmt: skip
