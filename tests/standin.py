"""A GPU's driver for machines without one: Triton compiles for sm_90 and goes all the way to the C function that launches, which
here writes down what it is given. CPU tensors stand for the GPU's."""

from types import SimpleNamespace
from typing import Any

import torch
import triton.backends.nvidia.driver as nvidia
from triton.runtime import driver

from patune.kernels import checks, device
from patune.tuner.compile import _NoGpu

made: list[tuple] = []  # what the C function was called with, launch by launch
maps: list[tuple] = []  # tensor maps made: what cuTensorMapEncodeTiled would be told, the address first


def _launch(*arguments: Any) -> None:
    made.append(arguments)


def _tensor_map(*told: Any) -> tuple:
    maps.append(told)
    return told


class StandIn(_NoGpu):
    """Triton's own launcher class on top of `_launch`; the current device is the CPU tensors'."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self):
        super().__init__("9.0")
        self.functions = 0
        self.utils = SimpleNamespace(
            launch=_launch,
            build_signature_metadata=tuple,
            fill_tma_descriptor=_tensor_map,  # Triton 3.6
            fill_tma_descriptor_tiled=_tensor_map,  # Triton 3.7
            get_device_properties=lambda index: {"max_shared_mem": 232448},
            load_binary=self._load,
        )

    def _load(self, name: str, *rest: Any) -> tuple[int, int, int, int, int]:
        self.functions += 1
        return 1, self.functions, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_current_device(self) -> int:
        return torch.empty(0).get_device()


def install() -> None:
    """Make this process launch through the stand-in. It must not have TRITON_INTERPRET set."""
    nvidia.compile_module_from_src = lambda **kw: SimpleNamespace(launch=_launch)  # Triton 3.6 builds a launcher a signature
    nvidia.library_dirs = list
    nvidia.PyKernelArg = SimpleNamespace  # Triton 3.7 has one launcher, and describes the arguments to it
    driver.set_active(StandIn())
    checks.INTERPRETED = True  # CPU tensors are let in
    device.INTERPRETED = device.Device("NVIDIA H100 80GB HBM3", 132, "9.0")


def launches(memory: list[torch.Tensor]) -> list[list]:
    """What was launched since the last time, comparable: a pointer becomes the first tensor of `memory` whose storage it points
    into, and how far; one that points into none is scratch, named in the order of appearance."""
    spans = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in memory]
    scratch: dict[int, int] = {}

    def pointer(value: int) -> tuple:
        for i, (start, size) in enumerate(spans):
            if start <= value < start + size:
                return i, value - start
        assert value % 16 == 0
        return "scratch", scratch.setdefault(value, len(scratch))

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(x) for x in value]
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if isinstance(value, int) and value > 1 << 40:
            return pointer(value)
        return None if type(value).__name__ in ("LazyDict", "HookChain") else value  # for hooks, and none is installed

    found = [plain(arguments) for arguments in made]
    made.clear()
    return found
