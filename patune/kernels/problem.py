"""Tensors for one workload: real-valued random data, shuffled pages, enough disjoint sets that no call finds its KV in L2."""

import math
import random

import torch

from ..workload import Key, Workload
from .cache import paged_cache
from .indices import get_batch_indices_positions
from .reference import reference_paged_attention
from .template import Launch, Values

COLD_BYTES = 160e6  # three times the L2 of an H100, 50 MB: what the sets of a problem add up to
MAX_SETS = 40
CHECKED_FLOPS = 1e12  # of reference work a problem: heads are left out beyond it, sequences never


class PagedInputs:
    """Page tables and pool shared by all templates' problems.

    kv [pages, 2, kv_heads, page_size, head_dim]; kv_indices[r] the shuffled pages of set r; kv_indptr, kv_last_page_len and
    qo_indptr are the same for every set. On the meta device there are shapes and strides but no data: enough to compile.
    """

    def __init__(self, key: Key, workload: Workload, device: str, seed: int, sets: int | None, bytes_per_set: int):
        self.key, self.workload, self.device = key, workload, device
        self.meta = device == "meta"
        self.q_dtype, self.kv_dtype = getattr(torch, key.q_dtype), getattr(torch, key.kv_dtype)
        self.sets = sets or max(2, min(MAX_SETS, math.ceil(COLD_BYTES / bytes_per_set)))
        if self.meta:
            self.sets = 1
        else:
            torch.manual_seed(seed)
        self.kv_lens, self.q_lens = workload.kv_lens(), workload.q_lens()
        pages = [-(-n // key.page_size) for n in self.kv_lens]
        self.pages_per_set = sum(pages)
        self.kv_indptr = self.int32(_cumsum(pages))
        self.qo_indptr = self.int32(_cumsum(self.q_lens))
        self.kv_last_page_len = self.int32([n - (p - 1) * key.page_size for n, p in zip(self.kv_lens, pages, strict=True)])
        shape = (self.pages_per_set * self.sets, 2, workload.kv_heads, key.page_size, key.head_dim)
        self.kv = torch.empty(shape, device=device, dtype=self.kv_dtype)
        self.kv_indices = [self.int32([0] * self.pages_per_set)]
        if not self.meta:
            self._fill_pool()
            order = list(range(shape[0]))
            random.Random(seed).shuffle(order)
            self.kv_indices = [self.int32(order[r * self.pages_per_set :][: self.pages_per_set]) for r in range(self.sets)]
        self.cache = paged_cache(self.kv, None, "HND")

    def _fill_pool(self) -> None:
        if self.kv_dtype.itemsize > 1:
            self.kv.normal_()
            return
        for i in range(0, len(self.kv), 4096):  # normal_ has no fp8; converted piecewise, a pool can be most of the memory
            self.kv[i : i + 4096] = torch.randn(self.kv[i : i + 4096].shape, device=self.device).to(self.kv_dtype)

    def int32(self, values: list[int]) -> torch.Tensor:
        if self.meta:
            return torch.empty(len(values), dtype=torch.int32, device="meta")
        return torch.tensor(values, dtype=torch.int32).to(self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        if self.meta:
            return torch.empty(shape, dtype=self.q_dtype, device="meta")
        return torch.randn(shape, device=self.device).to(self.q_dtype)


class AttentionProblem(PagedInputs):
    """A decode or a prefill: `build` makes the template's launches."""

    def __init__(self, build, key: Key, workload: Workload, *, device: str, seed: int = 0, sets: int | None = None):
        self.build = build
        itemsize = getattr(torch, key.q_dtype).itemsize
        heads, tokens = workload.kv_heads * key.q_heads_per_kv, sum(workload.q_lens())
        kv_bytes = sum(workload.kv_lens()) * workload.kv_heads * key.head_dim * 2 * getattr(torch, key.kv_dtype).itemsize
        self.bytes = kv_bytes + 2 * tokens * heads * key.head_dim * itemsize
        super().__init__(key, workload, device, seed, sets, self.bytes)
        pairs = [q * (k - q) + q * (q + 1) // 2 for q, k in zip(self.q_lens, self.kv_lens, strict=True)]
        self.flops = 4 * heads * key.head_dim * sum(pairs)  # causal: only the keys that a query sees
        self.tolerance = 1e-2 if itemsize == 2 else 1e-4
        self.q = [self.randn(tokens, heads, key.head_dim) for _ in range(self.sets)]
        self.out = [torch.empty_like(q) for q in self.q]
        self._expected: dict[int, torch.Tensor] = {}
        checked = int(workload.kv_heads * CHECKED_FLOPS / max(self.flops, 1))
        self.checked_kv_heads = max(1, min(workload.kv_heads, checked))

    def launches(self, config: Values, r: int = 0) -> list[Launch]:
        options = {}
        if self.key.kernel not in ("decode", "decode_hopper"):
            options = dict(qo_indptr=self.qo_indptr, max_q_len=max(self.q_lens))
        else:
            options = dict(q_len=self.workload.q_len)
        return self.build(
            self.q[r], self.cache, self.kv_indices[r], self.kv_indptr, self.kv_last_page_len, self.out[r], None, config,
            sm_scale=self.key.head_dim**-0.5, **options,
        )  # fmt: skip

    def poison(self, r: int = 0) -> None:
        self.out[r].fill_(float("nan"))

    def error(self, r: int = 0) -> float:
        heads = self.checked_kv_heads * self.key.q_heads_per_kv
        if r not in self._expected:
            self._expected[r] = reference_paged_attention(
                self.q[r][:, :heads], self.kv[:, :, : self.checked_kv_heads], self.qo_indptr, self.kv_indices[r], self.kv_indptr,
                self.kv_last_page_len,
            )  # fmt: skip
        expected = self._expected[r]
        error = ((self.out[r][:, :heads].float() - expected).norm() / expected.norm()).item()
        return math.inf if math.isnan(error) or self.out[r].isnan().any() else error


class AppendProblem(PagedInputs):
    """An append of q_len new tokens a sequence at the end of its kv_len tokens."""

    tolerance = 1e-6  # a copy: any error is one
    flops = 0

    def __init__(self, build, key: Key, workload: Workload, *, device: str, seed: int = 0, sets: int | None = None):
        self.build = build
        tokens = sum(workload.q_lens())
        self.bytes = 2 * tokens * workload.kv_heads * key.head_dim * 2 * getattr(torch, key.kv_dtype).itemsize
        super().__init__(key, workload, device, seed, sets or 4, self.bytes)
        self.k = [self.randn(tokens, workload.kv_heads, key.head_dim) for _ in range(self.sets)]
        self.v = [self.randn(tokens, workload.kv_heads, key.head_dim) for _ in range(self.sets)]
        if self.meta:
            self.batch_indices = self.positions = self.int32([0] * tokens)
            return
        seq_lens = torch.tensor(self.kv_lens, dtype=torch.int32, device=device)
        self.batch_indices, self.positions = get_batch_indices_positions(self.qo_indptr, seq_lens, tokens)
        self.kv.zero_()

    def launches(self, config: Values, r: int = 0) -> list[Launch]:
        pages = self.kv_indices[r], self.kv_indptr
        return self.build(self.k[r], self.v[r], self.batch_indices, self.positions, self.cache, *pages, config)

    def _written(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(pages, rows) of the new tokens of set r."""
        slot = self.kv_indptr[self.batch_indices.long()] + self.positions // self.key.page_size
        return self.kv_indices[r][slot.long()].long(), (self.positions % self.key.page_size).long()

    def poison(self, r: int = 0) -> None:
        self.kv[self._written(r)[0]] = float("nan")

    def error(self, r: int = 0) -> float:
        pages, rows = self._written(r)
        got = self.kv[pages, :, :, rows].float()  # [tokens, 2, kv_heads, head_dim]
        want = torch.stack([self.k[r], self.v[r]], 1).to(self.kv_dtype).float()
        error = ((got - want).norm() / want.norm()).item()
        return math.inf if math.isnan(error) else error


def _cumsum(values: list[int]) -> list[int]:
    total, out = 0, [0]
    for value in values:
        total += value
        out.append(total)
    return out
