"""A paged cache as TMA addresses it: K and V as matrices, loaded in boxes of rows of one page."""

import functools
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .cache import PagedCache


@functools.cache
def swizzled(row_bytes: int, itemsize: int) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory: swizzled over 128 bytes of a row, or over all of a shorter one."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, row_bytes), element_bitwidth=8 * itemsize, rank=2)


SWIZZLED = swizzled(128, 2)


def aligned(x: torch.Tensor, *strides: int) -> bool:
    """What TMA asks for: 16-byte multiples."""
    return all(n * x.element_size() % 16 == 0 for n in strides) and x.data_ptr() % 16 == 0


class Matrix(NamedTuple):
    """K or V of a cache as a matrix, with a token's stride between its rows."""

    rows: int
    columns: int
    page_rows: int  # from a page to the next one
    head_rows: int  # from a head to the next one: rows in HND
    head_columns: int  # columns in NHD


def matrix(x: torch.Tensor, strides: tuple[int, int, int], cache: PagedCache) -> Matrix | None:
    """K or V of the cache, `x`, as a matrix that TMA can address; None where its strides do not make one."""
    page, head, token = strides
    head = head if cache.kv_heads > 1 else 0
    page = page if x.shape[0] > 1 else 0
    across = token >= cache.kv_heads * cache.head_dim and (cache.kv_heads - 1) * head + cache.head_dim <= token
    if x.shape[0] == 0 or token < cache.head_dim or page % token or (head % token and not across):
        return None
    if not aligned(x, page, head, token):
        return None
    head_rows, head_columns = (0, head) if across else (head // token, 0)
    rows = (x.shape[0] - 1) * (page // token) + (cache.kv_heads - 1) * head_rows + cache.page_size
    columns = (cache.kv_heads - 1) * head_columns + cache.head_dim
    return None if rows >= 1 << 31 else Matrix(rows, columns, page // token, head_rows, head_columns)


def is_addressable(cache: PagedCache) -> bool:
    """Whether both K and V are matrices."""
    return matrix(cache.k, cache.k_strides, cache) is not None and matrix(cache.v, cache.v_strides, cache) is not None


def pool_arguments(cache: PagedCache, block_n: int) -> dict[str, object]:
    """Kernel arguments of an addressable cache: descriptors of boxes, each of one page's rows of a tile of block_n tokens, and
    how many rows and columns lie between pages and heads."""
    box = [min(cache.page_size, block_n), cache.head_dim]
    arguments: dict[str, object] = {}
    for name, x, strides in (("k", cache.k, cache.k_strides), ("v", cache.v, cache.v_strides)):
        found, size = matrix(x, strides, cache), x.element_size()
        assert found is not None
        layout = swizzled(cache.head_dim * size, size)
        arguments |= {
            f"{name}_desc": TensorDescriptor(x, [found.rows, found.columns], [strides[2], 1], box, layout),
            f"{name}_page_rows": found.page_rows,
            f"{name}_head_rows": found.head_rows,
            f"{name}_head_columns": found.head_columns,
        }
    return arguments
