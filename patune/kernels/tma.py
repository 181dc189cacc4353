"""A paged cache as TMA addresses it: K and V as matrices, loaded in boxes of rows of one page."""

import functools
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .cache import PagedCache


@functools.cache
def swizzled(row_bytes: int, itemsize: int, rank: int = 2) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory: swizzled over 128 bytes of a row, or over all of a shorter one."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, row_bytes), element_bitwidth=8 * itemsize, rank=rank)


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


def pool_arguments(cache: PagedCache, block_n: int, *, one_message: bool = False) -> dict[str, object]:
    """Kernel arguments of an addressable cache: descriptors of boxes, each of one page's rows of a tile of block_n tokens, and
    how many rows and columns lie between pages and heads.

    one_message: boxes [rows / 8, head_dim / 64, 8, 64], which TMA sends as one message where [rows, head_dim] takes one for
    every 128 bytes of a row. Coordinates are [0, 0, row, column] then, not [row, column]. For 16 bits a value.
    """
    rows = min(cache.page_size, block_n)
    arguments: dict[str, object] = {}
    for name, x, strides in (("k", cache.k, cache.k_strides), ("v", cache.v, cache.v_strides)):
        found, size, token = matrix(x, strides, cache), x.element_size(), strides[2]
        assert found is not None
        shape, steps, box = [found.rows, found.columns], [token, 1], [rows, cache.head_dim]
        if one_message:
            outer = [rows // 8, cache.head_dim // 64]
            shape, steps, box = [*outer, *shape], [8 * token, 64, *steps], [*outer, 8, 64]
        layout = swizzled(box[-1] * size, size, len(box))
        arguments |= {
            f"{name}_desc": TensorDescriptor(x, shape, steps, box, layout),
            f"{name}_page_rows": found.page_rows,
            f"{name}_head_rows": found.head_rows,
            f"{name}_head_columns": found.head_columns,
        }
    return arguments
