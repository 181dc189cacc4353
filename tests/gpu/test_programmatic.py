"""Programmatic launches: a call behind a kernel that lets it begin early and writes what it reads late."""

import pytest
import torch
import triton
import triton.language as tl
from paged import assert_close
from real import Buffers, Real
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

import patune

pytestmark = pytest.mark.gpu

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
EARLY = pytest.mark.xfail(reason="stage 1 of the template decode lets stage 2 begin before it has waited, as graphs do")
NANOSECONDS = 60_000  # longer than what is launched behind it takes to begin


@triton.jit
def write_late(to_ptr, from_ptr, n, NANOSECONDS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (1,): n numbers, long after the next kernel may have begun."""
    gdc_launch_dependents()
    gdc_wait()
    start = globaltimer()
    while globaltimer() - start < NANOSECONDS:
        pass
    offs = tl.arange(0, BLOCK)
    tl.store(to_ptr + offs, tl.load(from_ptr + offs, mask=offs < n), mask=offs < n)


class Late:
    """Buffers whose page table holds other lengths until write() has ended."""

    def __init__(self, before: tuple[int, ...], then: tuple[int, ...], q_lens):
        self.now = Buffers(Real(tuple(map(max, before, then)), q_lens))  # pages for both
        self.now.kv_cache.nan_to_num_(0.5)
        b, page_size = self.now, self.now.case.page_size
        self.states = []
        for lens in (before, then):
            pages = [-(-n // page_size) for n in lens]
            starts = [sum(pages[:i]) for i in range(len(pages) + 1)]
            last = [n - (p - 1) * page_size for n, p in zip(lens, pages, strict=True)]
            ids = b.kv_indices.flip(0) if lens is then else b.kv_indices
            self.states.append(torch.cat([ids, torch.tensor([*starts, *last], dtype=torch.int32, device="cuda")]))
        self.state = self.states[0].clone()
        self.table = self.state.split([len(b.kv_indices), len(before) + 1, len(before)])

    def reset(self) -> None:
        self.state.copy_(self.states[0])

    def write(self) -> None:
        n = len(self.state)
        write_late[(1,)](self.state, self.states[1], n, NANOSECONDS=NANOSECONDS, BLOCK=triton.next_power_of_2(n), launch_pdl=True)


def check(late: Late, call, want: torch.Tensor, captured: bool) -> None:
    """call(out) right behind write() gives what it gives long after it."""
    out = torch.empty_like(late.now.q)

    def step():
        late.reset()
        out.fill_(float("nan"))
        late.write()
        call(out)

    step()  # compiles
    torch.cuda.synchronize()
    run = step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    for _ in range(4):
        run()
        assert_close(out, want, 1e-2)


both = pytest.mark.parametrize("captured", [False, True])
BEFORE, THEN = (3000, 40, 7000, 900), (200, 5000, 33, 4100)


@both
@pytest.mark.parametrize(("template", "splits", "cluster"), [
    ("decode", 1, 1), pytest.param("decode", 8, 1, marks=EARLY), ("decode_hopper", 1, 1), ("decode_hopper", 8, 1),
    ("decode_hopper", 8, 8),
])  # fmt: skip
def test_a_decode_reads_nothing_before_what_ran_before_it_has_ended(template, splits, cluster, captured):
    """Stage 2 neither: it reads the page table, which is older than stage 1, before it waits for that."""
    if template == "decode_hopper" and not HOPPER:
        pytest.skip("needs a GPU of compute capability 9.0")
    late = Late(BEFORE, THEN, 1)
    config = dict(patune.get_best_config(template, head_dim=128, page_size=16, q_heads_per_kv=4)) | {"num_splits": splits}
    if template == "decode_hopper":
        config["cluster"] = cluster
    b = late.now
    want = patune.reference_paged_attention(b.q, b.kv_cache, b.qo_indptr, *late.states[1].split([len(b.kv_indices), 5, 4]))
    check(late, lambda out: patune.paged_decode(b.q, b.kv_cache, *late.table, out=out, config=config), want, captured)


@both
@pytest.mark.parametrize(("template", "changes"), [
    ("prefill", {"num_splits": 1}), ("prefill", {"num_splits": 4}),
    ("prefill_hopper", {"num_splits": 1, "schedule": 1}), ("prefill_hopper", {"num_splits": 1, "schedule": 2}),
    ("prefill_hopper", {"num_splits": 8, "schedule": 1}),
])  # fmt: skip
def test_a_prefill_reads_nothing_before_what_ran_before_it_has_ended(template, changes, captured):
    """Nor do its counter's launch and the one that joins its splits."""
    if template == "prefill_hopper" and not HOPPER:
        pytest.skip("needs a GPU of compute capability 9.0")
    late = Late(BEFORE, THEN, (30, 40, 33, 200))
    query = dict(head_dim=128, page_size=16, q_heads_per_kv=4, q_len=75, kv_len=2333, batch_size=4)
    config, b = dict(patune.get_best_config(template, **query)) | changes, late.now
    want = patune.reference_paged_attention(b.q, b.kv_cache, b.qo_indptr, *late.states[1].split([len(b.kv_indices), 5, 4]))
    check(late, lambda out: patune.paged_prefill(
        b.q, b.kv_cache, b.qo_indptr, *late.table, max_q_len=200, out=out, config=config), want, captured)  # fmt: skip


@both
@pytest.mark.parametrize(("before", "then", "q_lens"), [
    ((3000, 40, 7000), (2100, 6000, 33), (2000, 1, 1)),  # a prefill of several waves, which goes first
    ((300, 4000, 7000), (300, 6000, 3300), (300, 1, 1)),  # of less than one: the decode goes first
    ((4000, 30), (4100, 8000), (1000, 1)),  # beside a decode in a cluster
    ((20000, *[300] * 40), (16000, *[900] * 40), (100, *[1] * 40)),  # its keys cut into parts, which a third kernel joins
])  # fmt: skip
def test_a_mixed_step_reads_nothing_before_what_ran_before_it_has_ended(before, then, q_lens, captured):
    """Of its prefill and its decode one begins without waiting for the other: for the append both do."""
    late = Late(before, then, q_lens)
    b, n = late.now, len(before)
    k, v = torch.randn(2, len(b.q), 8, 128, device="cuda", dtype=torch.bfloat16)
    cache = b.kv_cache.clone()
    table = late.states[1].split([len(b.kv_indices), n + 1, n])
    places = patune.get_batch_indices_positions(b.qo_indptr, torch.tensor(then, dtype=torch.int32, device="cuda"), len(b.q))
    patune.append_paged_kv_cache(k, v, *places, filled := cache.clone(), *table)
    want = patune.reference_paged_attention(b.q, filled, b.qo_indptr, *table)

    def step(out):
        result = patune.paged_attention_with_cache(
            b.q, k, v, b.kv_cache, b.qo_indptr, *late.table, num_prefill=1, num_decode=n - 1, max_q_len=q_lens[0],
            max_kv_len=max(then[1:]),
        )  # fmt: skip
        out.copy_(result)
        b.kv_cache.copy_(cache)

    check(late, step, want, captured)
