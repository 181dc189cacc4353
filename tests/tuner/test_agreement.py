"""Two tunings of one GPU agree, though their times scatter as they did when they were recorded."""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from patune.cachedb import landscape
from patune.workload import Key, Workload

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import agreement
from agreement import SHARE, disagreements, searched

H100 = landscape.load(landscape.shipped("h100"))


@pytest.fixture(scope="module")
def tunings():
    return [searched(H100, H100.keys(), seed) for seed in (1, 2)]


def test_two_tunings_agree_within_1_percent_on_95_percent_of_the_workloads(tunings):
    first, second = tunings
    assert len(first) == sum(len(H100.workloads(key)) for key in H100.keys())
    assert len(disagreements(first, second)) <= (1 - SHARE) * len(first)


def test_no_workload_is_slower_than_its_default_by_more_than_the_noise(tunings):
    """By the recorded times of what was chosen. The clock may step within a race, and leaves the medians of level configs on either
    side: then they are level round by round or, timed in different races, in their fastest rounds."""
    for found in tunings:
        for (key, workload), (config, us) in found.items():
            chosen, default = (
                H100.trials(key, workload)[tuple(values[name] for name in H100.tunables(key))]
                for values in (config, H100.default(key, workload))
            )
            slower = us / default.us
            if len(chosen.samples_us) == len(default.samples_us):  # of one race
                slower = min(slower, statistics.geometric_mean(a / b for a, b in zip(chosen.samples_us, default.samples_us)))
            else:
                slower = min(slower, min(chosen.samples_us) / min(default.samples_us))
            assert slower <= 1.01


def test_a_disagreement_is_another_config_of_another_time():
    at, one, other = (Key("decode", "a", 1, 64, 16, 4), Workload(1, 64)), {"N": 1}, {"N": 2}
    assert disagreements({at: (one, 10.0)}, {at: (one, 20.0)}) == []
    assert disagreements({at: (one, 10.0)}, {at: (other, 10.09)}) == []
    assert disagreements({at: (one, 10.0)}, {at: (other, 10.2)}) == ["decode B1 L64: {'N': 1} 10.00 us, {'N': 2} 10.20 us"]
    assert disagreements({at: (one, 10.0)}, {}) == ["decode B1 L64: only in one"]


def test_each_template_of_a_kernel_counts(tmp_path):
    """Two documents of `patune run --json` with one workload of two templates, one of which differs."""

    def document(name, hopper_us):
        parts = []
        for kernel, config, us in (("prefill", {"N": 1}, 10.0), ("prefill_hopper", {"N": hopper_us}, hopper_us)):
            key, workload = Key(kernel, "a", 1, 64, 16, 4), Workload(1, 64, 64)
            row = {"workload": asdict(workload), "config": config, "us": us}
            parts.append({"key": asdict(key), "workloads": [row]})
        path = tmp_path / name
        path.write_text(json.dumps({"keys": parts}))
        return str(path)

    command = [sys.executable, agreement.__file__, document("a.json", 8), document("b.json", 9)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    differs, *counts, last = done.stdout.splitlines()
    assert differs == "prefill_hopper B1 q64 L64: {'N': 8} 8.00 us, {'N': 9} 9.00 us"
    assert sorted(counts) == ["prefill: 1 of 1", "prefill_hopper: 0 of 1"]
    assert last.startswith("1 of 2 workloads agree")
