"""Facts about a device, asked once per device index and never assumed to be the same for another."""

import functools
from typing import NamedTuple

import torch
import triton


class Device(NamedTuple):
    name: str | None  # as the driver gives it; None where kernels run in Triton's interpreter
    sm_count: int
    capability: str | None  # "9.0"


INTERPRETED = Device(None, 8, None)  # 8: enough "SMs" that small tests are split


@functools.cache
def cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, properties.multi_processor_count, f"{properties.major}.{properties.minor}")


def device_of(tensor: torch.Tensor) -> Device:
    return cuda_device(tensor.device.index) if tensor.is_cuda else INTERPRETED


@functools.cache
def supports_pdl() -> bool:
    """Whether programmatic dependent launch works on the target: NVIDIA from sm_90 on."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90
