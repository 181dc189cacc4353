"""Several GPUs in one process: a call runs where its tensors are, whichever device is current."""

import pytest
import torch
from paged import assert_close
from real import Buffers, Real

import patune
from patune.kernels import device

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def two_gpus(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs, and one is visible")


def test_calls_run_on_their_tensors_device_and_leave_the_current_one_alone():
    """Decode, prefill and the mixed step on both devices in turn, while device 0 is current."""
    torch.cuda.set_device(0)
    for index in (1, 0, 1):
        b = Buffers(Real((3000, 700, 1), 1), device=f"cuda:{index}")
        want = b.reference()[0]
        assert_close(patune.paged_decode(b.q, b.kv_cache, *b.table), want, 1e-2)
        assert_close(patune.paged_prefill(b.q, b.kv_cache, b.qo_indptr, *b.table, max_q_len=1), want, 1e-2)
        k = torch.randn(3, 8, 128, device=b.q.device, dtype=b.q.dtype)
        got = patune.paged_attention_with_cache(
            b.q, k, k, b.kv_cache, b.qo_indptr, *b.table, num_prefill=0, num_decode=3, max_q_len=0
        )
        assert_close(got, b.reference()[0], 1e-2)
        assert got.device.index == index and torch.cuda.current_device() == 0


def test_each_device_has_its_own_facts():
    """The SM count and the name are the device's own."""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        assert device.device_of(torch.empty(1, device=f"cuda:{index}"))[:2] == (
            properties.name,
            properties.multi_processor_count,
        )


def test_one_graph_a_device():
    """A graph captured on device 1 replays right while device 0 is current again."""
    b = Buffers(Real((3000, 700), 1), device="cuda:1")
    out = b.poisoned()
    with torch.cuda.device(1):
        patune.paged_decode(b.q, b.kv_cache, *b.table, out=out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            patune.paged_decode(b.q, b.kv_cache, *b.table, out=out)
        out.fill_(float("nan"))
        graph.replay()
    assert_close(out, b.reference()[0], 1e-2)
