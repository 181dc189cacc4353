"""The template "decode_hopper" on a Hopper: the properties of the plain template's tests, for every ring and its own edges."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paged import ON_HOPPER, assert_close, assert_lse_close, cases, check_decode
from real import Buffers, Real, ragged

import patune
from patune.kernels import ops
from patune.kernels.decode_hopper import TEMPLATE
from patune.tuner.space import valid_points
from patune.workload import Key, Workload

pytestmark = pytest.mark.gpu

E4M3, E5M2 = dict(kv_dtype=torch.float8_e4m3fn), dict(kv_dtype=torch.float8_e5m2)
SCALES = (("k_scale", torch.tensor([0.5])), ("v_scale", torch.tensor([2.0])))
CASES = {
    "8x8k d128 p16 g4": Real((8192,) * 8),
    "one sequence": Real((5000,)),
    "one short sequence": Real((40,)),
    "64 ragged p64": Real(ragged(64, 2000), page_size=64),
    "128k d64 g8": Real((131072,), head_dim=64, group=8),
    "200 sequences g8 NHD": Real(tuple(37 * i % 1000 for i in range(200)), group=8, kv_heads=2, layout="NHD"),
    "MHA": Real((4096, 1, 4095, 4097), group=1, kv_heads=32),
    "group 7, p256": Real(ragged(16, 3000, 1), group=7, kv_heads=4, page_size=256),
    "d256 p64 g8 pair": Real(ragged(8, 3000, 4), head_dim=256, page_size=64, group=8, kv_heads=2, pair=True),
    "p8 NHD pair fp16 strided q": Real(
        ragged(8, 1500, 5), page_size=8, layout="NHD", pair=True, dtype=torch.float16, strided_q=True
    ),
    "empty sequences": Real((0, 5000, 0, 1, 0, 900, 0, 0)),
    "nothing but empty sequences": Real((0, 0)),
    "2 tokens a sequence": Real((2, 4000, 3999), 2),
    "4 tokens a sequence": Real((4, 4000, 3999, 65), 4, kv_heads=2),
    "float scales": Real((300, 1000), options=(("k_scale", 0.5), ("v_scale", 2.0))),
    "tensor scales": Real((300, 1000), options=SCALES),
    "fp8 8x8k": Real((8192,) * 8, **E4M3),
    "fp8 one sequence, scales": Real((5000,), options=SCALES, **E4M3),
    "fp8 one short sequence, scales": Real((40,), options=SCALES, **E5M2),
    "fp8 64 ragged p64": Real(ragged(64, 2000), page_size=64, **E4M3),
    "fp8 ragged, one scale a float": Real(ragged(16, 3000, 7), options=(("k_scale", 0.5), SCALES[1]), **E5M2),
    "fp8 128k d64 g8": Real((131072, 31), head_dim=64, group=8, **E4M3),
    "fp8 d64 g16 p8 NHD": Real(ragged(8, 3000, 8), head_dim=64, group=16, kv_heads=2, page_size=8, layout="NHD", **E5M2),
    "fp8 200 sequences g8 NHD": Real(tuple(37 * i % 1000 for i in range(200)), group=8, kv_heads=2, layout="NHD", **E4M3),
    "fp8 MHA": Real((4096, 1, 4095, 4097), group=1, kv_heads=32, **E4M3),
    "fp8 group 7, p256": Real(ragged(16, 3000, 1), group=7, kv_heads=4, page_size=256, **E4M3),
    "fp8 d256 p64 g8 pair, scales": Real(
        ragged(8, 3000, 4), head_dim=256, page_size=64, group=8, kv_heads=2, pair=True, options=SCALES, **E4M3
    ),
    "fp8 128k d256 p32 g2": Real((131072,), head_dim=256, page_size=32, group=2, kv_heads=2, **E5M2),
    "fp8 p8 NHD pair fp16 strided q": Real(
        ragged(8, 1500, 5), page_size=8, layout="NHD", pair=True, dtype=torch.float16, strided_q=True, **E4M3
    ),
    "fp8 empty sequences": Real((0, 5000, 0, 1, 0, 900, 0, 0), **E4M3),
    "fp8 4 tokens a sequence": Real((4, 4000, 3999, 65), 4, kv_heads=2, **E5M2),
}


@pytest.fixture(autouse=True)
def hopper(gpu):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def points(case: Real) -> list[dict[str, int]]:
    """Every ring, in one piece, in 7, and in clusters."""
    kv_dtype = str(case.kv_dtype or case.dtype)[6:]
    key = Key(TEMPLATE.name, "", 132, case.head_dim, case.page_size, case.group, kv_dtype=kv_dtype)
    q_len = case.q_lens if isinstance(case.q_lens, int) else 1
    of_batch = valid_points(TEMPLATE, key, Workload(8, 4096, q_len))
    whole = [p for p in of_batch if p["num_splits"] == 1]
    return whole + [p | {"num_splits": 7} for p in whole] + [p for p in of_batch if p["cluster"] > 1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_ring_equals_the_reference(case):
    """Output and lse, from a poisoned output, twice: stale rows and pages are full of NaN."""
    b = Buffers(case)
    want, want_lse = b.reference()
    q_len = case.q_lens if isinstance(case.q_lens, int) else 1
    for config in points(case):
        call = partial(patune.paged_decode, b.q, b.kv_cache, *b.table, q_len_per_seq=q_len, config=config)
        for _ in range(2):
            got, lse = call(out=b.poisoned(), return_lse=True, **b.options)
            assert_close(got, want, b.limit)
            assert_lse_close(lse, want_lse, b.limit)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    "shares", [dict(num_stages=3, cluster=1, num_splits=3), dict(num_stages=2, cluster=4, num_splits=4)], ids=str
)
@settings(max_examples=20)  # of 4 s each, nearly all of it compilation
@given(case=cases(**ON_HOPPER), scales=st.booleans())
def test_small_batches_of_any_shape_and_layout_equal_the_reference(shares, kv_dtype, case, scales):
    assume(case.group * case.q_lens[0] <= 16)
    check_decode(replace(case, kv_dtype=kv_dtype, scales=scales), "cuda", BLOCK_N=64, **shares)


@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**40])
def test_an_fp8_cache_is_right_for_queries_of_any_size(size):
    """bf16 queries are brought into fp16's range for the dots, so none overflows or vanishes."""
    b = Buffers(Real(ragged(16, 1000), **E4M3))
    q, sm_scale = b.q * size, b.case.head_dim**-0.5 / size
    want = patune.reference_paged_attention(q, b.kv_cache, b.qo_indptr, *b.table, sm_scale)
    for config in points(b.case):
        assert_close(patune.paged_decode(q, b.kv_cache, *b.table, sm_scale, config=config), want, b.limit)


@pytest.mark.parametrize(("num_splits", "cluster"), [(1, 1), (4, 1), (4, 4)])
def test_a_captured_decode_reads_the_scales_of_when_it_runs(num_splits, cluster):
    """Of tensors that the kernel before it writes, in every replay others."""
    b = Buffers(Real((2000, 300), **E4M3))
    given, scales = torch.ones(2, device="cuda"), torch.full((2,), float("nan"), device="cuda")
    k_scale, v_scale = scales[:1], scales[1:]
    config, out = dict(BLOCK_N=128, num_stages=3, cluster=cluster, num_splits=num_splits), b.poisoned()

    def step():
        scales.copy_(given)
        patune.paged_decode(b.q, b.kv_cache, *b.table, k_scale=k_scale, v_scale=v_scale, config=config, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for k, v in ((0.5, 2.0), (2.0, 0.125)):
        given.copy_(torch.tensor([k, v]))
        scales.fill_(float("nan"))
        out.fill_(float("nan"))
        graph.replay()
        want = patune.reference_paged_attention(b.q, b.kv_cache, b.qo_indptr, *b.table, k_scale=k, v_scale=v)
        assert_close(out, want, b.limit)


def test_decode_takes_the_kernel_only_where_it_serves_and_refuses_its_config_elsewhere(monkeypatch):
    launched = []
    run = ops.run
    monkeypatch.setattr(ops, "run", lambda launches, tensor: (launched.extend(launches), run(launches, tensor)))
    b = Buffers(Real((4096,)))
    config = TEMPLATE.default(Key("decode_hopper", "", 132, 128, 16, 4), Workload(1, 4096)) | {"cluster": 1}
    call = partial(patune.paged_decode, b.q, b.kv_cache, *b.table, config=config)
    assert_close(call(), b.reference()[0], b.limit)
    assert [launch.fn.__name__ for launch in launched] == ["decode_split_hopper", "decode_reduce"]
    for options in (dict(sliding_window=100), dict(deterministic=True)):
        with pytest.raises(ValueError, match=r"config: is of the kernel for Hopper, which does not serve this call"):
            call(**options)


@pytest.mark.parametrize("cluster", [1, 4])
def test_one_captured_decode_is_right_for_any_lengths_and_right_behind_another_one(cluster):
    """Between two calls of a graph the page table changes; the second one is launched before that has ended."""
    b = Buffers(Real((2000, 2000, 2000)))
    b.kv_cache.nan_to_num_(0.5)
    config = dict(BLOCK_N=64, num_stages=3, cluster=cluster, num_splits=4)
    outs = [b.poisoned(), b.poisoned()]
    others = [torch.empty_like(x) for x in b.table]
    call = partial(patune.paged_decode, b.q, b.kv_cache, config=config)

    def both():
        call(*b.table, out=outs[0])
        for x, y in zip(others, b.table, strict=True):
            x.copy_(y.flip(0) if x is others[0] else y)
        call(*others, out=outs[1])

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    for kv_lens in ((2000, 2000, 2000), (1, 1999, 65), (0, 700, 0), (300, 0, 2000)):
        pages = [-(-n // 16) for n in kv_lens]
        b.kv_indptr.copy_(torch.tensor([0, pages[0], sum(pages[:2]), sum(pages)]))
        b.kv_last_page_len.copy_(torch.tensor([n - (p - 1) * 16 if p else 0 for n, p in zip(kv_lens, pages, strict=True)]))
        for x in others:
            x.random_(-(2**31), 2**31 - 1)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert_close(outs[0], b.reference()[0], b.limit)
        assert_close(outs[1], patune.reference_paged_attention(b.q, b.kv_cache, b.qo_indptr, *others), b.limit)
