"""paged_attention_with_cache: append, prefill rows and decode rows of a mixed batch in one operator that mutates only the cache."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launching import to_meta
from paged import Batch, Case, assert_close, limit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import patune
from patune.kernels import append, calls, mixed, ops
from patune.kernels.cache import paged_cache
from patune.kernels.config import find

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Step:
    """One serving step of a Case whose first sequences are prefills and whose others decode one token each."""

    def __init__(self, case: Case, num_prefill: int, padding: int = 0, device: str = DEVICE):
        self.case, self.batch = case, Batch(case, device)
        self.num_prefill, self.num_decode = num_prefill, len(case.q_lens) - num_prefill
        gen = torch.Generator().manual_seed(case.seed)
        tokens = sum(case.q_lens) + padding
        randn = lambda heads: torch.randn(tokens, heads, case.head_dim, generator=gen).to(self.batch.q.dtype).to(device)
        self.q, self.k, self.v = randn(case.kv_heads * case.group), randn(case.kv_heads), randn(case.kv_heads)
        self.q[: sum(case.q_lens)] = self.batch.q
        self.batch.q = self.q[: sum(case.q_lens)]
        for x in (self.q, self.k, self.v):
            x[sum(case.q_lens) :] = float("nan")  # what is in padding rows must reach neither the cache nor the output
        self.args = (self.q, self.k, self.v, self.batch.kv_cache, self.batch.qo_indptr, *self.batch.pages)
        self.options = self.batch.options | dict(
            num_prefill=num_prefill, num_decode=self.num_decode, max_q_len=max(case.q_lens[:num_prefill], default=0),
            num_prefill_tokens=sum(case.q_lens[:num_prefill]),
        )  # fmt: skip

    def run(self, **kw) -> torch.Tensor:
        return patune.paged_attention_with_cache(*self.args, **(self.options | kw))

    def appended(self):
        """A copy of the cache with the new tokens in it, by plain torch."""
        case, (kv_indices, kv_indptr, _) = self.case, self.batch.pages
        cache = self.batch.kv_cache
        pair = tuple(x.clone() for x in cache) if case.pair else None
        whole = None if case.pair else cache.clone()
        k_cache, v_cache = pair if case.pair else (whole[:, 0], whole[:, 1])
        k_scale, v_scale = self.options.get("k_scale"), self.options.get("v_scale")
        t = 0
        for b, (new, length) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
            for position in range(length - new, length):
                if position >= 0:
                    page = kv_indices[kv_indptr[b] + position // case.page_size]
                    row = position % case.page_size
                    place = (page, slice(None), row) if case.layout == "HND" else (page, row)
                    k_cache[place] = (self.k[t].float() / (1.0 if k_scale is None else k_scale)).to(k_cache.dtype)
                    v_cache[place] = (self.v[t].float() / (1.0 if v_scale is None else v_scale)).to(v_cache.dtype)
                t += 1
        return pair or whole


def tensors(cache) -> tuple[torch.Tensor, ...]:
    return cache if isinstance(cache, tuple) else (cache,)


def check_step(step: Step, **kw) -> None:
    """Output, cache and inputs after one step are those of append + attention by the reference."""
    want_cache = step.appended()
    inputs = [x for x in step.args if isinstance(x, torch.Tensor) and x is not step.batch.kv_cache]
    before = [x.clone() for x in inputs]
    got = step.run(**kw)
    for have, want in zip(tensors(step.batch.kv_cache), tensors(want_cache), strict=True):
        assert torch.equal(have.isnan(), want.isnan())
        # Fp8 on the GPU is compared exactly in tests/gpu; Triton's interpreter loses the carry when it rounds.
        assert_close(have.float().nan_to_num(), want.float().nan_to_num(), 0.1 if step.case.kv_dtype else 1e-6)
    used = sum(step.case.q_lens)
    assert_close(got[:used], step.batch.reference()[0], limit(step.case))
    assert torch.equal(got[used:], torch.zeros_like(got[used:])), "padding rows are not zero"
    for have, want in zip(inputs, before, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


@st.composite
def steps(draw) -> tuple[Case, int, int]:
    prefills = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), max_size=2))
    decodes = draw(st.lists(st.integers(0, 40), min_size=0 if prefills else 1, max_size=3))
    case = Case(
        (*(q for q, _ in prefills), *(1 for _ in decodes)), (*(q + old for q, old in prefills), *decodes),
        kv_heads=draw(st.sampled_from((1, 2))), group=draw(st.sampled_from((1, 4, 7))),
        head_dim=draw(st.sampled_from((16, 64, 80))), page_size=draw(st.sampled_from((1, 3, 16, 64))),
        layout=draw(st.sampled_from(("HND", "NHD"))), pair=draw(st.booleans()),
        window=draw(st.sampled_from((None, 7))), soft_cap=draw(st.sampled_from((None, 5.0))), sinks=draw(st.booleans()),
        scales=draw(st.booleans()), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    return case, len(prefills), draw(st.integers(0, 3))


@settings(max_examples=30)
@given(steps())
@example((Case((5, 9, 1, 1), (5, 30, 33, 0)), 2, 3))  # prompt, cached prefix, a decode slot of length 0, padding
@example((Case((0, 1), (20, 1), scales=True, pair=True), 1, 1))  # a prefill sequence without new tokens
@example((Case((3,), (3,)), 1, 0))  # no decode rows
@example((Case((1, 1), (40, 20), group=7), 0, 2))  # no prefill rows
def test_a_step_equals_append_then_attention_and_changes_only_the_cache(drawn):
    check_step(Step(*drawn))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_into_an_fp8_cache_reads_back_what_it_rounded(dtype):
    """The attention of a step sees its own tokens as the cache holds them, scaled and rounded to fp8."""
    check_step(Step(Case((6, 1, 1), (20, 33, 4), dtype=dtype, kv_dtype="float8_e4m3fn", scales=True), 1, 2))


def test_positions_computed_once_serve_every_layer():
    """batch_indices and positions from get_batch_indices_positions give what a step that computes them itself gives."""
    case = Case((5, 1, 1), (20, 33, 1))
    for padding in (0, 3):
        step = Step(case, 1, padding)
        indices, positions = patune.get_batch_indices_positions(step.batch.qo_indptr, step.batch.seq_lens, len(step.q))
        check_step(step, batch_indices=indices, positions=positions)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.tuples(st.sampled_from((0, 1, 1, 2, 40)), st.integers(0, 40)), min_size=1, max_size=140),
    padding=st.integers(0, 70), page_size=st.sampled_from((1, 16, 48)), block=st.sampled_from((1, 8)),
)  # fmt: skip
def test_an_append_that_is_not_told_places_tokens_as_get_batch_indices_positions_does(lengths, padding, page_size, block):
    """For any sequences, some without new tokens or without pages, and padding rows behind them."""
    batch = Batch(Case(tuple(q for q, _ in lengths), tuple(n for _, n in lengths), head_dim=16, page_size=page_size), DEVICE)
    tokens = sum(q for q, _ in lengths) + padding
    k = torch.arange(1.0, tokens + 1, device=DEVICE)[:, None, None].expand(tokens, 2, 16)
    places = patune.get_batch_indices_positions(batch.qo_indptr, batch.seq_lens, tokens)
    last_tokens = dict(qo_indptr=batch.qo_indptr, kv_last_page_len=batch.pages[2])
    caches = []
    for told, options in ((places, {}), ((None, None), last_tokens)):
        caches.append(torch.zeros_like(batch.kv_cache))
        config = dict(BLOCK_T=block, num_warps=1)
        for launch in append.launches(k, -k, *told, paged_cache(caches[-1], None, "HND"), *batch.pages[:2], config, **options):
            launch.run()
    assert torch.equal(*caches)
    assert caches[0].count_nonzero() == 2 * 2 * 16 * sum(min(q, n) for q, n in lengths)


class Seen(TorchDispatchMode):
    """The names of the operators of torch that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_launches_its_parts_and_nothing_else(launched):
    """And between them torch only makes views and allocates: a small kernel costs a graph more than a microsecond."""
    batch = to_meta(Batch(Case((5, 7, 1, 1), (5, 40, 33, 20)), "cpu"))
    k = batch.q[:, :2]
    with Seen() as seen:
        ops._paged_attention_with_cache(
            batch.q, k, k, batch.kv_cache, None, batch.qo_indptr, *batch.pages, None, None, 0.1, "HND", 2, 2, 12, 7, None,
            None, None, None, None, None, 1.0, 1.0,
        )  # fmt: skip
    assert seen.names <= {"new_empty", "empty", "unbind", "slice", "select", "view", "detach"}
    names = [launch.fn.__name__ for launch in launched]
    assert names == ["append_kv", "decode_split", "prefill_attention"]  # too short to be split


def test_a_step_takes_configs_for_what_the_host_knows_of_its_parts(launched, monkeypatch):
    """A prompt has at least its new tokens, the decodes share what is left of the pages."""
    queries = []
    monkeypatch.setattr(calls, "find", lambda query: queries.append(query) or find(query))
    Step(Case((160, *[1] * 20), (160, *[16] * 20)), 1).run()
    of = {query["kernel"]: query for query in queries}
    assert (of["prefill"]["kv_len"], of["prefill"]["q_len"]) == (160, 160)
    assert (of["decode"]["kv_len"], of["decode"]["batch_size"]) == (16, 20)


@given(
    prompts=st.lists(st.tuples(st.integers(1, 600), st.integers(0, 4000)), max_size=4),  # new tokens and cached ones
    decodes=st.lists(st.integers(1, 5000), max_size=6),
)
def test_the_mean_lengths_of_a_steps_parts_are_possible_and_add_up(prompts, decodes):
    """Even prompts beside decodes of one length that the caller names are told apart exactly, whatever they are."""
    new, tokens = sum(q for q, _ in prompts), sum(q + cached for q, cached in prompts) + sum(decodes)
    for bound in (max(decodes, default=None), 1 << 20, None):
        prompt, decode = mixed.parts_kv_len(tokens, new, len(prompts), len(decodes), bound)
        assert prompt >= new // max(1, len(prompts)) and 1 <= decode <= (bound or tokens or 1)
        if prompts and tokens:
            assert abs(prompt * len(prompts) + decode * len(decodes) - tokens) <= len(prompts) + len(decodes)
    if prompts and decodes:
        prompt, decode = mixed.parts_kv_len(
            (even := sum(prompts[0])) * len(prompts) + decodes[0] * len(decodes), prompts[0][0] * len(prompts), len(prompts),
            len(decodes), decodes[0],
        )  # fmt: skip
        assert (prompt, decode) == (even, decodes[0])


def test_num_prefill_tokens_defaults_to_all_rows_but_the_decodes():
    """Without padding the host need not say how many rows are prefill rows."""
    check_step(Step(Case((5, 4, 1), (20, 4, 33)), 2), num_prefill_tokens=None)
    check_step(Step(Case((1, 1), (20, 4)), 0, 2), num_prefill_tokens=None)


def test_a_max_kv_len_is_advice_only():
    """max_kv_len, however wrong, changes the choice of a config and never the result."""
    for max_kv_len in (1, 50, 10**6):
        check_step(Step(Case((5, 1, 1), (20, 49, 1)), 1), max_kv_len=max_kv_len)


def test_an_empty_step_gives_an_empty_output():
    """No token at all is no error."""
    step = Step(Case((), ()), 0)
    assert step.run().shape == step.q.shape == (0, 8, 64)


def test_a_whole_batch_of_empty_sequences_gives_zeros():
    """Sequences without any page, as unused slots of a captured batch, give zeros and leave the cache alone."""
    check_step(Step(Case((1, 1, 1), (0, 0, 0)), 0))


# torch.library


def both_caches():
    return pytest.mark.parametrize("pair", [False, True], ids=["one tensor", "pair"])


def split(cache) -> tuple[torch.Tensor, torch.Tensor | None]:
    return cache if isinstance(cache, tuple) else (cache, None)


@both_caches()
def test_paged_attention_with_cache_is_a_sound_operator(pair):
    """Its schema says what it mutates, its fake kernel what it returns, and AOT autograd functionalises it."""
    step = Step(Case((3, 1, 1), (23, 30, 20), pair=pair), 1, 2)
    for x in (step.q, step.k, step.v):
        x.nan_to_num_(0.0)
    indices, positions = patune.get_batch_indices_positions(step.batch.qo_indptr, step.batch.seq_lens, len(step.q))
    for given_positions in ((None, None), (indices, positions)):
        opcheck(
            torch.ops.patune.paged_attention_with_cache.default,
            (step.q, step.k, step.v, *split(step.batch.kv_cache), step.batch.qo_indptr, *step.batch.pages, *given_positions,
             0.1, "HND", 1, 2, 3, 3, None, None, None, None, None, None, 1.0, 1.0),
        )  # fmt: skip


@both_caches()
@pytest.mark.parametrize("lse", [False, True], ids=["out", "out and lse"])
def test_paged_decode_is_a_sound_operator(pair, lse):
    """It mutates out and lse and nothing else."""
    batch = Batch(Case((1, 1), (30, 20), pair=pair), DEVICE)
    log_sum = torch.zeros(2, 8, device=DEVICE) if lse else None
    opcheck(
        torch.ops.patune.paged_decode.default,
        (batch.q, *split(batch.kv_cache), *batch.pages, torch.zeros_like(batch.q), log_sum, 0.1, "HND", 1, 30, None, 7, 5.0,
         torch.zeros(8, device=DEVICE), None, torch.ones(1, device=DEVICE), 1.0, False, [16, 4, 2, 2]),
    )  # fmt: skip


@both_caches()
@pytest.mark.parametrize("lse", [False, True], ids=["out", "out and lse"])
def test_paged_prefill_is_a_sound_operator(pair, lse):
    """It mutates out and lse and nothing else."""
    batch = Batch(Case((2, 3), (30, 20), pair=pair), DEVICE)
    log_sum = torch.zeros(5, 8, device=DEVICE) if lse else None
    opcheck(
        torch.ops.patune.paged_prefill.default,
        (batch.q, *split(batch.kv_cache), batch.qo_indptr, *batch.pages, torch.zeros_like(batch.q), log_sum, 0.1, "HND", 3, True,
         None, None, None, None, None, 1.0, None),
    )  # fmt: skip


@both_caches()
def test_append_is_a_sound_operator(pair):
    """It mutates the cache, both tensors of a pair, and nothing else."""
    batch = Batch(Case((2, 3), (30, 20), pair=pair), DEVICE)
    k = torch.randn(5, 2, 64, device=DEVICE)
    indices, positions = patune.get_batch_indices_positions(batch.qo_indptr, batch.seq_lens, 5)
    opcheck(
        torch.ops.patune.append_paged_kv_cache.default,
        (k, k * 2, indices, positions, *split(batch.kv_cache), *batch.pages, "HND", None, None, 1.0, 1.0, None),
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@both_caches()
def test_a_compiled_step_is_one_graph_and_does_the_same(pair, dynamic):
    """torch.compile(fullgraph=True) takes the public function; result and cache equal the eager call's."""
    eager, compiled = (Step(Case((3, 1, 1), (23, 30, 20), pair=pair), 1, 2) for _ in range(2))
    want = eager.run()
    torch._dynamo.reset()
    fn = lambda *args, **kw: patune.paged_attention_with_cache(*args, **kw) * 2
    got = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*compiled.args, **compiled.options)
    torch.testing.assert_close(got, want * 2, rtol=0, atol=0)
    for a, b in zip(tensors(eager.batch.kv_cache), tensors(compiled.batch.kv_cache), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_model_of_separate_calls_compiles_into_one_graph():
    """Positions, append, prefill and decode, each called alone, compile with everything around them."""

    def model(q, k, v, kv, qo_indptr, seq_lens, *pages):
        indices, positions = patune.get_batch_indices_positions(qo_indptr, seq_lens, q.shape[0])
        patune.append_paged_kv_cache(k, v, indices, positions, kv, *pages)
        prefilled, lse = patune.paged_prefill(q, kv, qo_indptr, *pages, max_q_len=1, return_lse=True)
        decoded, lse2 = patune.paged_decode(q, kv, *pages, return_lse=True, k_scale=2.0, sinks=lse[0])
        return patune.merge_states(prefilled, lse, decoded, lse2)

    step = Step(Case((1, 1), (30, 20)), 0)
    args = (*step.args[:5], step.batch.seq_lens, *step.batch.pages)
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(got, model(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_fake_tensors_get_shapes_and_dtypes_without_a_launch():
    """Under FakeTensorMode every public function returns what the real one would, of the same shape, dtype and device."""
    step = Step(Case((2, 1), (20, 30), dtype="bfloat16"), 1)
    decode = Batch(Case((1, 1), (20, 30), dtype="bfloat16"), DEVICE)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor
        q, pages = fake(decode.q), tuple(map(fake, decode.pages))
        cache = fake(decode.kv_cache)
        mixed = patune.paged_attention_with_cache(*map(fake, step.args), **step.options)
        outputs = [mixed, *patune.paged_decode(q, cache, *pages, return_lse=True)]
        outputs += patune.paged_prefill(q, cache, fake(decode.qo_indptr), *pages, max_q_len=1, return_lse=True)
        patune.append_paged_kv_cache(
            q[:, :2], q[:, :2], *patune.get_batch_indices_positions(fake(decode.qo_indptr), pages[2], 2), cache, *pages
        )
    assert [tuple(x.shape) for x in outputs] == [(3, 8, 64), (2, 8, 64), (2, 8), (2, 8, 64), (2, 8)]
    assert [x.dtype for x in outputs] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    assert all(x.device.type == DEVICE for x in outputs)


def test_without_max_q_len_the_step_is_the_same():
    """The host need not know the longest prompt: it is a bound on the work, never on the result."""
    step, again = (Step(Case((9, 30, 1), (20, 30, 40)), 2) for _ in range(2))
    torch.testing.assert_close(again.run(max_q_len=None), step.run(), rtol=0, atol=0)
