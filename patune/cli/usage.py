"""Which GPUs other programs are using, as the driver tells."""

import shutil
import subprocess
import time

BUSY_PERCENT = 10  # of the time with a kernel running
SECOND_LOOK_S = 1.0  # later: a program that starts or has just ended keeps a GPU busy for a moment
BUSY_MIB = 1024  # of memory in use: more than the driver takes for itself, less than any model


def has_driver() -> bool:
    """Whether there is an NVIDIA driver to ask."""
    return shutil.which("nvidia-smi") is not None


def busy_gpus() -> dict[int, str]:
    """Index, as torch counts -> what it is busy with; empty where the driver does not tell."""
    used = _used()
    if any(percent >= BUSY_PERCENT for percent, _ in used.values()):
        time.sleep(SECOND_LOOK_S)
        again = _used()
        used = {uuid: (min(percent, again.get(uuid, (0, 0))[0]), mib) for uuid, (percent, mib) in used.items()}
    if not used:
        return {}
    import torch

    busy = {}
    for index in range(torch.cuda.device_count()):
        percent, mib = used.get(str(torch.cuda.get_device_properties(index).uuid), (0, 0))
        if percent >= BUSY_PERCENT or mib >= BUSY_MIB:
            busy[index] = f"{percent}% in use, {mib / 1024:.1f} GiB of its memory taken"
    return busy


def _used() -> dict[str, tuple[int, int]]:
    """UUID -> percent of the time with a kernel running, and MiB in use."""
    query = ["nvidia-smi", "--query-gpu=uuid,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        rows = [line.split(", ") for line in lines]
        return {uuid.removeprefix("GPU-"): (int(percent), int(mib)) for uuid, percent, mib in rows}
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or one that answers [N/A]
        return {}
