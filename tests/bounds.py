"""Checked memory for Triton's interpreter: an address that a kernel touches must lie in one of its tensors."""

import mmap
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from patune.kernels.template import Launch

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="watches addresses in Triton's interpreter, on a machine without a GPU"
)


class Memory:
    """The byte ranges of a launch's tensors, first element to last, gaps between rows included."""

    def __init__(self, launch: Launch):
        tensors = [x for x in launch.args.values() if isinstance(x, torch.Tensor) and x.numel()]
        ranges = sorted((x.data_ptr(), x.data_ptr() + span(x)) for x in tensors)
        self.starts, self.ends = (np.array(side, dtype=np.uint64) for side in zip(*ranges, strict=True))
        self.ends = np.maximum.accumulate(self.ends)

    def check(self, addresses: np.ndarray, mask: np.ndarray, itemsize: int, verb: str) -> None:
        used = addresses[mask.astype(bool)].astype(np.uint64)
        i = np.searchsorted(self.starts, used, side="right").astype(np.int64) - 1
        outside = (i < 0) | (used + np.uint64(itemsize) > self.ends[np.maximum(i, 0)])
        if outside.any():
            raise AssertionError(f"the kernel {verb} {outside.sum()} addresses outside its tensors")


def span(x: torch.Tensor) -> int:
    return (sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


@contextmanager
def checked_memory():
    """While it is open, a launch that touches memory outside its tensors raises instead of corrupting or crashing."""
    from triton.runtime import interpreter

    real, run = interpreter._interpreter, Launch.run
    memory: list[Memory] = []

    def load(pointers, mask, other, dtype):
        memory[-1].check(pointers, mask, np.dtype(dtype).itemsize, "reads")
        return real.load(pointers, mask, other, dtype)

    def store(pointers, values, mask):
        memory[-1].check(pointers, mask, values.dtype.itemsize, "writes")
        return real.store(pointers, values, mask)

    def watched(launch: Launch) -> None:
        memory.append(Memory(launch))
        run(launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
        patch.setattr(Launch, "run", watched)
        yield


def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor of which only what is touched takes memory, however many elements it has."""
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    return torch.frombuffer(memory, dtype=dtype)
