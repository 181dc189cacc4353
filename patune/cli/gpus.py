"""GPUs that a table can be for, by the short names of the command line."""

from dataclasses import dataclass

from ..cachedb.match import ARCHITECTURES, name_words
from ..errors import UsageError


@dataclass(frozen=True, slots=True)
class Gpu:
    alias: str
    name: str  # as the driver gives it for the SXM board
    sm_count: int

    @property
    def capability(self) -> str:
        return ARCHITECTURES[self.alias]


GPUS = {
    gpu.alias: gpu
    for gpu in (
        Gpu("a100", "NVIDIA A100-SXM4-80GB", 108),
        Gpu("l40s", "NVIDIA L40S", 142),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 132),
        Gpu("h200", "NVIDIA H200", 132),
        Gpu("gh200", "NVIDIA GH200 480GB", 132),
        Gpu("b200", "NVIDIA B200", 148),
    )
}


def gpu(alias: str) -> Gpu:
    """The GPU of that short name; UsageError names the known ones."""
    if alias.lower() not in GPUS:
        raise UsageError(f"--gpu: {alias!r} is unknown, use auto (the GPU that is there) or one of {', '.join(GPUS)}")
    return GPUS[alias.lower()]


def is_a(device_name: str, alias: str) -> bool:
    """Whether a device of that name is one of those that `alias` means, such as every H100 for "h100"."""
    return gpu(alias).alias in name_words(device_name)
