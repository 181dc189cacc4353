"""Run as a program, without TRITON_INTERPRET: the distinct kernels that a stream of calls would compile, as JSON.

Triton's own cache key decides what is distinct; a hook sees the key and cancels the compile, so no GPU is needed.
"""

import json
import sys
from collections import Counter

import torch
from triton import knobs
from triton.runtime import driver

from patune.cachedb import lookup
from patune.kernels import ops  # noqa: F401  registers the operators
from patune.kernels.append import launches
from patune.kernels.cache import paged_cache
from patune.kernels.template import Launch
from patune.tuner.compile import _NoGpu

KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE = 2, 4, 64, 16


def i32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offset(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same values at another alignment: page tables are slices of larger ones."""
    return torch.cat([x.new_zeros(by), x])[by:]


def decode(cache, batch: int, kv_len: int, by: int = 0, **kw) -> None:
    pages = -(-kv_len // PAGE_SIZE)
    table = (
        i32([0] * (batch * pages)),
        i32(range(0, batch * pages + 1, pages)),
        i32([kv_len - (pages - 1) * PAGE_SIZE] * batch),
    )
    q = torch.zeros(batch, KV_HEADS * GROUP, HEAD_DIM, dtype=torch.bfloat16)
    torch.ops.patune.paged_decode(
        q, cache, None, *(offset(x, by) for x in table), torch.empty_like(q), None, 0.125, "HND", 1, kw.get("max_kv_len"), None,
        kw.get("window"), None, None, None, None, 1.0, False, kw.get("config"),
    )  # fmt: skip


def prefill(cache, q_lens: list[int], prefix: int, by: int = 0) -> None:
    pages = [-(-(n + prefix) // PAGE_SIZE) for n in q_lens]
    starts = lambda sizes: i32([sum(sizes[:i]) for i in range(len(sizes) + 1)])
    q = torch.zeros(sum(q_lens), KV_HEADS * GROUP, HEAD_DIM, dtype=torch.bfloat16)
    tables = (starts(q_lens), i32([0] * sum(pages)), starts(pages), i32([1] * len(q_lens)))
    torch.ops.patune.paged_prefill(
        q, cache, None, *(offset(x, by) for x in tables), torch.empty_like(q), None, 0.125, "HND", max(q_lens), True,
        None, None, None, None, None, 1.0, None,
    )  # fmt: skip


def append(cache, tokens: int, by: int = 0) -> None:
    x = torch.zeros(tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    positions = offset(i32([0] * tokens), by)
    torch.ops.patune.append_paged_kv_cache(
        x, x, positions, positions, cache, None, i32([0]), i32([0, 1]), i32([1]), "HND", None, None, 1.0, 1.0, None
    )


def append_last(cache, batch_size: int, tokens: int, by: int = 0) -> None:
    """An append that is not told where its tokens go."""
    x = torch.zeros(tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    starts, lengths = offset(i32(range(batch_size + 1)), by), offset(i32([1] * batch_size), by)
    for launch in launches(
        x, x, None, None, paged_cache(cache, None, "HND"), i32([0] * batch_size), starts, dict(BLOCK_T=1, num_warps=1),
        qo_indptr=starts, kv_last_page_len=lengths,
    ):  # fmt: skip
        launch.run()


def streams(cache) -> dict:
    """Calls by the name of the law that they put to the test."""
    return {
        "decode kv_len": [lambda n=n: decode(cache, 2, n) for n in (1, 15, 16, 17, 100, 1000, 4096, 9999)],
        "decode batch": [lambda b=b: decode(cache, b, 500, config=[64, 4, 3, 4]) for b in (1, 2, 3, 16, 17, 64, 100, 256)],
        "decode num_splits": [lambda s=s: decode(cache, 2, 500, config=[64, 4, 3, s]) for s in (1, 2, 3, 16, 64, 128)],
        "decode window": [lambda w=w: decode(cache, 2, 500, window=w) for w in (1, 2, 16, 128, 1000)],
        "decode alignment": [lambda by=by: decode(cache, 3, 500, by) for by in range(5)],
        "decode max_kv_len": [lambda n=n: decode(cache, 2, 500, max_kv_len=n) for n in (1, 16, 500, 10**6)],
        "decode with and without a window": [lambda w=w: decode(cache, 2, 500, window=w) for w in (None, 16)],
        "prefill q_len": [lambda n=n: prefill(cache, [n], 0) for n in (1, 16, 17, 100, 1000)],
        "prefill batch": [lambda b=b: prefill(cache, [7] * b, 100) for b in (1, 2, 3, 16, 100)],
        "prefill alignment": [lambda by=by: prefill(cache, [7, 9], 100, by) for by in range(5)],
        "append tokens": [lambda n=n, by=by: append(cache, n, by) for n in (1, 2, 16, 17, 1000) for by in (0, 1)],
        "append of last tokens": [lambda n=n, by=by: append_last(cache, n, 2 * n, by) for n in (1, 2, 17, 300) for by in (0, 1)],
    }


def main() -> None:
    driver.set_active(_NoGpu("9.0"))
    lookup.table = lambda: lookup.Table([])  # a tuned table has as many tiles as it likes; what the calls add is counted here
    seen: set[tuple[str, str]] = set()
    knobs.runtime.jit_cache_hook = lambda *, key, fn, **kw: seen.add((fn.name, key)) or True
    Launch.run = lambda launch: launch.warmup()
    kv = [torch.zeros(pages, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype=torch.bfloat16) for pages in (3, 64)]
    found = {}
    for name in streams(kv[0]):
        seen.clear()
        for cache in kv:
            for call in streams(cache)[name]:
                call()
        found[name] = Counter(fn.rpartition(".")[2] for fn, _ in seen)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
