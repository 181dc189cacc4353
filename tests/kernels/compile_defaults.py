"""Run as a program, without TRITON_INTERPRET: compiles the default config of each key given on stdin; builds as JSON on stdout.

In: [[capability, [key fields]], ...]. Out, in the same order: the fields of patune.tuner.compile.Build.
"""

import dataclasses
import json
import sys

from patune.kernels.registry import template
from patune.tuner.compile import CompilePool
from patune.workload import Key, Workload


def main() -> None:
    pools: dict[str, CompilePool] = {}
    jobs = []
    for capability, fields in json.load(sys.stdin):
        key = Key(**fields)
        workload = Workload(4, 4096, 512 if key.kernel == "prefill" else 1)
        config = template(key.kernel).default(key, workload)
        pool = pools.setdefault(capability, CompilePool(capability, workers=2))
        pool.submit(key, workload, [config])
        jobs.append((pool, key, workload, config))
    json.dump([dataclasses.asdict(pool.build(key, workload, config)) for pool, key, workload, config in jobs], sys.stdout)
    for pool in pools.values():
        pool.close()


if __name__ == "__main__":
    main()
