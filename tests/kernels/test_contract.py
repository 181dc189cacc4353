"""What attention kernels got wrong elsewhere: the wrong device or stream, a host that waits, arguments silently ignored."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from launching import call_all, to_meta
from paged import Batch, Case, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import patune
from patune.kernels import api, calls, decode, device, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLIT = dict(BLOCK_N=16, num_warps=4, num_stages=2, num_splits=3)
TILES = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2, maxnreg=0, num_splits=1)
ATTENTION = (patune.paged_decode, patune.paged_prefill, patune.paged_attention_with_cache)
PUBLIC = (*ATTENTION, patune.append_paged_kv_cache, patune.merge_states, patune.get_batch_indices_positions)


# Devices and streams


@pytest.fixture
def two_gpus(monkeypatch):
    """Device 0 with 132 SMs and device 1 with 78, of which device 0 is current."""
    properties = {0: ("GPU A", 132, 9, 0), 1: ("GPU B", 78, 8, 9)}
    names = ("name", "multi_processor_count", "major", "minor")
    asked = []
    fake = lambda index: asked.append(index) or SimpleNamespace(**dict(zip(names, properties[index], strict=True)))
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
    monkeypatch.setattr(calls, "find", lambda query: queries.append(query) or {})
    cache = SimpleNamespace(k=torch.empty(0), head_dim=64, page_size=16, kv_heads=2)
    calls._config(decode.TEMPLATE, None, on(1, shape=(2, 8, 64), dtype=torch.bfloat16), cache, batch_size=2, kv_len=100, q_len=1)
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


def test_the_launch_path_needs_no_value_of_any_tensor(launched):
    """Tensors without data, whose .item(), .tolist() and .cpu() raise, get all the way to the launches."""
    batch = Batch(Case((1, 1), (20, 30)), "cpu")
    call_all(batch)
    real = [(launch.fn.__name__, launch.grid) for launch in launched]
    launched.clear()
    call_all(to_meta(batch))
    assert [(launch.fn.__name__, launch.grid) for launch in launched] == real


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


def test_the_operators_are_registered_once_api_is_imported():
    """torch.ops.patune has the four operators that DESIGN names, each with a fake kernel and no autograd surprise."""
    assert api.ops is ops
    for name in ("paged_decode", "paged_prefill", "append_paged_kv_cache", "paged_attention_with_cache"):
        schema = getattr(torch.ops.patune, name).default._schema
        mutated = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        writes_cache = name in ("append_paged_kv_cache", "paged_attention_with_cache")
        assert mutated == ({"kv_cache", "v_cache"} if writes_cache else {"out", "lse"})
