"""What paged attention kernels got wrong elsewhere, one law each; addresses past the end and past 2^31 are in test_bounds.py."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paged import Batch, Case, assert_close, check_decode, check_prefill
from torch.utils._python_dispatch import TorchDispatchMode

import patune
from patune.cachedb import lookup
from patune.kernels import api, config, decode, device, ops
from patune.kernels.cache import paged_cache
from patune.kernels.template import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLIT = dict(BLOCK_N=16, num_warps=4, num_stages=2, num_splits=3)
TILES = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2)
ATTENTION = (patune.paged_decode, patune.paged_prefill, patune.paged_attention_with_cache)
PUBLIC = (*ATTENTION, patune.append_paged_kv_cache, patune.merge_states, patune.get_batch_indices_positions)


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """The launches that were asked for; none is made."""
    launches: list[Launch] = []
    monkeypatch.setattr(ops, "run", lambda asked, tensor: launches.extend(asked))
    return launches


# Devices and streams


@pytest.fixture
def two_gpus(monkeypatch):
    """Device 0 with 132 SMs and device 1 with 78, of which device 0 is current."""
    properties = {0: ("GPU A", 132, 9, 0), 1: ("GPU B", 78, 8, 9)}
    names = ("name", "multi_processor_count", "major", "minor")
    asked = []
    fake = lambda index: asked.append(index) or SimpleNamespace(**dict(zip(names, properties[index], strict=True)))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device.cuda_device.cache_clear()
    yield asked
    device.cuda_device.cache_clear()


def on(index: int, **kw):
    """As much of a CUDA tensor as the launch path looks at."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), **kw)


def test_the_sm_count_is_the_tensors_devices_not_device_0s(two_gpus):
    """Each device is asked for its own facts, once."""
    for _ in range(2):
        assert device.device_of(on(0)) == ("GPU A", 132, "9.0")
        assert device.device_of(on(1)) == ("GPU B", 78, "8.9")
    assert sorted(two_gpus) == [0, 1]


def test_the_config_is_looked_up_for_the_tensors_own_device(two_gpus, monkeypatch):
    """A call with tensors on device 1 while device 0 is current asks the table for device 1."""
    queries = []
    monkeypatch.setattr(ops, "find", lambda query: queries.append(query) or {})
    cache = SimpleNamespace(k=torch.empty(0), head_dim=64, page_size=16, kv_heads=2)
    ops._config(decode.TEMPLATE, None, on(1, shape=(2, 8, 64), dtype=torch.bfloat16), cache, batch_size=2, kv_len=100)
    assert [(q["device_name"], q["sm_count"], q["capability"]) for q in queries] == [("GPU B", 78, "8.9")]


def test_a_launch_runs_on_the_tensors_device_and_that_devices_current_stream(two_gpus, monkeypatch):
    """The device is switched for the launch and back after it; Triton then takes that device's current stream."""
    current = [0]

    class Switch:
        def __init__(self, to):
            self.to = to

        def __enter__(self):
            current.append(self.to.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Switch)
    seen = []
    launch = SimpleNamespace(run=lambda: seen.append(current[-1]))
    ops.run([launch, launch], on(1))
    ops.run([launch], on(0))
    assert seen == [1, 1, 0] and current == [0]


def test_no_launch_names_a_stream(launched):
    """A stream argument would override the current one."""
    call_all(Batch(Case((1, 1), (20, 30)), DEVICE))
    assert launched and not any("stream" in launch.args for launch in launched)


# The host never waits for the device


def call_all(batch: Batch) -> None:
    """Every operator with every optional tensor, as the operators' implementations are called on a GPU."""
    k = batch.q[:, :2]
    out, lse = torch.empty_like(batch.q), batch.q.new_empty(batch.q.shape[:2], dtype=torch.float32)
    one = batch.q.new_empty(1, dtype=torch.float32)
    sinks = batch.q.new_empty(batch.q.shape[1], dtype=torch.float32)
    options = (7, 5.0, sinks, one, one, 1.0)
    kv, qo = batch.kv_cache, batch.qo_indptr
    ops._paged_decode(batch.q, kv, None, *batch.pages, out, lse, 0.1, "HND", 1, 30, *options, None)
    ops._paged_decode(batch.q, kv, None, *batch.pages, out, lse, 0.1, "HND", 1, None, *options, [16, 4, 2, 3])
    ops._paged_prefill(batch.q, kv, None, qo, *batch.pages, out, lse, 0.1, "HND", 1, True, *options, None)
    indices = patune.get_batch_indices_positions(qo, batch.seq_lens, 2)
    ops._append(k, k, *indices, kv, None, *batch.pages[:2], "HND", one, one, 1.0, 1.0, None)
    ops._paged_attention_with_cache(
        batch.q, k, k, kv, None, qo, *batch.pages, None, None, 0.1, "HND", 1, 1, 1, 1, None, *options[:5], 1.0, 1.0
    )


def to_meta(batch: Batch) -> Batch:
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, value.to("meta"))
    batch.pages = (batch.kv_indices, batch.kv_indptr, batch.kv_last_page_len)
    return batch


def test_the_launch_path_needs_no_value_of_any_tensor(launched):
    """Tensors without data, whose .item(), .tolist() and .cpu() raise, get all the way to the launches."""
    call_all(to_meta(Batch(Case((1, 1), (20, 30)), "cpu")))
    assert len(launched) == len(kernels_of_call_all())


def kernels_of_call_all() -> list[str]:
    recorded: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "run", lambda asked, tensor: recorded.extend(asked))
        call_all(Batch(Case((1, 1), (20, 30)), DEVICE))
    return [launch.fn.__name__ for launch in recorded]


class NoSync(TorchDispatchMode):
    """Raises where an operator would make the host wait for a tensor's values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        to_host = name in ("_to_copy", "copy_") and torch.device((kwargs or {}).get("device") or "meta").type == "cpu"
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique") or to_host:
            raise AssertionError(f"{func} on the launch path")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_values(monkeypatch):
    """The methods that read values raise; on the CPU some of them reach no operator."""

    def refuse(*args, **kw):
        raise AssertionError("a tensor's values were read on the launch path")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse, raising=False)


@pytest.mark.parametrize(
    "read", [lambda x: x.tolist(), lambda x: x[0].item(), lambda x: int(x[0]), lambda x: x.cpu(), lambda x: bool(x[0])]
)
def test_reading_a_value_is_noticed(no_values, read):
    """So a green test below means something."""
    x = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(AssertionError, match="launch path"), NoSync():
        read(x)


def test_the_public_functions_do_not_synchronise(launched, request):
    """From the arguments to the launches nothing reads a value or copies to the host, checks included."""
    batch = Batch(Case((1, 1), (20, 30)), DEVICE)
    one, k = torch.ones(1, device=DEVICE), batch.q[:, :2].clone()
    request.getfixturevalue("no_values")
    with NoSync():
        patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, k_scale=one, v_scale=one, return_lse=True)
        patune.paged_prefill(batch.q, batch.kv_cache, batch.qo_indptr, *batch.pages, max_q_len=1, k_scale=one, v_scale=one)
        indices = patune.get_batch_indices_positions(batch.qo_indptr, batch.seq_lens, 2)
        patune.append_paged_kv_cache(k, k, *indices, batch.kv_cache, *batch.pages)
        patune.paged_attention_with_cache(
            batch.q, k, k, batch.kv_cache, batch.qo_indptr, *batch.pages, num_prefill=1, num_decode=1, max_q_len=1
        )
        lse = batch.q.new_zeros(2, 8)
        patune.merge_states(batch.q, lse, batch.q, lse)
    assert len(launched) >= 6


# Nothing is silently ignored


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_no_public_function_swallows_an_argument_that_it_does_not_know(function):
    """A mask, a dropout or an alibi slope is a TypeError, not a wrong result."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds


FEATURES = [
    dict(sm_scale=0.5),
    dict(sliding_window=7),
    dict(logits_soft_cap=1.0),
    dict(sinks=torch.full((8,), 2.0)),
    dict(k_scale=2.0),
    dict(v_scale=2.0),
    dict(k_scale=torch.tensor([2.0])),
    dict(v_scale=torch.tensor([[2.0]])),
]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: next(iter(f)))
@pytest.mark.parametrize("kernel", ["decode", "split", "prefill", "mixed"])
def test_every_feature_is_in_the_result_or_raises(kernel, feature):
    """Each option changes the output to what the reference says."""
    feature = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in feature.items()}
    batch = Batch(Case((1, 1), (20, 33)), DEVICE)
    call = {
        "decode": lambda **kw: patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT | {"num_splits": 1}, **kw),
        "split": lambda **kw: patune.paged_decode(batch.q, batch.kv_cache, *batch.pages, config=SPLIT, **kw),
        "prefill": lambda **kw: patune.paged_prefill(
            batch.q, batch.kv_cache, batch.qo_indptr, *batch.pages, max_q_len=1, config=TILES, **kw
        ),
        "mixed": lambda **kw: rewriting_step(batch, **kw),
    }[kernel]
    got = call(**feature)
    want = patune.reference_paged_attention(batch.q, batch.kv_cache, batch.qo_indptr, *batch.pages, **feature)
    assert_close(got, want, 1e-4)
    plain = patune.reference_paged_attention(batch.q, batch.kv_cache, batch.qo_indptr, *batch.pages)
    assert (got - plain).norm() > 0.02 * plain.norm()


def rewriting_step(batch: Batch, **kw) -> torch.Tensor:
    """A mixed step that appends each sequence's last token as it already is, so that the cache stays what it was."""
    page = batch.kv_indices[(batch.kv_indptr[1:] - 1).long()].long()
    k, v = batch.kv_cache[page, :, :, (batch.kv_last_page_len - 1).long()].unbind(1)
    k, v = k * kw.get("k_scale", 1.0), v * kw.get("v_scale", 1.0)
    return patune.paged_attention_with_cache(
        batch.q, k, v, batch.kv_cache, batch.qo_indptr, *batch.pages, num_prefill=1, num_decode=1, max_q_len=1, **kw
    )


def test_causal_false_is_honoured():
    """Without causal a query sees keys after itself; with it, none."""
    batch = Batch(Case((9,), (20,)), DEVICE)
    for causal in (True, False):
        got = patune.paged_prefill(batch.q, batch.kv_cache, batch.qo_indptr, *batch.pages, max_q_len=9, causal=causal, config=TILES)
        assert_close(got, batch.reference(causal=causal)[0], 1e-4)


# The work follows the sequences


def test_the_split_count_comes_from_the_sequences_not_from_the_pool(launched):
    """A page pool a thousand times as large changes no config, no grid and no scratch."""
    shapes = []
    for pool in (10, 10_000):
        cache = torch.empty(pool, 2, 2, 16, 64, dtype=torch.float8_e5m2, device="meta")
        batch = to_meta(Batch(Case((1, 1), (64, 70), dtype="bfloat16"), "cpu"))
        batch.kv_cache = cache
        launched.clear()
        call_all(batch)
        shapes.append([(x.grid, x.args.get("num_splits"), getattr(x.args.get("partial_ptr"), "shape", None)) for x in launched])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("num_splits", [1, 2, 16])
@pytest.mark.parametrize("head_dim", [16, 256])
def test_scratch_is_sized_by_the_call_at_hand(head_dim, num_splits):
    """Partial results have room for this call's shares, heads, rows and padded head_dim, and nothing outlives the call."""
    sizes = []
    for dim in (head_dim, 128, head_dim):
        batch = Batch(Case((1, 1, 1), (20, 30, 0), head_dim=dim), DEVICE)
        cache = paged_cache(batch.kv_cache, None, "HND")
        made = decode.launches(batch.q, cache, *batch.pages, batch.q, None, SPLIT | {"num_splits": num_splits}, sm_scale=1.0)
        shares, rows = made[0].grid[1], 2 * 4
        scratch = made[0].args["partial_ptr"], made[0].args["partial_lse_ptr"]
        assert [x.numel() for x in scratch] == ([shares * rows * dim, shares * rows] if num_splits > 1 else [0, 0])
        assert all(launch.args["partial_ptr"] is scratch[0] for launch in made)
        sizes.append((scratch[0].numel(), scratch[0].data_ptr()))
    assert sizes[0][0] == sizes[2][0]


# Rows and shares without keys


@pytest.mark.parametrize("window", [1, 3])
def test_a_row_whose_first_tiles_are_fully_masked_is_no_nan(window):
    """The later rows of a tile see no key of the first tiles that the tile's first row needs."""
    check_prefill(Case((50,), (60,), window=window, head_dim=16), DEVICE, **(TILES | {"BLOCK_N": 32}))
    check_decode(Case((20,), (60,), window=window, group=1, head_dim=16), DEVICE, **(SPLIT | {"num_splits": 1}))


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_row_that_sees_no_key_at_all_is_zeros_with_lse_minus_infinity(num_splits, sinks):
    """More new tokens than keys, and no keys: zeros, or the sink alone in the lse."""
    check_decode(Case((5, 5), (3, 40), sinks=sinks), DEVICE, **(SPLIT | {"num_splits": num_splits}))
    check_prefill(Case((5, 5, 2), (3, 40, 0), sinks=sinks), DEVICE, **TILES)


@pytest.mark.parametrize("kv_lens", [(33, 33), (1, 90), (0, 17), (0, 0)], ids=str)
def test_an_empty_share_counts_for_nothing(kv_lens):
    """More shares than tiles: those without a key must not give -inf minus -inf."""
    check_decode(Case((1, 1), kv_lens), DEVICE, **(SPLIT | {"num_splits": 16}))


def test_a_share_that_only_some_rows_see_counts_for_those_alone():
    """The last share of 33 keys, cut every 16, holds one key, which only the last of 5 query tokens sees."""
    check_decode(Case((5,), (33,)), DEVICE, **SPLIT)
    check_decode(Case((5,), (33,), window=2), DEVICE, **SPLIT)


# Key explosion


@pytest.fixture(scope="module")
def variants() -> dict[str, dict[str, int]]:
    """Distinct kernels by stream of calls, counted by variants.py in a process that compiles rather than interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("variants.py")
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


DECODE = {"decode_split": 1, "decode_reduce": 1}


@pytest.mark.parametrize(
    ("stream", "kernels"),
    [
        ("decode kv_len", DECODE),
        ("decode batch", DECODE | {"decode_reduce": 2}),  # few rows are reduced in narrower columns
        ("decode num_splits", DECODE),
        ("decode window", DECODE),
        ("decode alignment", DECODE),
        ("decode max_kv_len", DECODE),
        ("prefill q_len", {"prefill_attention": 1}),
        ("prefill batch", {"prefill_attention": 1}),
        ("prefill alignment", {"prefill_attention": 1}),
        ("append tokens", {"append_kv": 1}),
    ],
)
def test_compiled_kernels_do_not_multiply_with(variants, stream, kernels):
    """New lengths, batch sizes, splits, window widths and slices of page tables compile nothing."""
    assert variants[stream] == kernels


def test_a_feature_that_is_compiled_in_is_counted(variants):
    """The count above notices a new kernel."""
    assert variants["decode with and without a window"] == {"decode_split": 2, "decode_reduce": 2}


def test_the_memory_of_lookups_does_not_grow_with_every_length():
    """A KV cache that grows by a token a step meets few new lookups, and each answer has splits that fit."""
    query = dict(
        kernel="decode", head_dim=128, page_size=16, q_heads_per_kv=4, q_dtype="bfloat16", kv_dtype="bfloat16", features="",
        sm_count=132, device_name="NVIDIA H100 80GB HBM3", capability="9.0", q_len=1, kv_heads=8, ragged=False,
    )  # fmt: skip
    entry = query | dict(
        gpu="NVIDIA H100 80GB HBM3", batch_size=8, kv_len=4096, config=SPLIT, us=1.0, when="", triton="", torch="", driver="",
        source_hash="", mode="measured",
    )  # fmt: skip
    table = lookup.Table([entry])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "table", lambda: table)
        for batch_size, kv_len in [*((8, n) for n in range(1, 30_000)), *((n, 5000) for n in range(1, 1000))]:
            found = config.find(query | dict(batch_size=batch_size, kv_len=kv_len))
            assert found["num_splits"] == 1 or found["num_splits"] * 64 <= kv_len
    (group,) = table._groups.values()
    assert len(group.answers) <= 4 * 15 + 64 + 4 * 5  # 4 an octave, and every batch size up to 64


def test_the_operators_are_registered_once_api_is_imported():
    """torch.ops.patune has the four operators that DESIGN names, each with a fake kernel and no autograd surprise."""
    assert api._library is ops._library
    for name in ("paged_decode", "paged_prefill", "append_paged_kv_cache", "paged_attention_with_cache"):
        schema = getattr(torch.ops.patune, name).default._schema
        mutated = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        writes_cache = name in ("append_paged_kv_cache", "paged_attention_with_cache")
        assert mutated == ({"kv_cache", "v_cache"} if writes_cache else {"out", "lse"})
