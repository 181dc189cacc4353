"""Run as a program, without TRITON_INTERPRET: compiles configs for GPUs that are not there; builds as JSON on stdout.

In, on stdin: [[capability, key fields, workload fields, config or null for the default], ...]. Out, in the same order: the fields
of patune.tuner.compile.Build.
"""

import dataclasses
import json
import os
import subprocess
import sys

from patune.kernels.registry import template
from patune.tuner.compile import CompilePool
from patune.workload import Key, Workload


def compile_all(jobs: list[list]) -> list[dict]:
    """What this program answers, asked from a process that has TRITON_INTERPRET set."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(jobs), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    pools: dict[str, CompilePool] = {}
    jobs = []
    for capability, key_fields, workload_fields, config in json.load(sys.stdin):
        key, workload = Key(**key_fields), Workload(**workload_fields)
        config = config or template(key.kernel).default(key, workload)
        pool = pools.setdefault(capability, CompilePool(capability, workers=2))
        pool.submit(key, workload, [config])
        jobs.append((pool, key, workload, config))
    json.dump([dataclasses.asdict(pool.build(key, workload, config)) for pool, key, workload, config in jobs], sys.stdout)
    for pool in pools.values():
        pool.close()


if __name__ == "__main__":
    main()
