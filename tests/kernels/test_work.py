"""The work follows the sequences, not the pool; rows and shares without keys count for nothing."""

import pytest
import torch
from launching import call_all, to_meta
from paged import Batch, Case, check_decode, check_prefill

from patune.kernels import decode
from patune.kernels.cache import paged_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLIT = dict(BLOCK_N=16, num_warps=4, num_stages=2, num_splits=3)
TILES = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2, maxnreg=0, num_splits=1)


def test_the_split_count_comes_from_the_sequences_not_from_the_pool(launched):
    """A page pool a thousand times as large changes no config, no grid and no scratch."""
    shapes = []
    for pool in (10, 10_000):
        cache = torch.empty(pool, 2, 2, 16, 64, dtype=torch.float8_e5m2, device="meta")
        batch = to_meta(Batch(Case((1, 1), (64, 70), dtype="bfloat16"), "cpu"))
        batch.kv_cache = cache
        launched.clear()
        call_all(batch)
        shapes.append([(x.grid, x.args.get("num_splits"), getattr(x.args.get("partial_ptr"), "shape", None)) for x in launched])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("num_splits", [1, 2, 16])
@pytest.mark.parametrize("head_dim", [16, 256])
def test_scratch_is_sized_by_the_call_at_hand(head_dim, num_splits):
    """Partial results have room for this call's shares, heads, rows and padded head_dim, and nothing outlives the call."""
    sizes = []
    for dim in (head_dim, 128, head_dim):
        batch = Batch(Case((1, 1, 1), (20, 30, 0), head_dim=dim), DEVICE)
        cache = paged_cache(batch.kv_cache, None, "HND")
        made = decode.launches(batch.q, cache, *batch.pages, batch.q, None, SPLIT | {"num_splits": num_splits}, sm_scale=1.0)
        shares, rows = made[0].grid[1], 2 * 4
        scratch = made[0].args["partial_ptr"], made[0].args["partial_lse_ptr"]
        assert [x.numel() for x in scratch] == ([shares * rows * dim, shares * rows] if num_splits > 1 else [0, 0])
        assert all(launch.args["partial_ptr"] is scratch[0] for launch in made)
        sizes.append((scratch[0].numel(), scratch[0].data_ptr()))
    assert sizes[0][0] == sizes[2][0]


# Rows and shares without keys


@pytest.mark.parametrize("window", [1, 3])
def test_a_row_whose_first_tiles_are_fully_masked_is_no_nan(window):
    """The later rows of a tile see no key of the first tiles that the tile's first row needs."""
    check_prefill(Case((50,), (60,), window=window, head_dim=16), DEVICE, **(TILES | {"BLOCK_N": 32}))
    check_decode(Case((20,), (60,), window=window, group=1, head_dim=16), DEVICE, **(SPLIT | {"num_splits": 1}))


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_row_that_sees_no_key_at_all_is_zeros_with_lse_minus_infinity(num_splits, sinks):
    """More new tokens than keys, and no keys: zeros, or the sink alone in the lse."""
    check_decode(Case((5, 5), (3, 40), sinks=sinks), DEVICE, **(SPLIT | {"num_splits": num_splits}))
    check_prefill(Case((5, 5, 2), (3, 40, 0), sinks=sinks), DEVICE, **TILES)


@pytest.mark.parametrize("kv_lens", [(33, 33), (1, 90), (0, 17), (0, 0)], ids=str)
def test_an_empty_share_counts_for_nothing(kv_lens):
    """More shares than tiles: those without a key must not give -inf minus -inf."""
    check_decode(Case((1, 1), kv_lens), DEVICE, **(SPLIT | {"num_splits": 16}))


def test_a_share_that_only_some_rows_see_counts_for_those_alone():
    """The last share of 33 keys, cut every 16, holds one key, which only the last of 5 query tokens sees."""
    check_decode(Case((5,), (33,)), DEVICE, **SPLIT)
    check_decode(Case((5,), (33,), window=2), DEVICE, **SPLIT)
