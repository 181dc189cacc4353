"""Where the times of `patune run --gpu NAME` come from: the GPUs that are here, or the landscape recorded on one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cachedb import landscape
from ..cachedb.landscape import Landscape
from ..errors import PatuneError, UsageError
from . import gpus, usage
from .options import AUTO


@dataclass(frozen=True, slots=True)
class Source:
    landscape: Landscape | None  # to replay; None to measure
    devices: tuple[int, ...]  # to measure on
    said: tuple[str, ...]  # lines for people, the first says which of the two it is


def choose(name: str, devices: tuple[int, ...] | None, replay: str | None) -> Source:
    """`name` is a short name or "auto"; `devices` the indices of the GPUs to use, None for all that are idle; `replay` a
    landscape file, "" for the one that ships with patune, None to replay only where no GPU is visible.
    """
    if replay is not None and devices is not None:
        raise UsageError("--devices: a replay runs on no device, leave out one of --devices and --replay")
    if replay is None and usage.has_driver():
        from ..tuner import server

        server.start()  # it loads what this process loads next, at the same time
    busy = usage.busy_gpus() if replay is None else {}  # before anything here is on a GPU
    here = visible_gpus() if replay is None or name == AUTO else []
    if devices is not None and max(devices) >= len(here):
        raise UsageError(f"--devices: there is no device {max(devices)}, torch sees {len(here)}")
    if name == AUTO and not here:
        raise UsageError(f"--gpu: auto needs a GPU and none is visible, name the one to tune for: {', '.join(gpus.GPUS)}")
    if replay is None and here:
        return _measure(name, here, devices, busy)
    recorded = _landscape(here[0] if here else name, replay)
    of = recorded.environment.gpu
    if of not in here[:1] and (name == AUTO or not gpus.is_a(of, name)):
        raise UsageError(f"--replay: that landscape was recorded on {of}, not on {here[0] if here else name}")
    why = "no GPU visible: " if replay is None else ""
    when = recorded.recorded[:10]
    said = [f"{why}replaying the landscape recorded on {of}, {when} (nothing is measured now)"]
    if changed := _changed(recorded):
        said.append(f"{', '.join(changed)}: the kernel has changed since it was recorded, what wins here may not win today")
    return Source(recorded, (), tuple(said))


def _changed(recorded: Landscape) -> list[str]:
    """Kernels of the landscape whose source is not today's."""
    from ..kernels.registry import template

    return sorted({key.kernel for key in recorded.keys() if recorded.source_hash(key) != template(key.kernel).source_hash})


def visible_gpus() -> list[str]:
    """Names of the GPUs that torch can use, by device index."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _measure(name: str, here: Sequence[str], wanted: tuple[int, ...] | None, busy: Mapping[int, str]) -> Source:
    """All the devices of one model that are idle, or those that were asked for."""
    considered = range(len(here)) if wanted is None else wanted
    idle = [i for i in considered if i not in busy]
    model = here[(idle or considered)[0]]
    if name != AUTO:
        model = next((here[i] for i in [*idle, *considered] if gpus.is_a(here[i], name)), model)
        if not gpus.is_a(model, name):
            raise UsageError(f"--gpu: {name} was asked for but the GPU here is {model}: use auto for it, or add --replay")
    if wanted is not None and (other := next((i for i in wanted if here[i] != model), None)) is not None:
        raise UsageError(f"--devices: device {other} is {here[other]}, not {model}: tune one model at a time")
    same = [i for i in considered if here[i] == model]
    chosen = same if wanted is not None else [i for i in same if i in idle] or same[:1]
    said = [f"measuring on {model}" if len(chosen) == 1 else f"measuring on {len(chosen)} x {model}"]
    for i in same:
        if i in busy:
            what = "its times will be unsteady" if i in chosen else "left out"
            said.append(f"device {i} is busy ({busy[i]}): {what}")
    return Source(None, tuple(chosen), tuple(said))


def shipped_landscapes() -> list[Path]:
    return sorted(landscape.SHIPPED_TABLES.glob(f"*{landscape.SUFFIX}"))


def cuda_name(device: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls the device that has this index here."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[device] if named else str(device)


def _landscape(gpu: str, replay: str | None) -> Landscape:
    path = Path(replay) if replay else landscape.shipped(gpu)
    if path is None:
        there = ", ".join(path.name.removesuffix(landscape.SUFFIX) for path in shipped_landscapes()) or "none"
        raise PatuneError(
            f"no landscape of {gpu} ships with patune (there is: {there}): run this on that GPU, or give --replay FILE"
        )
    return landscape.load(path)
