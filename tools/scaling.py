"""How many times the trials a second several GPUs of a host make of one: the same run on one, then on all, on a GPU host.

    python tools/scaling.py OUT.json [--devices 0,1] [--model llama-3.1-8b] [--kernel all] [--trials 64]

A first run, which is not counted, fills Triton's cache, so that compilers do not decide. Each run has a database of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def run(args: argparse.Namespace, devices: str, folder: str) -> dict:
    command = [sys.executable, "-m", "patune", "run", "--gpu", "auto", "--kernel", args.kernel, "--trials", args.trials, "--json"]
    command += ["--devices", devices, "--db", str(Path(folder) / f"{devices.replace(',', '-')}-{time.monotonic_ns()}.db")]
    command += ["--model", args.model] if args.model else []
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        sys.exit(done.stderr)
    trials = sum(row["evaluations"] for part in json.loads(done.stdout)["keys"] for row in part["workloads"])
    found = {"devices": devices, "seconds": round(seconds, 2), "trials": trials, "trials_per_s": round(trials / seconds, 2)}
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", default=",".join(map(str, range(torch.cuda.device_count()))))
    parser.add_argument("--model")
    parser.add_argument("--kernel", default="all")
    parser.add_argument("--trials", default="64")
    args = parser.parse_args()
    first = args.devices.split(",")[0]
    with tempfile.TemporaryDirectory() as folder:
        run(args, args.devices, folder)
        one, many = (run(args, devices, folder) for devices in (first, args.devices))
    n = len(args.devices.split(","))
    scaling = many["trials_per_s"] / one["trials_per_s"]
    print(f"{n} GPUs make {scaling:.2f} times the trials a second of one, {scaling / n:.0%} of {n}")
    document = {"gpu": torch.cuda.get_device_name(0), "one": one, "many": many, "scaling": scaling}
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
