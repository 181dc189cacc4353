"""Where the times of `patune run --gpu NAME` come from: the GPU that is here, or the landscape recorded on one."""

import os
from pathlib import Path

from ..cachedb import landscape
from ..cachedb.landscape import Landscape
from ..errors import PatuneError, UsageError
from . import gpus
from .options import AUTO


def choose(name: str, device: int | None, replay: str | None) -> tuple[Landscape | None, str]:
    """The landscape to replay, or None to measure on this machine; and the line that says which.

    `name` is a short name or "auto"; `device` the index of the GPU to use; `replay` a landscape file, "" for the one that
    ships with patune, None to replay only where no GPU is visible.
    """
    if replay is not None and device is not None:
        raise UsageError("--devices: a replay runs on no device, leave out one of --devices and --replay")
    here = _visible_gpu(device) if replay is None or name == AUTO else None
    if name == AUTO and here is None:
        raise UsageError(f"--gpu: auto needs a GPU and none is visible, name the one to tune for: {', '.join(gpus.GPUS)}")
    if replay is None and here is not None:
        if name != AUTO and not gpus.is_a(here, name):
            raise UsageError(f"--gpu: {name} was asked for but the GPU here is {here}: use auto for it, or add --replay")
        if device is not None:
            _use_only(device)
        return None, f"measuring on {here}"
    recorded = _landscape(here or name, replay)
    of = recorded.environment.gpu
    if of != here and (name == AUTO or not gpus.is_a(of, name)):
        raise UsageError(f"--replay: that landscape was recorded on {of}, not on {here or name}")
    why = "no GPU visible: " if replay is None else ""
    when = recorded.recorded[:10]
    return recorded, f"{why}replaying the landscape recorded on {of}, {when} (nothing is measured now)"


def visible_gpus() -> list[str]:
    """Names of the GPUs that torch can use, by device index."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def shipped_landscapes() -> list[Path]:
    return sorted(landscape.SHIPPED_TABLES.glob(f"*{landscape.SUFFIX}"))


def _visible_gpu(device: int | None) -> str | None:
    names = visible_gpus()
    if device is not None and device >= len(names):
        raise UsageError(f"--devices: there is no device {device}, torch sees {len(names)}")
    return names[device or 0] if names else None


def _use_only(device: int) -> None:
    """Let processes that start from now on, the measuring one among them, see this device alone."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = named.split(",")[device] if named else str(device)


def _landscape(gpu: str, replay: str | None) -> Landscape:
    path = Path(replay) if replay else landscape.shipped(gpu)
    if path is None:
        there = ", ".join(path.name.removesuffix(landscape.SUFFIX) for path in shipped_landscapes()) or "none"
        raise PatuneError(
            f"no landscape of {gpu} ships with patune (there is: {there}): run this on that GPU, or give --replay FILE"
        )
    return landscape.load(path)
