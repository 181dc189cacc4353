"""Run as a program, without TRITON_INTERPRET: compiles one config of a template for Hopper; what it found as JSON on stdout.

In, as JSON arguments: fields of the Key, of the Workload, and the config. A process each: an assertion in the compiler ends Python.
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
    fields, sizes, config = map(json.loads, sys.argv[1:])
    driver.set_active(_NoGpu("9.0"))
    key = Key(gpu="", sm_count=132, **fields)
    problem = template(key.kernel).problem(key, Workload(**sizes), device="meta")
    (launch,) = [launch for launch in problem.launches(config) if launch.fn.__name__.endswith("_hopper")]
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
            "static_shared_bytes": sum(map(int, re.findall(r"(\d+) bytes smem", log))),
            "threads": kernel.metadata.num_warps * 32,
            "used_registers": int(re.findall(r"Used (\d+) registers", log)[0]),
            "spill_bytes": [int(n) for n in re.findall(r"(\d+) bytes spill", log)],
            "serialized": re.findall(r"C75\d\d", log),
            "registers": sorted({int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}),
            "wgmma": ptx.count("wgmma.mma_async"),
            "entered_by": ptx.count("barrier.cluster.arrive"),
            "boxes": ptx.count("cp.async.bulk.tensor"),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
