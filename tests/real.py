"""Paged batches at real sizes, made on the GPU: shuffled pages, stale pages and page tails full of NaN, poisoned outputs."""

import random
from dataclasses import dataclass

import torch

import patune


@dataclass(frozen=True)
class Real:
    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...] | int = 1  # an int: that many for every sequence
    group: int = 4
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    layout: str = "HND"
    pair: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    options: tuple[tuple[str, object], ...] = ()  # feature arguments, the same for the kernels and the reference
    strided_q: bool = False


def ragged(batch: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths spread log-normally: the longest of 64 is about six times the mean."""
    rng = random.Random(seed)
    return tuple(max(1, int(mean * rng.lognormvariate(-0.3, 0.8))) for _ in range(batch))


class Buffers:
    """The tensors of a Real case on a device."""

    def __init__(self, case: Real, device: str = "cuda", spare_pages: int = 3):
        self.case = case
        gen = torch.Generator(device).manual_seed(0)
        self.kv_lens = case.kv_lens
        self.q_lens = (case.q_lens,) * len(case.kv_lens) if isinstance(case.q_lens, int) else case.q_lens
        self.pages = [-(-n // case.page_size) for n in case.kv_lens]
        used = sum(self.pages)
        order = torch.randperm(used + spare_pages, generator=gen, device=device)
        i32 = lambda values: torch.tensor(values, dtype=torch.int32, device=device)
        self.kv_indices = order[:used].to(torch.int32)
        self.kv_indptr = i32([sum(self.pages[:i]) for i in range(len(self.pages) + 1)])
        last = [n - (p - 1) * case.page_size if p else 0 for n, p in zip(case.kv_lens, self.pages, strict=True)]
        self.kv_last_page_len = i32(last)
        self.qo_indptr = i32([sum(self.q_lens[:i]) for i in range(len(self.q_lens) + 1)])
        self.seq_lens = i32(list(case.kv_lens))
        shape = (used + spare_pages, 2, case.kv_heads, case.page_size, case.head_dim)
        kv = torch.randn(shape, generator=gen, device=device, dtype=case.dtype)
        kv[order[used:]] = float("nan")
        ends = [sum(self.pages[: b + 1]) - 1 for b, p in enumerate(self.pages) if p]
        for end, rows in zip(ends, (n for n, p in zip(last, self.pages, strict=True) if p), strict=True):
            kv[order[end], :, :, rows:] = float("nan")
        if case.layout == "NHD":
            kv = kv.transpose(2, 3)
        kv = kv.contiguous().to(case.kv_dtype or case.dtype)
        self.kv_cache = (kv[:, 0].contiguous(), kv[:, 1].contiguous()) if case.pair else kv
        shape = (sum(self.q_lens), case.group * case.kv_heads, case.head_dim)
        self.q = torch.randn(shape, generator=gen, device=device, dtype=case.dtype)
        if case.strided_q:
            self.q = torch.stack([self.q, self.q], 1)[:, 0]
        self.table = (self.kv_indices, self.kv_indptr, self.kv_last_page_len)
        self.options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options}
        self.options["kv_layout"] = case.layout
        self.limit = 1e-4 if case.dtype == torch.float32 else 1e-2

    def poisoned(self) -> torch.Tensor:
        return torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)

    def reference(self, **kw) -> tuple[torch.Tensor, torch.Tensor]:
        return patune.reference_paged_attention(
            self.q, self.kv_cache, self.qo_indptr, *self.table, return_lse=True, **self.options, **kw
        )
