"""Random paged batches for property tests: shuffled pages, stale pages and page tails full of NaN, any layout."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

import patune

PAGE_SIZES = (1, 2, 3, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    layout: str = "HND"
    pair: bool = False
    dtype: str = "float32"
    kv_dtype: str | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scales: bool = False
    strided_q: bool = False
    seed: int = 0


class Batch:
    """The tensors of a Case; `options` are the feature arguments, the same for the kernels and the reference."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        gen = torch.Generator().manual_seed(case.seed)
        dtype = getattr(torch, case.dtype)
        kv_dtype = getattr(torch, case.kv_dtype or case.dtype)
        pages = [-(-n // case.page_size) for n in case.kv_lens]
        pool = sum(pages) + 3  # pages that nobody owns
        shape = (pool, 2, case.kv_heads, case.page_size, case.head_dim)
        kv = torch.full(shape, float("nan"))
        order = torch.randperm(pool, generator=gen)
        start = 0
        for n, p in zip(case.kv_lens, pages, strict=True):
            for i in range(p):
                rows = min(case.page_size, n - i * case.page_size)
                kv[order[start + i], :, :, :rows] = torch.randn(2, case.kv_heads, rows, case.head_dim, generator=gen)
            start += p
        if case.layout == "NHD":
            kv = kv.transpose(2, 3)
        kv = kv.contiguous().to(kv_dtype).to(device)
        self.kv_cache = (kv[:, 0].contiguous(), kv[:, 1].contiguous()) if case.pair else kv
        tokens, heads = sum(case.q_lens), case.kv_heads * case.group
        q = torch.randn(tokens, heads, case.head_dim * (2 if case.strided_q else 1), generator=gen).to(dtype).to(device)
        self.q = q[..., ::2] if case.strided_q else q
        i32 = lambda values: torch.tensor(values, dtype=torch.int32).to(device)
        self.qo_indptr = i32([sum(case.q_lens[:i]) for i in range(len(case.q_lens) + 1)])
        self.kv_indptr = i32([sum(pages[:i]) for i in range(len(pages) + 1)])
        self.kv_indices = order[: sum(pages)].to(torch.int32).to(device)
        last = [n - (p - 1) * case.page_size if p else 0 for n, p in zip(case.kv_lens, pages, strict=True)]
        self.kv_last_page_len = i32(last)
        self.seq_lens = i32(list(case.kv_lens))
        self.options = dict(sliding_window=case.window, logits_soft_cap=case.soft_cap, kv_layout=case.layout)
        if case.sinks:
            self.options["sinks"] = torch.randn(heads, generator=gen).to(device)
        if case.scales:
            self.options |= dict(k_scale=0.5, v_scale=torch.tensor([2.5], device=device))
        self.pages = (self.kv_indices, self.kv_indptr, self.kv_last_page_len)

    def reference(self, **kw):
        return patune.reference_paged_attention(
            self.q, self.kv_cache, self.qo_indptr, *self.pages, return_lse=True, **self.options, **kw
        )

    def nan_like_q(self) -> torch.Tensor:
        return torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.device)


def limit(case: Case) -> float:
    return 1e-4 if case.dtype == "float32" and case.kv_dtype is None else 1e-2


def assert_close(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert not got.isnan().any(), "NaN in the output"
    scale = want.norm().item()
    error = (got.float() - want).norm().item()
    assert error <= limit * max(scale, 1e-6), f"relative error {error / max(scale, 1e-6):.1e} over {limit}"


def assert_lse_close(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert torch.equal(got.isinf(), want.isinf()), "-inf in different places"
    torch.testing.assert_close(got, want, rtol=limit, atol=limit * 5)


def check_decode(case: Case, device: str, **config) -> None:
    """paged_decode equals the fp32 reference, output and lse, from a poisoned output."""
    batch = Batch(case, device)
    out = batch.nan_like_q()
    got, lse = patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, q_len_per_seq=case.q_lens[0], out=out,
                                   return_lse=True, config=config or None, **batch.options)  # fmt: skip
    assert got is out
    want, want_lse = batch.reference()
    assert_close(got, want, limit(case))
    assert_lse_close(lse, want_lse, limit(case))


def check_prefill(case: Case, device: str, causal: bool = True, **config) -> None:
    """paged_prefill equals the fp32 reference, output and lse, from a poisoned output."""
    batch = Batch(case, device)
    out = batch.nan_like_q()
    got, lse = patune.paged_prefill(
        batch.q, batch.kv_cache, batch.qo_indptr, *batch.pages, max_q_len=max(case.q_lens), causal=causal, out=out,
        return_lse=True, config=config or None, **batch.options,
    )  # fmt: skip
    want, want_lse = batch.reference(causal=causal)
    assert_close(got, want, limit(case))
    assert_lse_close(lse, want_lse, limit(case))


@st.composite
def cases(
    draw, prefill: bool = False, max_len: int = 48, dtypes=("float32", "bfloat16", "float16"),
    head_dims=(16, 64, 80, 96, 112, 128, 256), page_sizes=PAGE_SIZES, groups=(1, 2, 4, 7, 8, 20), extras: bool = True,
) -> Case:  # fmt: skip
    """Small batches over every axis that the kernels specialise on; extras: window, soft cap, sinks, scales, strided queries."""
    batch = draw(st.integers(1, 3))
    if prefill:
        q_lens = tuple(draw(st.integers(0, 30)) for _ in range(batch))
        q_lens = q_lens if sum(q_lens) else (1, *q_lens[1:])
        kv_lens = tuple(q + draw(st.integers(0, max_len - 30)) for q in q_lens)
    else:
        q_lens = (draw(st.sampled_from((1, 1, 2, 5))),) * batch
        kv_lens = tuple(draw(st.one_of(st.just(0), st.integers(q_lens[0], max_len))) if q_lens[0] == 1 else
                        draw(st.integers(q_lens[0], max_len)) for _ in range(batch))  # fmt: skip
    case = Case(
        q_lens, kv_lens,
        kv_heads=draw(st.sampled_from((1, 2))), group=draw(st.sampled_from(groups)),
        head_dim=draw(st.sampled_from(head_dims)), page_size=draw(st.sampled_from(page_sizes)),
        layout=draw(st.sampled_from(("HND", "NHD"))), pair=draw(st.booleans()), dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    if not extras:
        return case
    return replace(
        case, window=draw(st.sampled_from((None, None, 1, 7, 50))), soft_cap=draw(st.sampled_from((None, None, 5.0))),
        sinks=draw(st.booleans()), scales=draw(st.booleans()), strided_q=draw(st.booleans()),
    )  # fmt: skip


# What the templates for Hopper serve, of queries that TMA can address.
ON_HOPPER = dict(
    dtypes=("bfloat16", "float16"), head_dims=(64, 128, 256), page_sizes=(8, 16, 32, 64, 128, 256), groups=(1, 2, 4, 7, 8, 16),
    extras=False,
)  # fmt: skip
