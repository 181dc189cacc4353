"""Bound calls on a GPU: the second call of a kind, which passes by Triton's JIT, is the first one in every way but its time."""

import pytest
import torch
import triton
from kernels.test_errors import CALLS, UNSUPPORTED, WRONG
from paged import assert_close
from real import Buffers, Real, ragged

import patune
from patune.kernels import bound, decode_hopper
from patune.kernels.decode import TEMPLATE as DECODE
from patune.workload import Key, Workload

pytestmark = pytest.mark.gpu

HOPPER = patune.Config(decode_hopper.TEMPLATE.default(Key("decode_hopper", "", 132, 128, 16, 4), Workload(2, 5500)))
ON_HOPPER = (("config", HOPPER),)
PLAIN = patune.Config(DECODE.default(Key("decode", "", 132, 128, 16, 4), Workload(2, 5500)))
FP8, SCALES = dict(kv_dtype=torch.float8_e4m3fn), (("k_scale", 0.5), ("v_scale", torch.tensor([2.0])))
CASES = {  # those without a config are of the template that the table takes
    "split": Real((8000, 3000)),
    "ragged": Real(ragged(16, 1000)),
    "one split": Real((300,) * 64),
    "pair": Real((8000, 3000), pair=True),
    "NHD": Real((8000, 3000), layout="NHD"),
    "strided q": Real((8000, 3000), strided_q=True),
    "fp8": Real((8000, 3000), **FP8, options=SCALES),
    "options": Real((8000, 3000), options=(("sliding_window", 500), ("logits_soft_cap", 30.0), ("sinks", torch.ones(32)))),
    "speculative": Real((8000, 3000), 4),
    "plain": Real((8000, 3000), options=(("config", PLAIN),)),
    "plain, one split": Real((300,) * 64, options=(("config", patune.Config({**PLAIN, "num_splits": 1})),)),
    "plain, fp8": Real((8000, 3000), **FP8, options=(*SCALES, ("config", PLAIN))),
    "Hopper": Real((8000, 3000), options=ON_HOPPER),
    "Hopper, NHD, pair, d64": Real((8000, 3000), layout="NHD", pair=True, head_dim=64, options=ON_HOPPER),
    "Hopper, one split": Real((300,) * 64, options=(("config", patune.Config({**HOPPER, "num_splits": 1, "cluster": 1})),)),
    "Hopper, clusters": Real((8000, 3000), options=(("config", patune.Config({**HOPPER, "num_splits": 4, "cluster": 4})),)),
    "Hopper, speculative": Real((8000, 3000), 4, options=ON_HOPPER),
    "Hopper, fp8": Real((8000, 3000), **FP8, options=(*SCALES, *ON_HOPPER)),
}


@pytest.fixture(autouse=True)
def nothing_bound(gpu):
    bound.forget()


def only_on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def decode(b: Buffers, **kw):
    options = b.options | dict(q_len_per_seq=b.q_lens[0]) | kw
    return patune.paged_decode(b.q, b.kv_cache, *b.table, **options)


@pytest.mark.parametrize("name", CASES)
def test_a_bound_call_is_bit_for_bit_the_call_before_it(name):
    """Output and lse, with out given or made, and over other data in other memory."""
    if name.startswith("Hopper"):
        only_on_hopper()
    b, other = Buffers(CASES[name]), Buffers(CASES[name])
    other.q = other.q.flip(0).contiguous() if not CASES[name].strided_q else other.q
    first = decode(b, return_lse=True)
    bound.forget()
    want = decode(other, return_lse=True)
    assert len(bound._bound) == 1 and all(bound._bound.values())
    for buffers, (out, lse) in ((b, first), (other, want), (b, first)):
        got, got_lse = decode(buffers, return_lse=True)
        assert torch.equal(got, out) and torch.equal(got_lse, lse)
        assert len(bound._bound) <= 2, "with out made and given"
        poisoned = buffers.poisoned()
        for _ in range(2):
            poisoned.fill_(float("nan"))
            assert decode(buffers, out=poisoned) is poisoned and torch.equal(poisoned, out)


STATIC = patune.Config(dict(BLOCK_N=128, num_stages=2, schedule=1, issue=1, num_splits=1))
SPLIT = patune.Config({**STATIC, "num_splits": 3})
PREFILLS = {
    "plain": ((), {"sliding_window": 500}),
    "Hopper": ((), {"config": STATIC}),
    "Hopper, splits": ((), {"config": SPLIT}),
    "Hopper, items taken": ((), {"config": patune.Config({**STATIC, "schedule": 2})}),
    "Hopper, items taken, splits": ((), {"config": patune.Config({**SPLIT, "schedule": 2})}),
    "Hopper, NHD, pair, d64": ((("layout", "NHD"), ("pair", True), ("head_dim", 64)), {"config": STATIC}),
}


@pytest.mark.parametrize("name", PREFILLS)
def test_a_bound_prefill_is_bit_for_bit_the_call_before_it(name):
    """The same of a prefill, over other data in other memory; a larger bound on the lengths is another key."""
    if name.startswith("Hopper"):
        only_on_hopper()
    case, options = PREFILLS[name]
    b, other = (Buffers(Real((4000, 1500), (1000, 1500), **dict(case))) for _ in range(2))
    other.q = other.q.flip(0).contiguous()

    def prefill(b: Buffers, **kw):
        options_of = b.options | options | dict(max_q_len=1500, return_lse=True) | kw
        return patune.paged_prefill(b.q, b.kv_cache, b.qo_indptr, *b.table, **options_of)

    wanted = []
    for buffers in (b, other):
        bound.forget()
        wanted.append(prefill(buffers))
    assert len(bound._bound) == 1 and all(bound._bound.values())
    for buffers, (out, lse) in zip((b, other, b), (*wanted, wanted[0]), strict=True):
        for _ in range(2):
            got, got_lse = prefill(buffers)
            assert torch.equal(got, out) and torch.equal(got_lse, lse)
            poisoned = buffers.poisoned()
            assert prefill(buffers, out=poisoned)[0] is poisoned and torch.equal(poisoned, out)
    assert torch.equal(prefill(b, max_q_len=2000)[0], wanted[0][0])
    assert len(bound._bound) == 3 and all(bound._bound.values()), "with out made and given, and with the other bound"


@pytest.mark.parametrize(("num_prefill", "changes"), [(2, {}), (0, {}), (4, {}), (2, dict(pair=True, layout="NHD"))])
@pytest.mark.parametrize("placed", [False, True])
def test_a_bound_mixed_step_is_bit_for_bit_the_step_before_it(num_prefill, changes, placed):
    """Its output and its cache, in other memory too; alone, its append is a bound call as well."""
    q_lens = (300, 5, 1, 1) if num_prefill < 4 else (300, 5, 40, 700)
    q_lens = (1,) * 4 if num_prefill == 0 else q_lens

    def step(b: Buffers, k: torch.Tensor) -> torch.Tensor:
        places = patune.get_batch_indices_positions(b.qo_indptr, b.seq_lens, sum(q_lens)) if placed else (None, None)
        return patune.paged_attention_with_cache(
            b.q, k, -k, b.kv_cache, b.qo_indptr, *b.table, num_prefill=num_prefill, num_decode=4 - num_prefill, max_q_len=700,
            num_prefill_tokens=sum(q_lens[:num_prefill]), batch_indices=places[0], positions=places[1], **b.options,
        )  # fmt: skip

    def pages(b: Buffers) -> torch.Tensor:
        return torch.cat([x.flatten() for x in ((b.kv_cache,) if torch.is_tensor(b.kv_cache) else b.kv_cache)]).nan_to_num(7.0)

    batches, wanted = [], []
    for _ in range(2):  # one for the ordinary way and one for bound calls, with the same data
        batches.append(Buffers(Real((800, 500, 3000, 700), q_lens, **changes)))
    torch.manual_seed(0)
    new = [torch.randn(sum(q_lens), 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for k in new:
        bound.forget()
        wanted.append((step(batches[0], k), pages(batches[0])))
    bound.forget()
    step(batches[1], new[0])
    assert len(bound._bound) == 1 and all(bound._bound.values())
    for k, (out, cache) in zip(new, wanted, strict=True):
        assert torch.equal(step(batches[1], k), out) and torch.equal(pages(batches[1]), cache)
    assert len(bound._bound) == 1

    places = patune.get_batch_indices_positions(batches[1].qo_indptr, batches[1].seq_lens, sum(q_lens))
    for k, (_, cache) in zip(new, wanted, strict=True):
        patune.append_paged_kv_cache(k, -k, *places, batches[1].kv_cache, *batches[1].table, **batches[1].options)
        assert torch.equal(pages(batches[1]), cache)
    assert len(bound._bound) == 2 and all(bound._bound.values())


def test_each_pool_of_a_bound_call_is_read_by_its_own_tensor_maps():
    """The layers of a model in turn; then other values, and another number of pages, at the address of a pool that was freed."""
    only_on_hopper()
    b = Buffers(Real((8000, 3000), options=ON_HOPPER))
    b.kv_cache.nan_to_num_(0.5)
    pools = [torch.randn_like(b.kv_cache) for _ in range(5)]

    def of(pool: torch.Tensor) -> torch.Tensor:
        b.kv_cache = pool
        return decode(b)

    wanted = []
    for pool in pools:
        bound.forget()
        wanted.append(of(pool))
        assert_close(wanted[-1], patune.reference_paged_attention(b.q, pool, b.qo_indptr, *b.table), b.limit)
    for _ in range(3):
        for pool, want in zip(pools, wanted, strict=True):
            assert torch.equal(of(pool), want)
    assert len(bound._bound) == 1 and all(bound._bound.values())

    memory = torch.empty((len(pools[0]) + 700) * pools[0][0].numel(), dtype=pools[0].dtype, device="cuda")
    for pages in (len(pools[0]), len(pools[0]) + 700, len(pools[0])):
        pool = memory[: pages * pools[0][0].numel()].view(pages, *pools[0].shape[1:]).normal_()
        b.kv_indices.copy_(torch.randperm(pages, device="cuda")[: len(b.kv_indices)])
        want = patune.reference_paged_attention(b.q, pool, b.qo_indptr, *b.table)
        for _ in range(2):
            assert_close(of(pool), want, b.limit)
    assert len(bound._bound) == 2 and all(bound._bound.values())


def test_a_call_without_work_stays_one():
    """A batch of no sequences launches nothing and binds nothing."""
    b = Buffers(Real((100,)))
    empty = (b.q[:0], b.kv_cache, b.kv_indices[:0], b.kv_indptr[:1], b.kv_last_page_len[:0])
    for _ in range(2):
        assert patune.paged_decode(*empty).shape == (0, 32, 128)
    assert not bound._bound


def test_bound_calls_run_on_the_current_stream():
    """While the default stream is busy, a bound call on another one finishes, and two streams have their own scratch."""
    b = Buffers(Real((8000, 3000)))
    want = decode(b).cpu()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in streams:
        with torch.cuda.stream(stream):
            decode(b)  # gives this stream its memory: cudaMalloc waits for the whole device
    assert len(bound._bound) == 1
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(decode(b))
    for stream in streams:
        stream.synchronize()
    assert not busy.query(), "a bound call waited for the default stream"
    assert all(torch.equal(got.cpu(), want) for got in results)


@pytest.mark.parametrize("template", ["decode", "decode_hopper"])
@pytest.mark.parametrize("num_splits", [1, 8])
def test_a_bound_call_is_captured(num_splits, template):
    """What a graph replays is the bound call's launches, with memory of the graph's."""
    b = Buffers(Real((4096, 4096)))
    b.kv_cache.nan_to_num_(0.5)
    if template == "decode_hopper":
        only_on_hopper()
    found = patune.get_best_config(template, head_dim=128, page_size=16, q_heads_per_kv=4)
    config = patune.Config(dict(found) | {"num_splits": num_splits} | ({"cluster": num_splits} if "cluster" in found else {}))
    out = b.poisoned()
    for _ in range(2):
        want = decode(b, out=out, config=config).clone()
    assert len(bound._bound) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(b, out=out, config=config)
    assert len(bound._bound) == 1
    for _ in range(3):
        out.fill_(float("nan"))
        decode(b, config=config)  # eager calls beside the graph do not use its scratch
        graph.replay()
        assert torch.equal(out, want)
    b.kv_last_page_len.fill_(3)
    graph.replay()
    assert_close(out, patune.reference_paged_attention(b.q, b.kv_cache, b.qo_indptr, *b.table), 1e-2)


def test_a_compiled_function_holds_the_operator():
    """With a call bound, torch.compile still traces the operator and gives the same result."""
    b = Buffers(Real((8000, 3000)))
    want = decode(b)
    decode(b)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    got = torch.compile(lambda: decode(b), backend=backend, fullgraph=True)()
    assert torch.equal(got, want)
    assert [node for graph in graphs for node in graph.graph.nodes if "paged_decode" in str(node.target)]


def test_a_launch_hook_sees_every_launch():
    """As many of a bound call as of one that is not, with the kernel's name."""
    b = Buffers(Real((8000, 3000), options=(("sliding_window", 5000),)))  # the plain template's, on every GPU
    names: list[str] = []
    hook = lambda metadata: names.append(metadata.get()["name"])
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            decode(b)
            seen.append(names.copy())
            names.clear()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen[0] == seen[1] and "decode_split" in seen[0]
    assert not bound._bound
    for _ in range(2):
        decode(b)
    assert len(bound._bound) == 1 and not names


def test_the_profiler_sees_the_operator():
    """By name, and its kernels, though the call was bound."""
    b = Buffers(Real((8000, 3000)))
    for _ in range(2):
        decode(b)
    with torch.profiler.profile() as profile:
        decode(b)
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    assert "patune::paged_decode" in names and any("decode_split" in name for name in names)


def test_tensors_on_meta_launch_nothing():
    """A call for its shapes, after the same call was bound."""
    b = Buffers(Real((300, 500)))
    for _ in range(2):
        decode(b)
    meta = [x.to("meta") for x in (b.q, b.kv_cache, *b.table)]
    assert patune.paged_decode(*meta).is_meta
    assert len(bound._bound) == 1


@pytest.mark.parametrize(
    ("changes", "message"), [pytest.param(x, m, id=m[:60]) for calls, x, m in WRONG + UNSUPPORTED if "decode" in calls]
)
def test_a_bad_call_raises_the_same_error_after_a_good_one_was_bound(changes, message):
    """Those on another device included."""
    function, good = CALLS["decode"]
    for _ in range(2):
        function(**good)
    assert len(bound._bound) == 1
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        function(**(good | changes))
    assert str(caught.value).startswith(message)


def test_a_call_on_another_device_is_made_there():
    """Bound on each device, and right on one that is not current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs, and one is visible")
    for index in (0, 1, 0, 1):
        b = Buffers(Real((3000, 700)), device=f"cuda:{index}")
        want = b.reference()[0]
        for current in (0, 1):
            with torch.cuda.device(current):
                for _ in range(2):
                    got = decode(b)
                    assert_close(got, want, 1e-2)
                    assert got.device.index == index and torch.cuda.current_device() == current
    assert len(bound._bound) == 2
