"""Bound calls are what unbound ones are. Run by test_bound.py in a process without TRITON_INTERPRET, on the stand-in driver."""

import dataclasses
import functools
import itertools
import weakref

import pytest
import standin
import torch
import triton
from cachedb.builders import CONFIG, entry, store_entries
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Batch, Case
from torch.utils._python_dispatch import TorchDispatchMode

import patune
from kernels.test_errors import UNSUPPORTED, WRONG
from patune.cachedb import lookup
from patune.kernels import bound, calls, decode_hopper_jit, ops, prefill, prefill_hopper
from patune.workload import Key, Workload

standin.install()
settings.register_profile("bound", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("bound")

CASE = Case((1, 1), (200, 330), dtype="bfloat16")  # the H100's table or the rule splits it: two launches
PLAIN = patune.Config(dict(BLOCK_N=64, num_warps=4, num_stages=3, num_splits=4))
HOPPER = patune.Config(dict(BLOCK_N=128, num_stages=3, cluster=1, num_splits=2))
PREFILL = Case((5, 300), (200, 330), dtype="bfloat16")
PREFILL_PLAIN = patune.Config(prefill.TEMPLATE.default(Key("prefill", "", 132, 64, 16, 4), Workload(2, 265, 150)))
PREFILL_HOPPER = patune.Config(dict(BLOCK_N=64, num_stages=4, schedule=prefill_hopper.STATIC, issue=1, num_splits=1))
TAKEN = patune.Config({**PREFILL_HOPPER, "schedule": prefill_hopper.DYNAMIC})
MIXED = Case((5, 300, 1, 1), (200, 330, 40, 90), dtype="bfloat16")  # two prompts and two decodes
WAVES = Case((5, 12000, 1, 1), (200, 12000, 4000, 9000), dtype="bfloat16")  # the same, the prompts in several waves of programs
SCRATCH = ("partial_ptr", "partial_lse_ptr", "tails_ptr")  # of prefill_hopper


@pytest.fixture(autouse=True)
def nothing_bound():
    bound.forget()
    standin.made.clear()


class Arguments(dict):
    """The arguments of a decode of a case, or of a prefill if max_q_len is given, in memory of their own."""

    def __init__(self, case: Case = CASE, **changes):
        batch = Batch(case, "cpu")
        names = ("kv_indices", "kv_indptr", "kv_last_page_len")
        super().__init__(q=batch.q, kv_cache=batch.kv_cache, **dict(zip(names, batch.pages)), **batch.options)
        own = dict(qo_indptr=batch.qo_indptr) if "max_q_len" in changes else dict(q_len_per_seq=case.q_lens[0])
        self.update(dict(**own, out=batch.nan_like_q()) | changes)


def appending(case: Case = CASE, **changes) -> dict:
    """The arguments of an append of a case's new tokens."""
    batch = Batch(case, "cpu")
    k, v = (torch.zeros(len(batch.q), case.kv_heads, case.head_dim, dtype=batch.q.dtype) for _ in range(2))
    indices, positions = patune.get_batch_indices_positions(batch.qo_indptr, batch.seq_lens, len(batch.q))
    standin.made.clear()
    names = ("kv_indices", "kv_indptr", "kv_last_page_len")
    pages, layout = dict(zip(names, batch.pages)), dict(kv_layout=case.layout)
    return dict(k=k, v=v, batch_indices=indices, positions=positions, kv_cache=batch.kv_cache, **pages, **layout) | changes


def mixed(case: Case = MIXED, num_prefill: int = 2, padding: int = 0, **changes) -> dict:
    """The arguments of a mixed step of a case, whose tokens' places are not given."""
    batch, new = Batch(case, "cpu"), appending(case)
    new["q"], heads = batch.q, ("q", "k", "v")
    rows = {x: torch.cat([new.pop(x), torch.zeros(padding, new_heads, case.head_dim, dtype=batch.q.dtype)])
            for x, new_heads in zip(heads, (case.kv_heads * case.group, case.kv_heads, case.kv_heads))}  # fmt: skip
    del new["batch_indices"], new["positions"]
    counts = dict(num_prefill=num_prefill, num_decode=len(case.q_lens) - num_prefill, max_q_len=300)
    return rows | new | counts | dict(qo_indptr=batch.qo_indptr, num_prefill_tokens=sum(case.q_lens[:num_prefill])) | changes


def call(arguments: dict):
    if "q" not in arguments:
        return patune.append_paged_kv_cache(**arguments)
    if "num_prefill" in arguments:
        return patune.paged_attention_with_cache(**arguments)
    return (patune.paged_prefill if "max_q_len" in arguments else patune.paged_decode)(**arguments)


def launched(arguments: dict) -> list:
    """What a call launches."""
    result = call(arguments)
    pairs = [x if isinstance(x, tuple) else (x,) for x in (*arguments.values(), result)]
    return standin.launches([x for pair in pairs for x in pair if isinstance(x, torch.Tensor)])


def unbound(arguments: dict) -> list:
    bound.forget()
    return launched(arguments)


def is_bound(arguments: dict) -> bool:
    """Whether a call's repetition passes by Triton's JIT, which would hand its tensors to the launcher."""
    for _ in range(2):
        standin.made.clear()
        call(arguments)
    passed = [*itertools.chain.from_iterable(standin.made)]
    passed += itertools.chain.from_iterable(x for x in passed if isinstance(x, tuple | list))  # Triton 3.7 has them in one
    standin.made.clear()
    assert passed
    return not any(isinstance(x, torch.Tensor) for x in passed)


def shifted(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy that starts `elements` after a 16-byte boundary."""
    memory = x.new_empty(x.numel() + elements)
    return memory[elements:].view(x.shape).copy_(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    """A copy with another row in between each two rows."""
    return torch.stack([x, x], 1)[:, 0]


def one_storage(swapped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one storage: the same key either way round."""
    k, v = Batch(CASE, "cpu").kv_cache.transpose(0, 1).contiguous().unbind()
    return (v, k) if swapped else (k, v)


def one_table(arguments: Arguments) -> Arguments:
    """Page table tensors that are parts of one storage, 16 bytes aligned each."""
    names = ("kv_indices", "kv_indptr", "kv_last_page_len")
    memory = torch.zeros(3, 64, dtype=torch.int32)
    for name, row in zip(names, memory):
        arguments[name] = row[: len(arguments[name])].copy_(arguments[name])
    return arguments


ONE = torch.ones(1)
# Each differs from the first in something that decides what is launched; `Arguments` are made anew each time.
VARIATIONS = {
    "plain": lambda: Arguments(),
    "other memory": lambda: Arguments(dataclasses.replace(CASE, seed=7)),
    "no out": lambda: Arguments(out=None),
    "lse": lambda: Arguments(return_lse=True),
    "lse, no out": lambda: Arguments(return_lse=True, out=None),
    "q off alignment": lambda: Arguments() | {"q": shifted(Arguments()["q"], 1)},
    "q further off": lambda: Arguments() | {"q": shifted(Arguments()["q"], 4)},
    "strided q": lambda: Arguments() | {"q": strided(Arguments()["q"])},
    "strided out": lambda: Arguments() | {"out": strided(Arguments()["out"])},
    "out is q": lambda: (lambda a: a | {"out": a["q"]})(Arguments()),
    "pair": lambda: Arguments(dataclasses.replace(CASE, pair=True)),
    "one storage": lambda: Arguments() | {"kv_cache": one_storage(False)},
    "one storage, swapped": lambda: Arguments() | {"kv_cache": one_storage(True)},
    "k is v": lambda: Arguments() | {"kv_cache": one_storage(False)[:1] * 2},
    "one table": lambda: one_table(Arguments()),
    "page table off alignment": lambda: Arguments() | {"kv_indices": shifted(Arguments()["kv_indices"], 1)},
    "NHD": lambda: Arguments(dataclasses.replace(CASE, layout="NHD")),
    "window": lambda: Arguments(sliding_window=50),
    "other window": lambda: Arguments(sliding_window=16),
    "soft cap": lambda: Arguments(logits_soft_cap=5.0),
    "sinks": lambda: Arguments(sinks=torch.zeros(8)),
    "frozen sinks": lambda: Arguments(sinks=torch.nn.Parameter(torch.zeros(8), requires_grad=False)),
    "scale": lambda: Arguments(sm_scale=0.5),
    "float scales": lambda: Arguments(k_scale=0.5, v_scale=2.0),
    "tensor scales": lambda: Arguments(k_scale=ONE, v_scale=ONE.clone()),
    "one split": lambda: Arguments(config=patune.Config({**CONFIG, "num_splits": 1})),
    "three splits": lambda: Arguments(config=patune.Config({**CONFIG, "num_splits": 3})),
    "ragged": lambda: Arguments(max_kv_len=10_000),
    "two tokens": lambda: Arguments(dataclasses.replace(CASE, q_lens=(2, 2))),
    "longer": lambda: Arguments(dataclasses.replace(CASE, kv_lens=(3000, 5000))),
    "Hopper": lambda: Arguments(config=HOPPER),
    "Hopper, NHD": lambda: Arguments(dataclasses.replace(CASE, layout="NHD"), config=HOPPER),
    "Hopper, pair": lambda: Arguments(dataclasses.replace(CASE, pair=True), config=HOPPER),
    "Hopper, k is v": lambda: Arguments(config=HOPPER) | {"kv_cache": one_storage(False)[:1] * 2},
    "Hopper, one split": lambda: Arguments(config=patune.Config({**HOPPER, "num_splits": 1})),
    "Hopper, lse, no out": lambda: Arguments(config=HOPPER, return_lse=True, out=None),
    "Hopper, two tokens": lambda: Arguments(dataclasses.replace(CASE, q_lens=(2, 2)), config=HOPPER),
    "Hopper, tensor scales": lambda: Arguments(config=HOPPER, k_scale=ONE, v_scale=ONE.clone()),
    "Hopper, fp8": lambda: Arguments(dataclasses.replace(CASE, kv_dtype="float8_e4m3fn"), config=HOPPER),
    "Hopper, fp8, scales": lambda: Arguments(dataclasses.replace(CASE, kv_dtype="float8_e4m3fn", scales=True), config=HOPPER),
    "Hopper, e5m2": lambda: Arguments(dataclasses.replace(CASE, kv_dtype="float8_e5m2"), config=HOPPER),
    "prefill": lambda: Arguments(PREFILL, max_q_len=300, config=PREFILL_HOPPER),
    "prefill, fewer programs": lambda: Arguments(PREFILL, max_q_len=1, config=PREFILL_HOPPER),
    "prefill, not causal": lambda: Arguments(PREFILL, max_q_len=300, config=PREFILL_HOPPER, causal=False),
    "prefill, lse, no out": lambda: Arguments(PREFILL, max_q_len=300, config=PREFILL_HOPPER, return_lse=True, out=None),
    "prefill, NHD": lambda: Arguments(dataclasses.replace(PREFILL, layout="NHD"), max_q_len=300, config=PREFILL_HOPPER),
    "prefill, splits": lambda: Arguments(
        PREFILL, max_q_len=300, config=patune.Config({**PREFILL_HOPPER, "num_splits": 3}), return_lse=True
    ),
    "prefill, pair": lambda: Arguments(dataclasses.replace(PREFILL, pair=True), max_q_len=300, config=PREFILL_HOPPER),
    "prefill, other tokens": lambda: Arguments(dataclasses.replace(PREFILL, q_lens=(7, 290)), max_q_len=300, config=PREFILL_HOPPER),
    "prefill, plain": lambda: Arguments(PREFILL, max_q_len=300, config=PREFILL_PLAIN),
    "prefill, plain, options": lambda: Arguments(
        PREFILL, max_q_len=300, config=PREFILL_PLAIN, sliding_window=50, sinks=torch.zeros(8), k_scale=ONE, v_scale=2.0
    ),
    "prefill, items taken": lambda: Arguments(PREFILL, max_q_len=300, config=TAKEN),
    "prefill, items taken, splits": lambda: Arguments(PREFILL, max_q_len=300, config=patune.Config({**TAKEN, "num_splits": 3})),
    "Hopper, larger pool": lambda: Arguments(dataclasses.replace(CASE, kv_lens=(3000, 5000)), config=HOPPER),
    "append": appending,
    "append, strided": lambda: (lambda a: a | {"k": strided(a["k"])})(appending()),
    "append, pair": lambda: appending(dataclasses.replace(CASE, pair=True)),
    "append, NHD": lambda: appending(dataclasses.replace(CASE, layout="NHD")),
    "append, more tokens": lambda: appending(PREFILL),
    "append, float scales": lambda: appending(k_scale=0.5, v_scale=2.0),
    "append, fp8, tensor scales": lambda: appending(
        dataclasses.replace(CASE, kv_dtype="float8_e4m3fn"), k_scale=ONE, v_scale=ONE.clone()
    ),
    "mixed": mixed,
    "mixed, places given": lambda: mixed() | {name: appending(MIXED)[name] for name in ("batch_indices", "positions")},
    "mixed, pair": lambda: mixed(dataclasses.replace(MIXED, pair=True)),
    "mixed, one prompt more": lambda: mixed(num_prefill=3),
    "mixed, prompts alone": lambda: mixed(PREFILL),
    "mixed, decodes alone": lambda: mixed(CASE, num_prefill=0),
    "mixed, several waves": lambda: mixed(WAVES, max_q_len=12000, max_kv_len=9000),
    "mixed, options": lambda: mixed(sliding_window=50, sinks=torch.zeros(8), k_scale=ONE, v_scale=2.0, max_kv_len=330),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_bound_call_launches_what_an_unbound_one_does(name):
    """Kernel, grid, stream, every constant and every pointer but the scratch's, with the same tensors and with others."""
    arguments, others = VARIATIONS[name](), VARIATIONS[name]()
    want, want_others = unbound(arguments), unbound(others)
    assert want
    assert launched(others) == want_others
    assert launched(arguments) == want
    assert is_bound(arguments)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("sm_count", [3, 300])
def test_a_bound_call_has_the_grid_and_the_scratch_of_its_gpu(monkeypatch, num_splits, sm_count):
    """A program an SM, and scratch for each, of which tensors on no GPU have another number."""
    asked, remember, built = prefill_hopper.device_of, bound.remember, []
    monkeypatch.setattr(prefill_hopper, "device_of", lambda x: asked(x)._replace(sm_count=8 if x.is_meta else sm_count))
    monkeypatch.setattr(ops, "remember", lambda *given: built.append(given[1]) or remember(*given))
    arguments = Arguments(PREFILL, max_q_len=300, config=patune.Config({**PREFILL_HOPPER, "num_splits": num_splits}))
    want = unbound(arguments)
    assert launched(arguments) == want and is_bound(arguments)
    scratch = {name: x for name, x in built[0][0].args.items() if isinstance(x, torch.Tensor) and name in SCRATCH}
    assert len(scratch) == (3 if num_splits > 1 else 0)
    (only,) = bound._of_config.values()
    assert sum(x.nbytes for x in scratch.values()) <= only.scratch_bytes <= sum(x.nbytes + 127 for x in scratch.values())


def built(monkeypatch, arguments: dict) -> list:
    """The launches that a call which nothing is bound to makes of its arguments."""
    bound.forget()
    made, remember = [], bound.remember
    monkeypatch.setattr(ops, "remember", lambda call, launches, kernels: made.extend(launches) or remember(call, launches, kernels))
    call(arguments)
    return made


@pytest.mark.parametrize("step", ["mixed", "mixed, several waves"])
def test_a_mixed_step_s_decode_runs_beside_its_prefill(monkeypatch, step):
    """It follows what waited for the append, and it alone does not wait at its beginning."""
    launches = built(monkeypatch, VARIATIONS[step]())
    names = [launch.fn.__name__ for launch in launches]
    assert [x for x in names if x not in ("clear_counter", "prefill_join", "decode_reduce")] == [
        "append_kv", "prefill_attention_hopper", "decode_split_hopper",
    ]  # fmt: skip
    assert [name for name, launch in zip(names, launches) if launch.args.get("beside")] == ["decode_split_hopper"]
    assert set(names[names.index("prefill_attention_hopper") + 1 : names.index("decode_split_hopper")]) <= {"prefill_join"}
    (programs,) = launches[names.index("prefill_attention_hopper")].grid
    assert step == "mixed" or 99 <= programs < 132, "it leaves some of the 132 SMs"


@pytest.mark.parametrize("step", ["mixed, prompts alone", "mixed, decodes alone", "mixed, options"])
def test_a_mixed_step_without_two_kernels_that_can_runs_nothing_beside_another(monkeypatch, step):
    """The plain decode goes before the prefill."""
    launches = built(monkeypatch, VARIATIONS[step]())
    names = [launch.fn.__name__ for launch in launches]
    assert not any(launch.args.get("beside") for launch in launches)
    if step == "mixed, options":
        assert names[0] == "append_kv" and names.index("decode_split") < names.index("prefill_attention")


def test_a_mixed_step_with_padding_is_not_bound():
    """Its rows are set to zero on the device, and not by a launch."""
    assert not is_bound(mixed(padding=3)) and not bound._bound


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_call_is_not_served_by_what_one_that_differs_in_one_thing_bound(name):
    """In either order; hypothesis, below, tries more of them."""
    plain, arguments = Arguments(), VARIATIONS[name]()
    want_plain, want = unbound(plain), unbound(arguments)
    for first, second, wanted in ((plain, arguments, want), (arguments, plain, want_plain)):
        bound.forget()
        for _ in range(3):  # that binds it, finds it by its key, and knows it again
            launched(first)
        assert launched(second) == wanted


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(VARIATIONS)), min_size=2, max_size=6))
def test_a_call_is_never_served_by_what_another_one_bound(names):
    """After any calls, a call launches what it would have launched first."""
    calls = [VARIATIONS[name]() for name in names]
    wanted = [unbound(arguments) for arguments in calls]
    bound.forget()
    for _ in range(2):
        for arguments, want in zip(calls, wanted):
            assert launched(arguments) == launched(arguments) == want


CHANGES = {
    "q, strided": ("q", strided),
    "q, off alignment": ("q", lambda x: shifted(x, 1)),
    "out, strided": ("out", strided),
    "another pool": ("kv_cache", lambda x: x.clone()),
    "a pool of other strides": ("kv_cache", strided),
    "a longer page list": ("kv_indices", lambda x: x.repeat(50)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_that_was_changed_in_place_is_looked_at_anew(name):
    """It is the same object as in the call before."""
    arguments = Arguments(out=Arguments()["q"].clone())
    before = [launched(arguments) for _ in range(3)][-1]
    argument, change = CHANGES[name]
    arguments[argument].set_(change(arguments[argument]))
    after = launched(arguments)
    assert after == unbound(arguments)
    assert (after == before) == (name == "another pool")


def test_a_call_like_the_last_one_is_known_without_its_key(monkeypatch):
    """That of its types: hashing the key of many tensors is most of what finding a bound call costs."""
    windows = [Arguments(), Arguments(sliding_window=50)]  # as layers take turns in some models
    wanted = [unbound(arguments) for arguments in windows]
    for arguments in windows:
        assert is_bound(arguments)
    monkeypatch.setattr(bound, "_bound", {})
    for _ in range(2):
        for arguments, want in zip(windows, wanted):
            assert launched(arguments) == want
    assert not bound._bound


def test_a_bound_call_keeps_none_of_its_tensors():
    """A pool that its owner lets go is freed."""
    arguments = Arguments()
    assert is_bound(arguments)
    kept = [weakref.ref(x.untyped_storage()) for x in arguments.values() if isinstance(x, torch.Tensor)]
    assert len(kept) == 6 and all(x() for x in kept)
    del arguments
    standin.made.clear()
    assert not any(x() for x in kept)


@triton.jit
def copy(x_ptr, y_ptr, scratch_ptr, z_ptr, n, stride, BLOCK: triton.language.constexpr):
    offs = triton.language.arange(0, BLOCK)
    x = triton.language.load(x_ptr + offs * stride, mask=offs < n)
    triton.language.store(scratch_ptr + offs, x, mask=offs < n)
    triton.language.store(z_ptr + offs, x + triton.language.load(y_ptr + offs, mask=offs < n), mask=offs < n)


PIECES = dict(
    dtype=st.sampled_from((torch.float32, torch.bfloat16)), length=st.integers(1, 40), step=st.sampled_from((1, 2, 16)),
    start=st.integers(0, 9), other=st.integers(0, 9), shared=st.booleans(), n=st.sampled_from((0, 1, 16, 33)),
)  # fmt: skip
DRAWN = st.fixed_dictionaries(PIECES)


@settings(max_examples=60)
@given(DRAWN, st.lists(st.tuples(DRAWN, st.sampled_from(sorted(PIECES))), max_size=6))
def test_any_change_of_a_template_s_call_that_matters_rebinds(pieces, changes):
    """dtype, length, stride, offset, alignment, shared storage and host arguments, of a small kernel with scratch and views."""
    bound.forget()

    def build(n, stride):
        def launches(x, y):
            scratch = torch.empty(n + 1, dtype=x.dtype, device=x.device), torch.empty(3, device=x.device)
            args = dict(x_ptr=x[1:], y_ptr=y, z_ptr=y[y.shape[0] // 2 :], n=n, stride=stride, BLOCK=32)
            return [bound.Launch(copy, (n, 2), args | dict(scratch_ptr=s)) for s in scratch]

        return launches

    memory = torch.zeros(400, dtype=torch.float32)
    for drawn, name in [(pieces, "n"), *changes]:
        pieces[name] = drawn[name]
        flat, n, step = memory.view(pieces["dtype"]), pieces["n"], pieces["step"]
        x = flat[pieces["start"] :][: pieces["length"] * step : step]
        y = (flat if pieces["shared"] else flat.clone())[pieces["other"] :][:20]
        call = bound.Call(build(n, step), (x, y))
        built = call.build(*call.tensors)
        kernels = [launch.run() for launch in built]
        want = standin.launches([x, y])
        for _ in range(3):
            key, pointers, found = bound.find(x, y, n, step)
            if found is None:
                with bound.waiting(key):
                    bound.remember(call, built, kernels)
            else:
                found.run(pointers)
                assert standin.launches([x, y]) == want
        assert found


# Not those with a tensor on meta, whose device has the same number as the stand-in's; tests/gpu has them.
BAD = [
    pytest.param(changes, message, id=message[:60])
    for calls, changes, message in WRONG + UNSUPPORTED
    if "decode" in calls and not any(getattr(x, "is_meta", False) for x in changes.values())
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_call_raises_the_same_error_after_a_good_one_was_bound(changes, message):
    """It reaches no launch. The good call is that of test_errors, of which each bad one changes something."""
    good = Arguments(Case((1, 1), (20, 33), dtype="bfloat16"))
    assert is_bound(good)
    for call in (good | changes, good | {"out": None} | changes):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            patune.paged_decode(**call)
        assert str(caught.value).startswith(message)
    assert not standin.made


NOTHING = dict.fromkeys(("q", "kv_cache", "kv_indices", "kv_indptr", "kv_last_page_len", "out"))


@pytest.mark.parametrize(
    "changes", [dict(q_len_per_seq=1.0), dict(kv_layout=["HND"]), dict(kv_cache=5), dict(q=None), dict(q=[1]), NOTHING]
)
def test_a_call_of_the_wrong_types_fails_as_if_nothing_were_bound(changes):
    """Also where 1.0 equals 1, and what has no hash."""
    errors = []
    for warm in (False, True):
        if warm:
            assert is_bound(Arguments())
        with pytest.raises(Exception) as caught:  # noqa: PT011  whatever it is, it is the same
            patune.paged_decode(**(Arguments() | changes))
        errors.append((type(caught.value), str(caught.value).split(" at 0x")[0].splitlines()[0]))
    assert errors[0] == errors[1]
    assert not standin.made


def test_a_call_is_worked_out_once_to_be_run_and_bound(monkeypatch):
    """What binds it takes the config and the kernels that the operator ran it with."""
    worked_out = []
    decode_call = calls.decode_call
    monkeypatch.setattr(
        ops, "decode_call", lambda *given, **options: worked_out.append(decode_call(*given, **options)) or worked_out[-1]
    )
    assert is_bound(Arguments())
    assert len(worked_out) == 1


def test_there_are_never_more_bound_calls_than_the_limit():
    """Page lists of ever new lengths are forgotten again, and a call stays right meanwhile."""
    arguments = Arguments()
    for pages in range(bound.MAX_BOUND + 20):
        arguments["kv_indices"] = torch.zeros(pages + 40, dtype=torch.int32)
        assert launched(arguments)
        assert 0 < len(bound._bound) <= bound.MAX_BOUND


@pytest.mark.parametrize("config", [PLAIN, HOPPER], ids=["plain", "Hopper"])
def test_page_lists_of_other_lengths_share_what_was_bound(config):
    """Their length is advice for the config; where it leads to the same one, nothing else depends on it."""
    arguments = Arguments(config=config)
    want = launched(arguments)
    bound.forget()
    for lengths, pages in enumerate((40, 41, 77), start=1):
        arguments["kv_indices"] = torch.zeros(pages, dtype=torch.int32)
        assert launched(arguments) == launched(arguments) == want
        assert len(bound._bound) == lengths and len(bound._of_config) == 1


def test_an_empty_page_list_shares_nothing_with_one_that_has_pages():
    """No pointer is kept of an empty tensor, so what was bound for it must not serve a list with pages."""
    arguments = Arguments(config=PLAIN)
    for pages in (0, 40):
        arguments["kv_indices"] = torch.zeros(pages, dtype=torch.int32)
        assert launched(arguments) == launched(arguments)
    assert len(bound._of_config) == 2


# Tensor maps: what TMA is told about a pool


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_each_pool_of_a_bound_call_has_its_tensor_maps_made_once(layout):
    """One for K and one for V, whatever other pools come in between: the layers of a model."""
    layers = [Arguments(dataclasses.replace(CASE, layout=layout, seed=seed), config=HOPPER) for seed in range(5)]
    wanted = [unbound(arguments) for arguments in layers]
    assert len({str(launches) for launches in wanted}) == 1 and all(launches for launches in wanted)
    bound.forget()
    launched(layers[0])
    standin.maps.clear()
    for _ in range(3):
        for arguments, want in zip(layers, wanted):
            assert launched(arguments) == want
    pools = [arguments["kv_cache"].data_ptr() for arguments in layers]
    v = layers[0]["kv_cache"][:, 1].data_ptr() - pools[0]
    assert sorted(told[0] for told in standin.maps) == sorted([*pools, *(pool + v for pool in pools)])


def test_a_pool_in_the_place_of_a_freed_one_is_addressed_as_what_it_is():
    """Of the same shape, by the map at hand; of another one, by its own."""
    memory = Arguments(config=HOPPER)["kv_cache"]
    calls = [Arguments(config=HOPPER, kv_cache=memory[:pages]) for pages in (len(memory), len(memory) - 3, len(memory))]
    wanted = [unbound(arguments) for arguments in calls]
    assert wanted[0] == wanted[2] != wanted[1]
    bound.forget()
    for _ in range(2):
        for arguments, want in zip(calls, wanted):
            assert launched(arguments) == want


def test_no_more_tensor_maps_are_kept_than_the_limit(monkeypatch):
    """The one that was used last stays."""
    monkeypatch.setattr(bound, "MAX_MAPS", 2)
    layers = [Arguments(dataclasses.replace(CASE, seed=seed), config=HOPPER) for seed in range(3)]
    wanted = [unbound(arguments) for arguments in layers]
    bound.forget()
    launched(layers[0])
    made = []
    for i in (0, 1, 0, 2, 0, 1):
        standin.maps.clear()
        assert launched(layers[i]) == wanted[i]
        made.append(len(standin.maps))
    assert made == [2, 2, 0, 2, 0, 2]


def test_a_descriptor_that_cannot_be_expanded_beforehand_leaves_the_call_as_it_is(monkeypatch):
    """A Triton whose launcher does it in another way serves every call itself, and binding is tried once."""
    arguments = Arguments(config=HOPPER)
    want = unbound(arguments)
    kernels, *_ = decode_hopper_jit.decode_split_hopper.device_caches[arguments["q"].get_device()]
    for kernel in kernels.values():
        monkeypatch.setattr(kernel.run, "launch", functools.partial(kernel.run.launch))
    assert unbound(arguments) == want
    assert list(bound._bound.values()) == [None]
    monkeypatch.setattr(bound, "waiting", None)
    assert launched(arguments) == want
    assert not is_bound(arguments)


# What looks on sees what it saw before


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator():
    """Also after the call was bound."""
    arguments = Arguments()
    assert is_bound(arguments)
    with Seen() as seen:
        launched(arguments)
    assert "patune::paged_decode" in seen.names


def test_the_profiler_sees_the_operator():
    """By name, as any other."""
    arguments = Arguments()
    assert is_bound(arguments)
    with torch.profiler.profile() as profile:
        launched(arguments)
    assert "patune::paged_decode" in {event.name for event in profile.events()}


def test_a_transform_sees_the_operator():
    """Inside functionalize a tensor has no memory; the outcome does not depend on what is bound."""

    def outcome() -> tuple:
        arguments = Arguments()
        call = torch.func.functionalize(lambda q: patune.paged_decode(**(arguments | {"q": q})))
        try:
            call(arguments["q"])
        except Exception as error:  # noqa: BLE001  whatever it is, it is the same
            return type(error), str(error)[:40]
        return len(standin.made), len(bound._bound)

    first = outcome()
    assert is_bound(Arguments())
    bound_before = dict(bound._bound)
    assert outcome()[0] == first[0]
    assert bound._bound == bound_before


def test_a_compiled_graph_holds_the_operator():
    """torch.compile traces no bound call, with and without one at hand."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    arguments = Arguments()
    assert is_bound(arguments)
    torch.compile(lambda: patune.paged_decode(**arguments), backend=backend, fullgraph=True)()
    assert [node for graph in graphs for node in graph.graph.nodes if "paged_decode" in str(node.target)]


@pytest.mark.parametrize("which", ["enter", "exit"])
def test_a_launch_hook_sees_every_launch(which):
    """Profilers of Triton hang there; without a hook the call is bound again."""
    arguments = Arguments()
    want = len(unbound(arguments))
    assert is_bound(arguments)
    hooks = getattr(triton.knobs.runtime, f"launch_{which}_hook")
    hooks.add(print)
    try:
        patune.paged_decode(**arguments)
        passed = [x for launch in standin.made for x in launch if x is hooks]
    finally:
        hooks.remove(print)
    assert len(passed) == want > 0
    standin.made.clear()
    assert is_bound(arguments)


def test_a_tensor_with_a_pending_sign_goes_through_the_operator():
    """The dispatcher resolves it; its memory holds the negative of its values."""
    arguments = Arguments()
    assert is_bound(arguments)
    assert not is_bound(arguments | {"q": torch._neg_view(arguments["q"])})


def test_a_cache_that_requires_grad_is_not_bound_where_gradients_are_recorded():
    """The operator's autograd behaviour is the dispatcher's; under no_grad it has none."""
    arguments = Arguments()
    assert is_bound(arguments)
    arguments["kv_cache"].requires_grad_()
    with torch.no_grad():
        assert is_bound(arguments)
    assert not is_bound(arguments)


def test_a_tensor_of_another_class_is_not_bound():
    """What operators mean to it is its own."""

    class Other(torch.Tensor):
        pass

    arguments = Arguments()
    assert is_bound(arguments)
    assert not is_bound(arguments | {"q": arguments["q"].as_subclass(Other)})


def test_page_tables_are_checked_under_patune_check(monkeypatch):
    """Also those of a call that was bound before the variable was set."""
    arguments = Arguments()
    assert is_bound(arguments)
    monkeypatch.setenv("PATUNE_CHECK", "1")
    arguments["kv_indptr"] = arguments["kv_indptr"].flip(0).contiguous()
    with pytest.raises(ValueError, match=r"kv_indptr: (decreases|starts)"):
        patune.paged_decode(**arguments)


def test_a_table_that_is_read_again_decides_anew(tmp_path, monkeypatch):
    """After lookup.reload(), a call that was bound takes the config of the new table; a database alone changes nothing."""
    arguments = Arguments()
    before = unbound(arguments)
    key = dict(head_dim=64, page_size=16, q_heads_per_kv=4)
    config = {**CONFIG, "num_splits": 2, "num_warps": 2}
    mine = entry(**key, batch_size=2, kv_len=272, kv_heads=2, config=config)
    slower = {**mine, "kernel": "decode_hopper", "us": 2 * mine["us"]}  # what a call takes of this one alone
    store_entries(tmp_path / "mine.db", [mine, slower])
    monkeypatch.setenv("PATUNE_DB", str(tmp_path / "mine.db"))
    assert launched(arguments) == before
    lookup.reload()
    try:
        after = launched(arguments)
        assert after != before and launched(arguments) == after
    finally:
        monkeypatch.undo()
        lookup.reload()
    assert launched(arguments) == before
