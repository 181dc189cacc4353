"""The template "prefill_hopper" on a Hopper: the properties of the plain template's tests, for every config and its own edges."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from paged import ON_HOPPER, assert_close, assert_lse_close, cases, check_prefill
from real import Buffers, Real

import patune
from patune.kernels import ops, prefill_hopper
from patune.kernels.prefill_hopper import TEMPLATE
from patune.tuner.space import valid_points
from patune.workload import Key, Workload

pytestmark = pytest.mark.gpu

CASES = {
    "one prompt": Real((2048,), (2048,)),
    "1, 5 and 17 tokens": Real((1, 5, 17), (1, 5, 17)),
    "ragged prompts p64": Real((1500, 1, 700, 64, 65), (1500, 1, 700, 64, 65), page_size=64),
    "cached prefixes and idle sequences": Real((4096, 300, 0, 1000, 78), (128, 300, 0, 0, 77)),
    "no keys, and fewer keys than queries": Real((0, 130, 1, 100), (200, 130, 3, 300)),
    "512 over 8k, g8 d64 NHD": Real((8192, 513), (512, 512), head_dim=64, group=8, layout="NHD"),
    "d256 g2 p32 pair": Real((700, 901), (700, 200), head_dim=256, group=2, page_size=32, pair=True),
    "p8 NHD pair fp16 strided q": Real(
        (1000, 2000), (1000, 300), page_size=8, layout="NHD", pair=True, dtype=torch.float16, strided_q=True
    ),
    "p256 g7, a page larger than a tile": Real((700, 901), (700, 200), group=7, kv_heads=4, page_size=256),
    "p128 MHA": Real((700, 901), (700, 200), group=1, kv_heads=16, page_size=128),
    "150 sequences": Real(tuple(7 * i % 300 + i % 40 for i in range(150)), tuple(7 * i % 300 for i in range(150)), kv_heads=2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def hopper(gpu):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def points(case: Real) -> list[dict[str, int]]:
    key = Key(TEMPLATE.name, "", 132, case.head_dim, case.page_size, case.group)
    return valid_points(TEMPLATE, key, Workload(1, 1))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_config_equals_the_reference(case):
    """Output and lse, from a poisoned output, twice: a second launch finds barriers and counters as the first one did."""
    b = Buffers(case)
    want, want_lse = b.reference()
    for config in points(case):
        call = partial(patune.paged_prefill, b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=max(b.q_lens), config=config)
        for _ in range(2):
            got, lse = call(out=b.poisoned(), return_lse=True, **b.options)
            assert_close(got, want, b.limit)
            assert_lse_close(lse, want_lse, b.limit)


def test_without_causal_every_key_is_seen():
    b = Buffers(Real((1000, 700), (300, 700)))
    want, want_lse = b.reference(causal=False)
    for config in points(b.case):
        got, lse = patune.paged_prefill(
            b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=700, causal=False, out=b.poisoned(), return_lse=True, config=config
        )
        assert_close(got, want, b.limit)
        assert_lse_close(lse, want_lse, b.limit)


@settings(max_examples=60)
@given(cases(prefill=True, **ON_HOPPER))
def test_small_batches_of_any_shape_and_layout_equal_the_reference(case):
    check_prefill(case, "cuda", BLOCK_N=64, num_stages=2, schedule=1, issue=1)


def test_prefill_takes_the_kernel_only_where_it_serves_and_refuses_its_config_elsewhere(monkeypatch):
    launched = []
    run = ops.run
    monkeypatch.setattr(ops, "run", lambda launches, tensor: (launched.extend(launches), run(launches, tensor)))
    b = Buffers(Real((4096,), (4096,)))
    config = prefill_hopper.TEMPLATE.default(Key("prefill_hopper", "", 132, 128, 16, 4), Workload(1, 4096, 4096))
    call = partial(patune.paged_prefill, b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=4096)
    assert_close(call(config=config), b.reference()[0], b.limit)
    call(sliding_window=100)
    assert [launch.fn.__name__ for launch in launched] == ["prefill_attention_hopper", "prefill_attention"]
    with pytest.raises(ValueError, match=r"config: is of the kernel for Hopper, which does not serve this call"):
        call(sliding_window=100, config=config)


@pytest.mark.parametrize("schedule", prefill_hopper.TUNABLES["schedule"])
def test_one_captured_prefill_is_right_for_any_lengths_up_to_its_bounds(schedule):
    """Items are found on the device, so a replay balances the lengths it finds."""
    b = Buffers(Real((2000, 2000), (1000, 1000)))
    b.kv_cache.nan_to_num_(0.5)
    config = dict(BLOCK_N=128, num_stages=2, schedule=schedule, issue=2)
    out = b.poisoned()
    call = partial(patune.paged_prefill, b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=1000, out=out, config=config)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for q_lens, kv_lens in (((1000, 1000), (2000, 2000)), ((1, 999), (1, 2000)), ((0, 700), (5, 701)), ((300, 0), (1999, 0))):
        pages = [-(-n // 16) for n in kv_lens]
        b.qo_indptr.copy_(torch.tensor([0, q_lens[0], sum(q_lens)]))
        b.kv_indptr.copy_(torch.tensor([0, pages[0], sum(pages)]))
        b.kv_last_page_len.copy_(torch.tensor([n - (p - 1) * 16 if p else 0 for n, p in zip(kv_lens, pages, strict=True)]))
        out.fill_(float("nan"))
        graph.replay()
        rows = sum(q_lens)
        assert_close(out[:rows], b.reference()[0][:rows], b.limit)
        assert out[rows:].isnan().all()
