"""CUDA graphs and streams: a captured call is right for whatever its tensors hold when it is replayed."""

from collections import Counter

import pytest
import torch
from paged import assert_close
from real import Buffers, Real

import patune
from patune.errors import PatuneError

pytestmark = pytest.mark.gpu

LENGTHS = [(4000, 100), (1, 1), (0, 4096), (4096, 0), (0, 0), (17, 3999)]
LONGEST = 4096


def capture(call) -> torch.cuda.CUDAGraph:
    """A graph of a call that has run once before, so that nothing is compiled inside."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def refill(b: Buffers, kv_lens, q_lens=None) -> None:
    """Other lengths, in the same tensors, over the same pages."""
    page_size = b.case.page_size
    pages = [-(-n // page_size) for n in kv_lens]
    b.kv_indptr.copy_(torch.tensor([sum(pages[:i]) for i in range(len(pages) + 1)]))
    b.kv_last_page_len.copy_(torch.tensor([n - (p - 1) * page_size if p else 0 for n, p in zip(kv_lens, pages, strict=True)]))
    b.seq_lens.copy_(torch.tensor(kv_lens))
    if q_lens is not None:
        b.qo_indptr.copy_(torch.tensor([sum(q_lens[:i]) for i in range(len(q_lens) + 1)]))


def full(q_len: int, **kw) -> Buffers:
    """Two sequences at the bounds, without a NaN in the pool: other lengths will make other tokens visible."""
    b = Buffers(Real((LONGEST, LONGEST), q_len, **kw))
    b.kv_cache.nan_to_num_(0.5)
    return b


@pytest.mark.parametrize("num_splits", [None, 1, 8])
@pytest.mark.parametrize("window", [None, 300])
def test_one_captured_decode_is_right_for_any_lengths_up_to_its_bounds(num_splits, window):
    """The shares of a split are cut on the device, so a replay balances the lengths it finds."""
    b = full(1)
    config = None if num_splits is None else dict(patune.get_best_config("decode", head_dim=128, page_size=16, q_heads_per_kv=4))
    config = config and config | {"num_splits": num_splits}
    out, results = b.poisoned(), []
    options = dict(sliding_window=window, return_lse=True)
    graph = capture(lambda: results.append(patune.paged_decode(b.q, b.kv_cache, *b.table, out=out, config=config, **options)))
    for lengths in LENGTHS:
        refill(b, lengths)
        out.fill_(float("nan"))
        results[-1][1].fill_(float("nan"))
        graph.replay()
        want, want_lse = patune.reference_paged_attention(b.q, b.kv_cache, b.qo_indptr, *b.table, **options)
        assert_close(out, want, 1e-2)
        torch.testing.assert_close(results[-1][1], want_lse, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize(("template", "cluster"), [("decode", 1), ("decode_hopper", 1), ("decode_hopper", 8)])
@pytest.mark.parametrize("num_splits", [1, 8])
def test_a_decode_waits_for_what_ran_before_it(num_splits, template, cluster):
    """Its stages are launched programmatically, before the work ahead of them has ended; 20 decodes, each of the last one's output.

    What is ahead is a kernel, a copy, a memset and another stream; each writes something that the decode reads.
    """
    if template == "decode_hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    b = full(1)
    config = dict(patune.get_best_config(template, head_dim=128, page_size=16, q_heads_per_kv=4)) | {"num_splits": num_splits}
    if template == "decode_hopper":
        config["cluster"] = min(cluster, num_splits)
    side, start = torch.cuda.Stream(), b.q.clone()
    spoiled = torch.full_like(b.q, float("nan"))
    last_page_len = b.kv_last_page_len.clone()

    def chain(check=lambda: None):
        q = b.q
        q.copy_(spoiled)
        for i in range(20):
            here = torch.cuda.current_stream()
            if i % 4 == 0:  # another stream
                side.wait_stream(here)
                with torch.cuda.stream(side):
                    torch.cuda._sleep(20_000)
                    q = start * 1.0 if i == 0 else q * 1.0
                here.wait_stream(side)
            elif i % 4 == 1:  # a memset, and a kernel behind it
                b.kv_last_page_len.zero_()
                b.kv_last_page_len.add_(last_page_len)
            elif i % 4 == 2:  # a copy
                b.q.copy_(q)
                q = b.q
            check()
            q = patune.paged_decode(q, b.kv_cache, *b.table, config=config) * 4
            check()
        return q

    want = chain(torch.cuda.synchronize)
    results = []
    graph = capture(lambda: results.append(chain()))
    for _ in range(5):
        results[-1].fill_(float("nan"))
        graph.replay()
        assert torch.equal(results[-1], want)
        assert torch.equal(chain(), want)


def test_one_captured_prefill_is_right_for_any_lengths_up_to_its_bounds():
    """Also for fewer new tokens than were captured; rows past the last sequence are not written."""
    b = full(500)
    out = b.poisoned()
    graph = capture(lambda: patune.paged_prefill(b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=1000, out=out))
    for kv_lens, q_lens in [
        ((4000, 500), (400, 500)),
        ((1000, 3000), (1000, 0)),
        ((1, 2), (1, 1)),
        ((4096, 77), (7, 77)),
    ]:
        refill(b, kv_lens, q_lens)
        out.fill_(float("nan"))
        graph.replay()
        used = sum(q_lens)
        assert_close(out[:used], patune.reference_paged_attention(b.q, b.kv_cache, b.qo_indptr, *b.table)[:used], 1e-2)
        assert out[used:].isnan().all()


def test_one_captured_mixed_step_is_right_for_any_lengths_up_to_its_bounds():
    """Positions, append, prefill and decode in one graph: each replay writes its own tokens and attends to them."""
    b = Buffers(Real((LONGEST, LONGEST, 500), (200, 1, 1)))
    b.kv_cache.nan_to_num_(0.5)
    q = torch.cat([b.q, b.q[:6]])
    k, v = torch.randn(2, len(q), 8, 128, device="cuda", dtype=torch.bfloat16)
    options = dict(num_prefill=1, num_decode=2, max_q_len=200, num_prefill_tokens=200)
    outputs = []
    graph = capture(
        lambda: outputs.append(patune.paged_attention_with_cache(q, k, v, b.kv_cache, b.qo_indptr, *b.table, **options))
    )
    for kv_lens in [(4000, 4096, 1), (200, 17, 499), (4096, 0, 33)]:
        refill(b, kv_lens)
        k.normal_()
        v.normal_()
        outputs[-1].fill_(float("nan"))
        graph.replay()
        want = patune.reference_paged_attention(q[:202], b.kv_cache, b.qo_indptr, *b.table)
        assert_close(outputs[-1][:202], want, 1e-2)
        assert outputs[-1][202:].eq(0).all()
        last_page = b.kv_indices[b.kv_indptr[1] - 1].long()
        assert torch.equal(b.kv_cache[last_page, 0, :, int(b.kv_last_page_len[0]) - 1], k[199])


@pytest.mark.parametrize(("kv_lens", "q_lens"), [((300, *[9000] * 24), (300, *[1] * 24)), ((20000, 50, 60), (3000, 1, 1))])
@pytest.mark.parametrize("captured", [False, True])
def test_what_follows_a_mixed_step_waits_for_its_prefill_and_its_decode(kv_lens, q_lens, captured):
    """They run on two streams, and either may end last. The output is read, and q and the cache overwritten, right behind."""
    b = Buffers(Real(kv_lens, q_lens))
    b.kv_cache.nan_to_num_(0.5)
    k, v = torch.randn(2, len(b.q), 8, 128, device="cuda", dtype=torch.bfloat16)
    q, cache, out = b.q.clone(), b.kv_cache.clone(), torch.empty_like(b.q)

    def step():
        b.q.copy_(q)
        b.kv_cache.copy_(cache)
        options = dict(num_prefill=1, num_decode=len(kv_lens) - 1, max_q_len=q_lens[0], max_kv_len=max(kv_lens[1:]))
        out.copy_(patune.paged_attention_with_cache(b.q, k, v, b.kv_cache, b.qo_indptr, *b.table, **options))
        b.kv_cache.zero_()
        b.q.zero_()

    run = capture(step).replay if captured else step
    places = patune.get_batch_indices_positions(b.qo_indptr, b.seq_lens, len(q))
    patune.append_paged_kv_cache(k, v, *places, filled := cache.clone(), *b.table)
    want = patune.reference_paged_attention(q, filled, b.qo_indptr, *b.table)
    for _ in range(4):
        out.fill_(float("nan"))
        run()
        assert_close(out, want, 1e-2)


def test_a_mixed_step_runs_the_kernels_of_its_parts_and_nothing_else():
    """A small kernel costs a graph more than a microsecond."""
    b = Buffers(Real((4096, 4096, 4096), (200, 1, 1)))  # all alike: the step knows the lengths' mean alone, and takes these configs
    k = torch.ones(202, 8, 128, device="cuda", dtype=torch.bfloat16)
    indices, positions = patune.get_batch_indices_positions(b.qo_indptr, b.seq_lens, 202)
    (pages, indptr, last), out, own = b.table, torch.empty_like(b.q), 4096 // b.case.page_size
    of_prefill, of_decode = (pages[:own], indptr[:2], last[:1]), (pages[own:], indptr[1:] - own, last[1:])

    def parts():
        patune.append_paged_kv_cache(k, k, indices, positions, b.kv_cache, *b.table)
        patune.paged_prefill(b.q[:200], b.kv_cache, b.qo_indptr[:2], *of_prefill, max_q_len=200, out=out[:200])
        patune.paged_decode(b.q[200:], b.kv_cache, *of_decode, out=out[200:])

    def whole():
        options = dict(num_prefill=1, num_decode=2, max_q_len=200)
        patune.paged_attention_with_cache(b.q, k, k, b.kv_cache, b.qo_indptr, *b.table, **options)

    ran = []
    for call in (parts, whole):
        call()  # compiles
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        ran.append(Counter(event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA))
    assert ran[1] == ran[0]


def test_a_captured_append_writes_where_its_tensors_say():
    """Positions are computed inside the graph, from the lengths of the replay."""
    b = Buffers(Real((100, 100), 1))
    b.kv_cache.zero_()
    k = torch.ones(2, 8, 128, device="cuda", dtype=torch.bfloat16)

    def call():
        indices, positions = patune.get_batch_indices_positions(b.qo_indptr, b.seq_lens, 2)
        patune.append_paged_kv_cache(k, k, indices, positions, b.kv_cache, *b.table)

    graph = capture(call)
    b.kv_cache.zero_()
    for n in (1, 16, 17, 100):
        b.seq_lens.copy_(torch.tensor([n, n]))
        graph.replay()
    torch.cuda.synchronize()
    assert b.kv_cache.count_nonzero() == 4 * 2 * 2 * 8 * 128


def test_a_tuning_run_inside_a_capture_is_refused():
    """It would become part of the graph, or break it."""
    from patune.tuner.timing import refuse_capture

    x = torch.zeros(1, device="cuda")
    refuse_capture()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1
        with pytest.raises(PatuneError, match="inside a CUDA graph capture: tune before"):
            refuse_capture()


def test_calls_run_on_the_current_stream():
    """While the default stream is busy, a call on another stream finishes: nothing was launched on the default one."""
    b = Buffers(Real((4000, 3000), 1))
    k = torch.ones(2, 8, 128, device="cuda", dtype=torch.bfloat16)
    want = b.reference()[0].cpu()
    side = torch.cuda.Stream()

    def call():
        indices, positions = patune.get_batch_indices_positions(b.qo_indptr, b.seq_lens + 10**6, 2)  # past the page list: no write
        patune.append_paged_kv_cache(k, k, indices, positions, b.kv_cache, *b.table)
        return patune.paged_decode(b.q, b.kv_cache, *b.table), patune.paged_prefill(
            b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=1
        )

    with torch.cuda.stream(side):
        call()  # compiles, and gives this stream its memory: cudaMalloc waits for the whole device
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(side):
        results = call()
        side.synchronize()
    assert not busy.query(), "the call waited for the default stream"
    for got in results:
        assert_close(got.cpu(), want, 1e-2)
