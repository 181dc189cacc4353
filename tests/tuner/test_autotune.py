"""triton.autotune gets what `patune run` gets: the same configs, and every launch of a call."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patune.kernels.registry import template
from patune.tuner.space import valid_points
from patune.tuner.workloads import standard_workloads
from patune.workload import Key, Workload
from tests.tuner.templates import KEY, TOY

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from autotune import Call, TimeIsUp, autotuned, kernel_summary, turns

WORKLOADS = [Workload(1, 64), Workload(1, 128)]
VALID = [(block, warps) for block in TOY.tunables["BLOCK"] for warps in TOY.tunables["num_warps"]]
BEST = (32, 2)


def made(ends: float = float("inf")) -> tuple[Call, list[tuple[int, int]]]:
    """A call whose time is a formula's, and what was evaluated."""
    evaluated: list[tuple[int, int]] = []

    def benchmark(call, quantiles):
        call()
        at = subject._prepared[1]["BLOCK"], subject._prepared[1]["num_warps"]
        evaluated.append(at)
        return [float(at != BEST)] * len(quantiles)

    compiled = lambda launches: {(launch.args["BLOCK"], launch.args["num_warps"]) for launch in launches}  # were it not interpreted
    subject = Call(KEY, device="cpu", ends=ends, benchmark=benchmark, kernels=compiled)
    return subject, evaluated


def test_every_valid_config_of_every_workload_is_evaluated_once_and_the_fastest_runs():
    subject, evaluated = made()
    tuner = autotuned(subject, WORKLOADS)
    for workload in [*WORKLOADS, *WORKLOADS]:
        subject.problem(workload).poison()
        tuner[None](workload)
        assert (tuner.best_config.kwargs["BLOCK"], tuner.best_config.num_warps) == BEST
        assert subject.problem(workload).error() == 0
    assert sorted(evaluated) == sorted(2 * VALID)
    assert [e.workload for e in subject.log] == [w for w in WORKLOADS for _ in VALID]


def test_after_its_time_nothing_is_evaluated_and_what_is_left_is_estimated_only_from_what_was_measured():
    subject, evaluated = made(ends=time.monotonic() - 1)
    with pytest.raises(TimeIsUp):
        autotuned(subject, WORKLOADS)[None](WORKLOADS[0])
    assert evaluated == []
    assert kernel_summary(subject, WORKLOADS)["extrapolated_rest_s"] is None


def test_the_estimate_is_nothing_for_a_space_that_was_evaluated_and_takes_later_evaluations_for_a_workload_that_was_not():
    subject, _ = made()
    autotuned(subject, WORKLOADS)[None](WORKLOADS[0])
    one = kernel_summary(subject, WORKLOADS[:1])
    assert (one["evaluations"], one["of"], one["compiled"], one["extrapolated_rest_s"]) == (9, 9, 9, 0)
    assert kernel_summary(subject, WORKLOADS)["extrapolated_rest_s"] is None  # no evaluation yet without compiling
    autotuned(subject, WORKLOADS)[None](WORKLOADS[1])
    later = kernel_summary(subject, [*WORKLOADS, Workload(1, 32)])
    assert later["extrapolated_rest_s"] == pytest.approx(9 * later["median_s_without"])


def test_where_every_evaluation_compiled_one_is_repeated_for_the_rate_of_the_others():
    subject, evaluated = made()
    autotuned(subject, WORKLOADS)[None](WORKLOADS[0])
    log = [*subject.log]
    subject.repeat()
    assert subject.log == log and len(evaluated) == len(log) + 1
    summary = kernel_summary(subject, WORKLOADS)
    assert summary["median_s_without"] == subject.repeated_s
    assert summary["extrapolated_rest_s"] == pytest.approx(9 * subject.repeated_s)


def test_small_spaces_come_first():
    """What they leave of their time is the others', whose variants compile for long."""
    keys = [Key(kernel, "", 132, 128, 16, group) for kernel, group in (("decode", 4), ("prefill_hopper", 4), ("append", 1))]
    standard = lambda key: standard_workloads(key.kernel.split("_")[0], 8)
    order = turns({key: standard(key) for key in keys})
    size = lambda key, workload: len(valid_points(template(key.kernel), key, workload))
    assert [key.kernel for key, _ in order] == ["append", "prefill_hopper", "decode"]
    for key, workloads in order:
        assert sorted(workloads) == sorted(standard(key))
        assert [size(key, w) for w in workloads] == sorted(size(key, w) for w in workloads)


COUNT = """
import json
from triton.runtime import driver
from patune.tuner.compile import _NoGpu
driver.set_active(_NoGpu("9.0"))
from autotune import compiled_kernels
from patune.kernels.registry import template
from patune.workload import Key, Workload
kernel = template("prefill")
problem = kernel.problem(Key("prefill", "", 132, 128, 16, 4), Workload(1, 4096, 64), device="meta", sets=1)
config = kernel.default(Key("prefill", "", 132, 128, 16, 4), Workload(1, 4096, 64))
found = [compiled_kernels(problem.launches(config | {"num_splits": n})) for n in (1, 1, 3, 4, 8)]
print(json.dumps([len(found[0]), len(found[2]), len(set().union(*found)), found[0] == found[1], found[2] == found[3]]))
"""


def test_a_kernel_is_counted_as_triton_tells_it_from_others():
    """Without splits one of its own; with 3 or 4 the same two; with 8 another one that joins them."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COUNT], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 2, 4, True, True]
