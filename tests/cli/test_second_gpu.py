"""With tables of two GPUs of as many SMs, each takes, replays, shows and exports its own.

Two tables and landscapes are made as those that ship are, by recording and by tools/ship_table.py, from times of a formula.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import patune as package
from patune.cachedb.landscape import load
from patune.cachedb.store import Store
from patune.cachedb.trial import Trial
from patune.kernels.registry import template
from patune.tuner.record import record
from patune.tuner.space import valid_points
from patune.workload import Workload

from .recording import H100, KEY, WHEN

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import figures
from transfer import losses, table_of

TOOLS = Path(figures.__file__).parent
H200 = replace(H100, gpu="NVIDIA H200")
BEST = {"h100": {"BLOCK_T": 4, "num_warps": 4}, "h200": {"BLOCK_T": 2, "num_warps": 2}}
WORKLOAD = Workload(8, 4096)
APPEND = dict(head_dim=128, page_size=16, batch_size=8, kv_len=4096)


def formula_us(alias, config):
    return 5.0 + sum(abs(config[name] - value) for name, value in BEST[alias].items())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(TOOLS.parent)}
    for alias, environment in {"h100": H100, "h200": H200}.items():
        key, kernel = replace(KEY, gpu=environment.gpu), template(KEY.kernel)
        trials = [
            Trial(config, "ok", (formula_us(alias, config),) * 15, 0.0, source_hash=kernel.source_hash, when=WHEN)
            for config in valid_points(kernel, key, WORKLOAD)
        ]
        db = folder / f"{alias}-all.db"
        with Store.open(db) as store:
            ids = store.add_trials(key, WORKLOAD, environment, trials, "measured")
            best = min(range(len(trials)), key=lambda i: trials[i].us)
            default_us = formula_us(alias, kernel.default(key, WORKLOAD))
            store.set_config(key, WORKLOAD, ids[best], default_us, len(trials), "measured")
            record(store, folder / f"{alias}.landscape.json.gz", "0" * 40)
        command = [sys.executable, str(TOOLS / "ship_table.py"), str(folder / f"{alias}.db"), str(db)]
        subprocess.run(command, env=env, check=True, timeout=300)
        db.unlink()
    return folder


@pytest.fixture(autouse=True)
def both(made, shipped) -> Path:
    shutil.copytree(made, shipped, dirs_exist_ok=True)
    return shipped


@pytest.mark.parametrize("alias", BEST)
def test_a_call_takes_the_config_of_the_gpu_that_it_runs_on(patune, alias):
    args = [word for name, value in APPEND.items() for word in (f"--{name.replace('_', '-')}", value)]
    answer = json.loads(patune("lookup", "--kernel", "append", "--gpu", alias, "--json", *args).stdout)
    assert (answer["config"], answer["source"]) == (BEST[alias], "measured")


@pytest.mark.parametrize(("device_name", "of"), [("NVIDIA H100 NVL", "h100"), ("NVIDIA H200 NVL", "h200")])
def test_another_board_takes_the_config_of_its_model(device_name, of):
    config = package.get_best_config("append", device_name=device_name, sm_count=132, **APPEND)
    assert (dict(config), config.source) == (BEST[of], "transferred")


@pytest.mark.parametrize("alias", BEST)
def test_a_gpu_replays_and_shows_its_own_landscape(patune, alias, db):
    document = json.loads(patune("run", "--gpu", alias, "--kernel", "append", "--trials", "all", "--json", "--db", db).stdout)
    (found,) = document["keys"][0]["workloads"]
    assert document["gpu"] == {"h100": H100, "h200": H200}[alias].gpu
    assert (found["config"], found["regret"]) == (BEST[alias], 0)
    (shown,) = json.loads(patune("show", "--gpu", alias, "--json").stdout)["keys"]
    assert shown["workloads"][0]["config"] == BEST[alias]


def test_doctor_lists_both(patune):
    lines = patune("doctor").stdout.splitlines()
    for alias, gpu in {"h100": H100.gpu, "h200": H200.gpu}.items():
        assert f"shipped: {alias}.db, 1 configs" in lines
        assert f"shipped: {alias}.landscape.json.gz, 1 keys on {gpu}, 2026-11-22" in lines


def test_an_exported_module_answers_for_both(patune, tmp_path):
    assert patune("export", "--to", "python", "--out", tmp_path / "table.py").exit_code == 0
    spec = importlib.util.spec_from_file_location("table_of_two_gpus", tmp_path / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (H100.gpu, H200.gpu, "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", None):
        mine = module.get_best_config("append", device_name=name, sm_count=132, **APPEND)
        theirs = package.get_best_config("append", device_name=name, sm_count=132, **APPEND)
        assert (dict(mine), mine.source, mine.provenance) == (dict(theirs), theirs.source, theirs.provenance)


@pytest.mark.parametrize(("args", "of"), [((), ["h100", "h200"]), (("--gpu", "h200"), ["h200"])])
def test_exported_files_are_each_of_one_gpu(patune, tmp_path, args, of):
    patune("export", "--to", "json", "--out", tmp_path / "out", *args)
    configs = [json.loads(path.read_text())[f"batch_size=8,kv_heads=8,q_len=1,kv_len={WORKLOAD.kv_len}"]
               for path in sorted((tmp_path / "out").iterdir())]  # fmt: skip
    assert configs == [BEST[alias] for alias in of]


def test_a_table_loses_nothing_where_it_was_made_and_elsewhere_what_its_config_takes_there(both):
    for table in BEST:
        for alias in BEST:
            (loss,) = losses(table_of(both / f"{table}.db"), load(both / f"{alias}.landscape.json.gz"))
            assert (loss.us, loss.best_us) == (formula_us(alias, BEST[table]), 5.0)


def test_the_pages_have_a_section_for_every_gpu_but_the_first(both, tmp_path, monkeypatch):
    folders = [tmp_path / alias for alias in BEST]
    for folder in folders:
        folder.mkdir()
        (folder / "table.db").symlink_to(both / f"{folder.name}.db")
        (folder / "landscape.json.gz").symlink_to(both / f"{folder.name}.landscape.json.gz")
        (folder / "provenance.json").write_text('{"runs": []}')
    monkeypatch.setattr(figures, "GPUS", tuple(folders))
    lines = figures.other_gpus().splitlines()
    assert lines[0] == f"## {H200.gpu}"
    elsewhere, rule = formula_us("h200", BEST["h100"]) / 5, formula_us("h200", template("append").default(KEY, WORKLOAD)) / 5
    assert lines[-1] == f"| all | 1 | ×1.000 (×1.00) | ×{elsewhere:.3f} (×{elsewhere:.2f}) | ×{rule:.3f} (×{rule:.2f}) |"
    assert len(figures.landscape_lines().splitlines()) == 2 + len(folders)
