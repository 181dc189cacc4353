"""Measure a commit on a GPU host: tests, races against peers and triton.autotune, the main job. It all lands in one folder.

    python tools/measure.py OUT --commit HASH [--record [NAMES]] [--referee REFEREE.py --peers DIR] [--skip tests | --only mixed]

OUT/provenance.json says what was measured on what, a list of runs, of which this is a further one; the other files are the tools'
own output. A step that fails or runs out of time is named in the provenance, and the others still run. Where OUT has a recording,
the races take their configs from it, and from the tables that ship what it does not have.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from turns import CASES

from patune.cli.plan import KERNELS
from patune.kernels.registry import NAMES, template
from patune.tuner.timing import clock
from patune.tuner.worker import environment_of

ROOT = Path(__file__).parent.parent
MODEL = "llama-3.1-8b"
PLANTED = "tests/gpu/test_planted_failures.py"
RECORDED = "landscape.db"


def steps(out: Path, args: argparse.Namespace) -> dict[str, tuple[list[str], str, int]]:
    """Step -> (command, the file that takes its stdout, seconds it may take)."""
    tune = [sys.executable, "-m", "patune", "run", "--gpu", args.gpu, "--model", MODEL, "--json", "--db"]
    race = [sys.executable, str(args.referee), "--peers", str(args.peers), "--candidate", str(ROOT / "tools/candidate.py")]
    plain = [*race[:-1], str(ROOT / "tools/candidate_plain.py")]
    of = lambda peers, name: ["--only", peers, "--out", str(out / f"{name}.json")]
    turns = out / "turns.json"
    turns.write_text(json.dumps(CASES))
    agreement = [sys.executable, str(ROOT / "tools/agreement.py"), "--race", str(out / "run.json"), str(out / "run-other.json")]
    autotune = [sys.executable, str(ROOT / "tools/autotune.py"), str(out / "autotune.json"), "--run", str(out / "run.json")]
    autotune += ["--gpu", args.gpu, "--model", MODEL]
    mixed = [sys.executable, str(ROOT / "tools/mixed.py"), str(out / "mixed.json")]
    # -v: a run that is cut short has named what failed
    tests = [sys.executable, "-m", "pytest", "-v", "-rs", "--durations=5", "-p", "no:cacheprovider"]
    parallel = [f"--ignore={PLANTED}", "-n", str(args.workers), "--dist", "worksteal"]
    return {
        "tests": ([*tests, "tests/gpu", "tests/kernels", *parallel], "tests.txt", 240),
        "planted": ([*tests, PLANTED], "planted.txt", 120),  # alone: it hangs the GPU for others
        "referee-decode": ([*race, "decode", "--out", str(out / "referee-decode.json")], "referee-decode.txt", 260),
        "referee-prefill": ([*race, "prefill", *of(args.prefill_peers, "referee-prefill")], "referee-prefill.txt", 330),
        "referee-plain": ([*plain, "prefill", *of(args.prefill_peers, "referee-plain")], "referee-plain.txt", 120),
        "referee-turns": ([*race, "prefill", "--cases", str(turns), *of("fa3", "referee-turns")], "referee-turns.txt", 120),
        "autotune": ([*autotune, "--seconds", "60", "--commit", args.commit], "autotune.txt", 300),  # the main job first
        "run-other": ([*tune, str(out / "run-other.db"), "--seed", "1"], "run-other.json", 120),
        "run-agreement": (agreement, "run-agreement.txt", 60),
        "mixed": ([*mixed, "--commit", args.commit], "mixed.txt", 180),
    }


def recording(out: Path, gpu: str, names: list[str]) -> dict[str, tuple[list[str], str, int]]:
    """The steps that measure every valid config of the standard workloads, of these kernels or of single templates of theirs, and
    leave the landscape and the packed database."""
    patune, db = [sys.executable, "-m", "patune"], str(out / RECORDED)
    tune = [*patune, "run", "--gpu", gpu, "--trials", "all", "--db", db, "--json", "--kernel"]
    steps = {f"tune-{name.replace('_', '-')}": ([*tune, name], f"tuned-{name}.json", 400) for name in names}
    export = [*patune, "export", "--to", "landscape", "--db", db, "--out", str(out / "landscape.json.gz")]
    return steps | {"landscape": (export, "landscape.txt", 60), "pack": ([sys.executable, "-m", "gzip", db], "pack.txt", 60)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True, help="the commit that is measured")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--referee", type=Path, help="the referee's script")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--prefill-peers", default="fa3,flashinfer", help="the others are 3 to 10 times slower and take minutes")
    every = "measure every valid config too, 6 minutes on an H100; of these comma-separated kernels or templates, else of all"
    parser.add_argument("--record", nargs="?", const=",".join(KERNELS), metavar="NAMES", help=every)
    parser.add_argument("--workers", type=int, default=14, help="of the tests")
    parser.add_argument("--skip", default="", help="comma-separated beginnings of step names")
    parser.add_argument("--only", default="", help="the same, of the steps to take")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = environment_of(clock())
    provenance = args.out / "provenance.json"
    runs = json.loads(provenance.read_text())["runs"] if provenance.exists() else []
    run: dict = {
        "gpu": environment.gpu, "sm_count": environment.sm_count, "driver": environment.driver, "triton": environment.triton,
        "torch": environment.torch, "commit": args.commit, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source_hash": {name: template(name).source_hash for name in NAMES}, "steps": {},
    }  # fmt: skip
    skipped = tuple(name for name in args.skip.split(",") if name) + (() if args.referee else ("referee",))
    todo = (recording(args.out, args.gpu, args.record.split(",")) if args.record else {}) | steps(args.out, args)
    for name, (command, stdout, limit_s) in todo.items():
        if name.startswith(tuple(args.only.split(","))) and not name.startswith(skipped):
            recorded = args.out / RECORDED
            fresh = {"PATUNE_DB": str(recorded)} if name.startswith(("referee", "mixed")) and recorded.exists() else {}
            run["steps"][name] = outcome = _run(command, args.out / stdout, limit_s, os.environ | fresh)
            print(f"{name}: {outcome}", flush=True)
            provenance.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n")


def _run(command: list[str], stdout: Path, limit_s: int, env: dict[str, str]) -> dict:
    started = time.monotonic()
    with stdout.open("w") as file:
        try:
            status: int | str = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT if stdout.suffix == ".txt" else None,
                                               timeout=limit_s, cwd=ROOT, env=env, check=False).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s} s"
    return {"exit_status": status, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
