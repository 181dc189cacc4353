"""Run as a program, without TRITON_INTERPRET: compiles one config of "prefill_hopper" for sm_90; what it found as JSON on stdout.

In, as arguments: head_dim, page_size, then the config as JSON. A process each: an assertion in the compiler ends Python.
"""

import json
import re
import subprocess
import sys
import tempfile

from triton import knobs
from triton.runtime import driver

from patune.kernels.registry import template
from patune.tuner.compile import _NoGpu
from patune.workload import Key, Workload


def main() -> None:
    head_dim, page_size, config = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    driver.set_active(_NoGpu("9.0"))
    key = Key("prefill_hopper", "", 132, head_dim, page_size, 4)
    problem = template(key.kernel).problem(key, Workload(4, 4096, 512), device="meta")
    (launch,) = problem.launches(config)
    kernel = launch.warmup()
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    json.dump(
        {
            "shared_bytes": kernel.metadata.shared,
            "spill_bytes": [int(n) for n in re.findall(r"(\d+) bytes spill", log)],
            "serialized": re.findall(r"C75\d\d", log),
            "registers": sorted({int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}),
            "wgmma": ptx.count("wgmma.mma_async"),
            "boxes": ptx.count("cp.async.bulk.tensor"),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
