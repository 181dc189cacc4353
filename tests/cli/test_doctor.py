import json
import shutil

import pytest

import patune as package

from .recording import KEY, record
from .test_database import corrupt, newer


def test_doctor_says_what_is_installed_and_what_is_there(patune, tuned, shipped):
    record(shipped / "h100.landscape.json.gz")
    shutil.copy(tuned, shipped / "h100.db")
    result = patune("doctor", "--db", tuned)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"patune {package.__version__}, python 3.")
    assert f"database: {tuned}" in result.stdout
    assert "schema 1: environments 1, keys 1, workloads 2, trials " in result.stdout
    assert "shipped: h100.db, 2 configs" in result.stdout
    assert "shipped: h100.landscape.json.gz, 1 keys on NVIDIA H100 80GB HBM3, 2026-11-22" in result.stdout


def test_doctor_as_json_is_one_document(patune, tuned):
    document = json.loads(patune("doctor", "--db", tuned, "--json").stdout)
    assert document.keys() == {"versions", "gpus", "gpus_without_torch", "database", "stale", "shipped"}
    assert document["versions"].keys() == {"patune", "python", "torch", "triton", "driver"}
    assert document["database"]["counts"]["configs"] == 2
    assert document["database"]["bytes"] == tuned.stat().st_size
    assert document["database"]["problem"] is None


def test_configs_of_another_kernel_or_triton_are_stale_and_still_served(patune, tmp_path, db):
    old = record(tmp_path / "old.gz", source_hash="0123456789ab")
    patune("run", "--gpu", "h100", "--replay", old, "--db", db)
    (stale,) = json.loads(patune("doctor", "--db", db, "--json").stdout)["stale"]
    assert (stale["key"]["kernel"], stale["configs"], stale["other_kernel"]) == ("append", 2, 2)
    result = patune("doctor", "--db", db)
    assert result.exit_code == 0
    assert "of 2 configs 2 of another kernel version" in result.stdout
    assert result.stdout.splitlines()[-1] == "Stale configs are still served; re-race them with `patune run`."


def test_configs_of_this_kernel_and_triton_are_not_stale(patune, tuned, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert json.loads(patune("doctor", "--db", tuned, "--json").stdout)["stale"] == []


@pytest.mark.parametrize(
    ("spoil", "message"), [(corrupt, "is not an SQLite database or is damaged"), (newer, "was written by a newer patune")]
)
def test_a_broken_database_is_told_with_all_the_rest_and_exit_status_1(spoil, message, patune, db, shipped):
    record(shipped / "h100.landscape.json.gz")
    spoil(db)
    result = patune("doctor", "--db", db)
    assert result.exit_code == 1
    assert f"database: broken, {db} {message}" in result.stdout
    assert f"1 keys on {KEY.gpu}" in result.stdout
    as_json = patune("doctor", "--db", db, "--json")
    assert as_json.exit_code == 1
    assert message in json.loads(as_json.stdout)["database"]["problem"]


def test_a_database_that_is_not_made_yet_is_not_made_by_doctor(patune, db):
    result = patune("doctor", "--db", db)
    assert result.exit_code == 0
    assert f"database: {db} is not there yet" in result.stdout
    assert not db.exists()
