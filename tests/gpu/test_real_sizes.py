"""Decode, prefill, append and the mixed step at real sizes against the fp32 reference."""

import pytest
import torch
from paged import assert_close, assert_lse_close
from real import Buffers, Real, ragged

import patune

pytestmark = pytest.mark.gpu

FP8 = dict(kv_dtype=torch.float8_e4m3fn, options=(("k_scale", 0.5), ("v_scale", torch.tensor([2.0]))))
FEATURES = (("sliding_window", 700), ("logits_soft_cap", 30.0), ("sinks", torch.linspace(-3, 3, 32)))

DECODE = {
    "8x8k d128 p16 g4": Real((8192,) * 8),
    "64 ragged d128 p64 g4": Real(ragged(64, 2000), page_size=64),
    "1x128k d64 p16 g8": Real((131072,), head_dim=64, group=8),
    "256x1k d128 p16 g8 NHD": Real((1000,) * 256, group=8, kv_heads=2, layout="NHD"),
    "MHA 4x4k": Real((4096, 1, 4095, 4097), group=1, kv_heads=32),
    "group 7": Real(ragged(16, 3000, 1), group=7, kv_heads=4),
    "head_dim 80 page 1": Real(ragged(8, 1500, 2), head_dim=80, page_size=1),
    "head_dim 112 page 256 NHD": Real(ragged(8, 3000, 3), head_dim=112, page_size=256, layout="NHD"),
    "head_dim 256 page 64 g8 pair": Real(ragged(8, 3000, 4), head_dim=256, page_size=64, group=8, kv_heads=2, pair=True),
    "head_dim 512 page 64 g8": Real(ragged(8, 3000, 11), head_dim=512, page_size=64, group=8, kv_heads=2),
    "page 1 NHD pair strided q": Real(ragged(8, 1500, 5), page_size=1, layout="NHD", pair=True, strided_q=True),
    "page 256": Real(ragged(8, 5000, 6), page_size=256),
    "empty sequences": Real((0, 5000, 0, 1, 0, 900, 0)),
    "2 tokens a sequence": Real((2, 4000, 3999), 2),
    "4 tokens a sequence, group 8": Real((4, 4000, 3999), 4, group=8, kv_heads=2),
    "8 tokens a sequence, group 7": Real((8, 4000, 3999), 8, group=7, kv_heads=2, page_size=64),
    "3 tokens a sequence, window": Real((3, 4000, 3999), 3, options=FEATURES[:1]),
    "fp8 e4m3 d128 g4": Real(ragged(16, 3000, 7), **FP8),
    "fp8 e5m2 d64 g8 NHD": Real(ragged(8, 3000, 8), head_dim=64, group=8, layout="NHD", kv_dtype=torch.float8_e5m2),
    "fp16": Real(ragged(8, 3000, 9), dtype=torch.float16),
    "fp32": Real(ragged(4, 1000, 10), dtype=torch.float32, head_dim=64),
    "window, soft cap and sinks": Real((8192, 500, 3000, 0), options=FEATURES),
}


@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE)
def test_decode_equals_the_reference_with_any_number_of_splits(case):
    """With the default config, in one piece, and in 7 pieces a sequence; output and lse, from a poisoned output."""
    b = Buffers(case)
    want, want_lse = b.reference()
    kv_dtype = str(case.kv_dtype or case.dtype)[6:]
    values = dict(
        patune.get_best_config(
            "decode",
            head_dim=case.head_dim,
            page_size=case.page_size,
            q_heads_per_kv=case.group,
            q_dtype=str(case.dtype)[6:],
            kv_dtype=kv_dtype,
        )
    )
    for config in (None, values | {"num_splits": 1}, values | {"num_splits": 7}):
        got, lse = patune.paged_decode(
            b.q,
            b.kv_cache,
            *b.table,
            q_len_per_seq=b.q_lens[0],
            out=b.poisoned(),
            return_lse=True,
            config=config,
            **b.options,
        )
        assert_close(got, want, b.limit)
        assert_lse_close(lse, want_lse, b.limit)


@pytest.mark.parametrize(
    "case", [Real((20000, 1, 700, 0, 4096, 129) + (90,) * 60), Real((8192, 5, 300, 77), 4, kv_heads=1)], ids=str
)
def test_a_deterministic_row_is_the_same_to_the_bit_whatever_else_is_in_the_batch(case):
    """With the table's config, each of the first sequences alone and in a batch of copies of itself and others."""
    b = Buffers(case)
    options = dict(q_len_per_seq=b.q_lens[0], deterministic=True, return_lse=True)
    out, lse = patune.paged_decode(b.q, b.kv_cache, *b.table, **options)
    assert_close(out, b.reference()[0], b.limit)
    q = b.q.unflatten(0, (-1, b.q_lens[0]))
    for i in range(4):
        for others in ([], [0, 2, 2], [1] * 200):
            batch = [*others, i]
            pages = [b.kv_indices[b.kv_indptr[j] : b.kv_indptr[j + 1]] for j in batch]
            indptr = torch.tensor([0, *(len(p) for p in pages)], device="cuda").cumsum(0).to(torch.int32)
            got, got_lse = patune.paged_decode(
                q[batch].flatten(0, 1), b.kv_cache, torch.cat(pages), indptr, b.kv_last_page_len[batch], **options
            )
            rows = slice(i * b.q_lens[0], (i + 1) * b.q_lens[0])
            assert torch.equal(got[-b.q_lens[0] :], out[rows]) and torch.equal(got_lse[-b.q_lens[0] :], lse[rows])


PREFILL = {
    "2k prompt d128 p16 g4": Real((2048,), (2048,)),
    "ragged prompts p64": Real((1500, 1, 700, 64, 65), (1500, 1, 700, 64, 65), page_size=64),
    "512 over 8k, g8 d64 NHD": Real((8192, 513), (512, 512), head_dim=64, group=8, layout="NHD"),
    "cached prefixes and idle sequences": Real((4096, 300, 0, 1000), (128, 300, 0, 0)),
    "head_dim 80 page 1 MHA": Real((700, 901), (700, 200), head_dim=80, page_size=1, group=1),
    "head_dim 112 page 256 g7 NHD": Real((700, 901), (700, 200), head_dim=112, page_size=256, group=7, kv_heads=4, layout="NHD"),
    "head_dim 256 g8 pair": Real((700, 901), (700, 200), head_dim=256, group=8, kv_heads=2, pair=True),
    "head_dim 512 g8": Real((700, 901), (700, 200), head_dim=512, group=8, kv_heads=2),
    "fp8 e4m3": Real((1000, 2000), (1000, 300), **FP8),
    "fp16 strided q": Real((1000, 2000), (1000, 300), dtype=torch.float16, strided_q=True),
    "fp32": Real((300, 500), (300, 100), dtype=torch.float32, head_dim=64),
    "window": Real((3000, 900), (1000, 900), options=FEATURES[:1]),
    "soft cap and sinks": Real((1500, 900), (1000, 900), options=FEATURES[1:]),
}


@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL)
def test_prefill_equals_the_reference(case):
    """Causal, with the table's choice and with the plain template; output and lse, from a poisoned output."""
    plain = patune.get_best_config(
        "prefill", head_dim=case.head_dim, page_size=case.page_size, q_heads_per_kv=case.group, q_dtype=str(case.dtype)[6:]
    )
    for config in (None, plain):
        check_prefill(Buffers(case), config=config)


def test_prefill_without_causal_equals_the_reference():
    """Every query sees every key of its sequence."""
    check_prefill(Buffers(Real((1000, 700), (300, 700))), causal=False)


def check_prefill(b: Buffers, causal: bool = True, config=None) -> None:
    want, want_lse = b.reference(causal=causal)
    got, lse = patune.paged_prefill(
        b.q,
        b.kv_cache,
        b.qo_indptr,
        *b.table,
        max_q_len=max(b.q_lens),
        causal=causal,
        config=config,
        out=b.poisoned(),
        return_lse=True,
        **b.options,
    )
    assert_close(got, want, b.limit)
    assert_lse_close(lse, want_lse, b.limit)


APPEND = {
    "1 token of 256 sequences": Real(ragged(256, 900), 1),
    "prompts NHD page 64": Real((2000, 3000), (2000, 500), layout="NHD", page_size=64),
    "page 1 head_dim 80 pair": Real((700, 901), (700, 200), page_size=1, head_dim=80, pair=True),
    "fp8": Real((2000, 3000), (2000, 500), kv_dtype=torch.float8_e4m3fn),
    "fp32 head_dim 256": Real((700, 901), (700, 200), dtype=torch.float32, head_dim=256, kv_heads=2),
}


@pytest.mark.parametrize("case", APPEND.values(), ids=APPEND)
def test_append_writes_the_new_tokens_and_nothing_else(case):
    """Everything else in the pool, stale NaN included, stays bit for bit."""
    b = Buffers(case)
    tokens = int(b.qo_indptr[-1])
    k, v = torch.randn(2, tokens + 5, case.kv_heads, case.head_dim, device="cuda", dtype=case.dtype)
    indices, positions = patune.get_batch_indices_positions(b.qo_indptr, b.seq_lens, tokens + 5)
    caches = b.kv_cache if case.pair else (b.kv_cache[:, 0], b.kv_cache[:, 1])
    want = [c.clone() for c in caches]
    sequence, position = indices[:tokens].long(), positions[:tokens].long()
    page = b.kv_indices[b.kv_indptr[sequence].long() + position // case.page_size].long()
    row = position % case.page_size
    for x, new in zip(want, (k, v), strict=True):
        heads_first = x if case.layout == "NHD" else x.transpose(1, 2)
        heads_first[page, row] = new[:tokens].to(x.dtype)
    patune.append_paged_kv_cache(k, v, indices, positions, b.kv_cache, *b.table, kv_layout=case.layout)
    for x, y in zip(caches, want, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_mixed_step_equals_append_then_attention(layout):
    """Two prompts, 30 decodes and padding rows in one call."""
    case = Real((900, 2000, *ragged(30, 2000)), (900, 150, *[1] * 30), layout=layout)
    b = Buffers(case)
    used, padding = int(b.qo_indptr[-1]), 6
    q = torch.cat([b.q, torch.full_like(b.q[:padding], float("nan"))])
    k, v = torch.randn(2, used + padding, case.kv_heads, case.head_dim, device="cuda", dtype=case.dtype)
    got = patune.paged_attention_with_cache(
        q,
        k,
        v,
        b.kv_cache,
        b.qo_indptr,
        *b.table,
        num_prefill=2,
        num_decode=30,
        max_q_len=900,
        num_prefill_tokens=1050,
        **b.options,
    )
    assert_close(got[:used], b.reference()[0], b.limit)
    assert got[used:].eq(0).all()
    page, row = b.kv_indices[b.kv_indptr[3] - 1].long(), int(b.kv_last_page_len[2]) - 1
    place = (page, 0, slice(None), row) if layout == "HND" else (page, 0, row)
    assert torch.equal(b.kv_cache[place], k[1050])  # the first decode row's key is where it belongs


def test_torch_compile_takes_a_step_and_does_not_copy_the_cache():
    """One graph through Inductor: the same output, and the mutated cache is written in place."""
    case = Real((900, 2000, 70), (900, 1, 1))
    b = Buffers(case, spare_pages=4000)
    k, v = torch.randn(2, 902, case.kv_heads, case.head_dim, device="cuda", dtype=case.dtype)

    def step(q):
        options = dict(num_prefill=1, num_decode=2, max_q_len=900)
        return patune.paged_attention_with_cache(q * 2, k, v, b.kv_cache, b.qo_indptr, *b.table, **options) + 1

    want = step(b.q)
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(step, fullgraph=True)
        torch.testing.assert_close(compiled(b.q), want, rtol=2e-2, atol=2e-2)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(b.q)
    assert torch.cuda.max_memory_allocated() - before < b.kv_cache.nbytes / 2
