"""Workers that share a search through Optuna's storages lose no trial and count none twice, whatever happens to one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from patune.cachedb.store import Store
from patune.cachedb.trial import Environment
from patune.errors import PatuneError, UsageError
from patune.kernels.registry import template
from patune.tuner import storage
from patune.tuner.shared import QUEUE
from patune.tuner.space import valid_points
from patune.tuner.storage import connect
from patune.workload import Workload
from tests.tuner.postgres import missing, postgres

from .recording import BEST, KEY, record, right, wrong

PROGRAM = Path(__file__).with_name("shared_worker.py")
WORKLOADS = [Workload(1, 1024), Workload(2, 512), Workload(4, 4096), Workload(8, 4096), Workload(16, 64), Workload(32, 2048)]
POINTS = {tuple(config.values()) for config in valid_points(template("append"), KEY, WORKLOADS[0])}

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
needs_postgres = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def server():
    with postgres() as url:
        yield url


@pytest.fixture
def database(server, request) -> str:
    """A database of its own for every test."""
    import psycopg

    name = request.node.name.lower()
    with psycopg.connect(server.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.rsplit("/", 1)[0] + f"/{name}"


@pytest.fixture
def landscape(tmp_path) -> Path:
    return record(tmp_path / "six.gz", workloads=WORKLOADS)


def start(storage: str, db: Path, landscape: Path, *args: str, race_s: float = 0.5, grace_s: int = 4) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, str(PROGRAM), str(race_s), str(grace_s), "run", "--gpu", "h100", "--replay", str(landscape)]
    command += ["--trials", "all", "--json", "--storage", storage, "--db", str(db), *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(worker: subprocess.Popen) -> list[dict]:
    """The rows of its document."""
    stdout, stderr = worker.communicate(timeout=120)
    assert worker.returncode == 0, stderr
    return json.loads(stdout)["keys"][0]["workloads"]


def studies(url: str) -> tuple[optuna.Study, dict[str, list]]:
    """The queue and, by name, the trials of every workload."""
    storage = connect(url)
    names = [study.study_name for study in storage.get_all_studies()]
    (queue,) = (optuna.load_study(study_name=name, storage=storage) for name in names if name.startswith(QUEUE))
    return queue, {n: optuna.load_study(study_name=n, storage=storage).get_trials() for n in names if not n.startswith(QUEUE)}


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def told(url: str) -> int:
    """Trials that any worker has finished."""
    names = [study.study_name for study in connect(url).get_all_studies()]
    return sum(t.state in ENDED for name in names for t in optuna.load_study(study_name=name, storage=connect(url)).get_trials())


def measured(db: Path) -> Counter:
    """How often each config of each workload is in a database."""
    with Store.open(db) as store:
        return Counter((w, tuple(t.config.values())) for w in WORKLOADS for t in store.trials(KEY, w))


def check_whole(url: str, rows: list[dict]) -> None:
    """Every workload was finished once, and every config of it measured to its end once."""
    queue, by_workload = studies(url)
    complete = queue.get_trials(states=(TrialState.COMPLETE,))
    assert sorted(Workload(**trial.user_attrs["workload"]) for trial in complete) == sorted(WORKLOADS)
    assert not queue.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    assert sorted(Workload(**row["workload"]) for row in rows) == sorted(WORKLOADS)
    assert {(row["evaluations"], tuple(row["config"].values())) for row in rows} == {(len(POINTS), tuple(BEST.values()))}
    assert len(by_workload) == len(WORKLOADS)
    for trials in by_workload.values():
        ended = [tuple(t.params[n] for n in BEST) for t in trials if t.state in ENDED]
        assert sorted(ended) == sorted(POINTS)
        assert not [trial for trial in trials if trial.state == TrialState.RUNNING]


def kill_one_of_three(url: str, tmp_path: Path, landscape: Path) -> None:
    """Three workers, one of them killed in the middle of a race, after it has finished one."""
    dbs = [tmp_path / f"{name}.db" for name in "abc"]
    victim = start(url, dbs[0], landscape, race_s=1.5)
    wait_for(lambda: told(url) == 16)  # of the 17 configs of a workload
    others = [start(url, db, landscape) for db in dbs[1:]]
    time.sleep(0.5)  # into its next race
    victim.kill()
    rows = [row for worker in others for row in finish(worker)]
    check_whole(url, rows)
    queue, by_workload = studies(url)
    failed = [trial for trials in by_workload.values() for trial in trials if trial.state == TrialState.FAIL]
    assert len(failed) == 1  # the race that ran
    assert len(queue.get_trials(states=(TrialState.FAIL,))) == 1
    kept = sum((measured(db) for db in dbs[1:]), Counter())
    assert set(kept) == {(w, p) for w in WORKLOADS for p in POINTS}  # what the victim had measured was adopted


@needs_postgres
def test_postgres_loses_and_doubles_nothing_when_a_worker_is_killed(database, tmp_path, landscape):
    kill_one_of_three(database, tmp_path, landscape)


def test_a_journal_file_loses_and_doubles_nothing_when_a_worker_is_killed(tmp_path, landscape):
    kill_one_of_three(str(tmp_path / "search.journal"), tmp_path, landscape)


@needs_postgres
def test_a_database_that_goes_away_is_one_line_and_what_was_measured_is_kept(tmp_path, landscape):
    with postgres() as url:
        worker = start(url, tmp_path / "a.db", landscape, race_s=1.0)
        wait_for(lambda: told(url) == 16)
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == 1
    assert stderr.splitlines()[-1].startswith("patune: error: --storage: lost, what was measured is in --db: ")
    assert sum(measured(tmp_path / "a.db").values()) >= 16


@needs_postgres
def test_workers_behind_a_grpc_proxy_share_a_search(database, tmp_path, landscape):
    """They need no password of the database, and none of its drivers."""
    pytest.importorskip("grpc")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = "from sys import argv; from optuna.storages import *; from optuna.storages import get_storage; "
    serve += "run_grpc_proxy_server(get_storage(argv[1]), host='127.0.0.1', port=int(argv[2]))"
    proxy = subprocess.Popen([sys.executable, "-W", "ignore", "-c", serve, database, str(port)])
    try:
        workers = [start(f"grpc://127.0.0.1:{port}", tmp_path / f"{name}.db", landscape, race_s=0.1) for name in "ab"]
        check_whole(database, [row for worker in workers for row in finish(worker)])
    finally:
        proxy.kill()


def test_a_worker_that_was_silent_for_too_long_counts_nothing_more(tmp_path, landscape):
    """Stopped for longer than the grace, it finds its workload with another worker, says so, and goes on with the rest."""
    url = str(tmp_path / "search.journal")
    sleeper = start(url, tmp_path / "a.db", landscape, race_s=2.0, grace_s=3)
    wait_for(lambda: told(url) == 16)
    time.sleep(0.5)
    sleeper.send_signal(signal.SIGSTOP)
    other = start(url, tmp_path / "b.db", landscape, race_s=0.2, grace_s=3)
    rows = finish(other)
    sleeper.send_signal(signal.SIGCONT)
    stdout, stderr = sleeper.communicate(timeout=60)
    assert (sleeper.returncode, json.loads(stdout)["keys"][0]["workloads"]) == (1, [])
    assert "another worker has taken it over" in stderr
    check_whole(url, rows)


def test_ctrl_c_gives_back_what_a_worker_had(tmp_path, landscape):
    """The next worker does not wait until it is taken for dead, and measures only what is left."""
    url = str(tmp_path / "search.journal")
    first = start(url, tmp_path / "a.db", landscape, race_s=1.0, grace_s=1000)
    wait_for(lambda: told(url) == 16)
    time.sleep(0.3)
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=60)
    assert stderr.splitlines()[-1] == "patune: interrupted, what was measured is kept"
    check_whole(url, finish(start(url, tmp_path / "b.db", landscape, race_s=0.1, grace_s=1000)))


def test_a_worker_that_comes_later_finds_all_done(tmp_path, landscape):
    url = str(tmp_path / "search.journal")
    check_whole(url, finish(start(url, tmp_path / "a.db", landscape, race_s=0.0)))
    late = start(url, tmp_path / "b.db", landscape, race_s=0.0)
    assert finish(late) == []
    more = Workload(64, 64)
    wider = record(tmp_path / "seven.gz", workloads=[*WORKLOADS, more])
    assert [Workload(**row["workload"]) for row in finish(start(url, tmp_path / "b.db", wider, race_s=0.0))] == [more]


def test_another_gpu_is_refused_by_name(tmp_path, landscape, patune):
    """Times of two GPUs in one search would make no sense; both are named."""
    url, h200 = str(tmp_path / "search.journal"), "NVIDIA H200"
    finish(start(url, tmp_path / "a.db", landscape, race_s=0.0))
    environment = Environment(h200, 132, "9.0", "570.86", "3.6.0", "2.11.0")
    other = record(tmp_path / "h200.gz", replace(KEY, gpu=h200), environment=environment)
    result = patune("run", "--gpu", "h200", "--replay", other, "--storage", url, "--db", tmp_path / "b.db")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line == (
        "patune: error: --storage: its search is for NVIDIA H100 80GB HBM3 with 132 SMs, "
        "and the GPU here is NVIDIA H200 with 132 SMs: use another storage for it"
    )


def test_the_studies_have_what_a_dashboard_shows(tmp_path, landscape):
    """The tunables by name and value, times in microseconds, and how every config that is not right went."""
    url = str(tmp_path / "search.journal")
    bad = record(tmp_path / "bad.gz", workloads=WORKLOADS[:1], trial=lambda c, w: (wrong if c["num_warps"] == 8 else right)(c, w))
    finish(start(url, tmp_path / "a.db", bad, race_s=0.0))
    queue, by_workload = studies(url)
    ((name, trials),) = by_workload.items()
    assert name.startswith("append d128 p16 g1 bfloat16/bfloat16, B1 L1024 h8, ")
    best = min((trial for trial in trials if trial.state == TrialState.COMPLETE), key=lambda trial: trial.value)
    assert (best.params, best.value) == (BEST, 6.007)
    assert {t.user_attrs["status"] for t in trials if t.state == TrialState.PRUNED} == {"wrong_answer"}
    assert queue.trials[0].user_attrs["result"]["config"] == BEST


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("sqlite:///a.db", UsageError, "SQLite hands the same work to two workers"),
        ("foo://a/b", UsageError, "foo:// is none, give a database such as"),
        ("grpc://here", UsageError, "grpc://here is no grpc://host:port"),
        ("grpc://127.0.0.1:1", PatuneError, "no proxy answers at 127.0.0.1:1, "),
        ("postgresql+pg8000://me:secret@127.0.0.1:1/a", PatuneError, "that database needs pg8000, pip install it"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/a", PatuneError, "see that it runs"),
        ("/proc/no/folder", PatuneError, "cannot be written"),
    ],
)
def test_a_storage_that_cannot_be_had_is_one_line_without_its_password(url, error, message, monkeypatch):
    monkeypatch.setattr(storage, "CONNECT_S", 0.5)
    for beginning, module in (("postgresql+psycopg:", "psycopg"), ("grpc://127", "grpc")):
        if url.startswith(beginning):
            pytest.importorskip(module)
    with pytest.raises(error, match=f"--storage: .*{message}") as raised:
        connect(url)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_journal_with_a_torn_last_line_is_read_up_to_it(tmp_path):
    """A crash in the middle of a write costs that write alone; Optuna itself could never open the file again."""
    path = tmp_path / "a.journal"
    optuna.create_study(storage=connect(str(path)), study_name="before")
    with path.open("ab") as file:
        file.write(b'{"op_code": 0, "worker')
    optuna.create_study(storage=connect(str(path)), study_name="after")
    assert [study.study_name for study in connect(str(path)).get_all_studies()] == ["before", "after"]
