import json
import shutil

from .recording import BEST, KEY


def test_show_prints_the_table_by_key(patune, tuned):
    result = patune("show", "--db", tuned)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].strip() == "append on NVIDIA H100 80GB HBM3: head_dim 128, page_size 16, bfloat16"
    assert lines[4].split() == ["B1", "L1024", "4", "4", "6.0", "10.0", "x1.67", "17", "replay", "2026-11-22"]


def test_show_as_json_has_all_that_is_known_of_each_config(patune, tuned):
    (part,) = json.loads(patune("show", "--db", tuned, "--json").stdout)["keys"]
    assert (part["key"]["kernel"], part["key"]["gpu"]) == ("append", KEY.gpu)
    row = part["workloads"][1]
    assert row["workload"] == {"batch_size": 8, "kv_len": 4096, "q_len": 1, "kv_heads": 8, "ragged": False}
    assert (row["config"], row["mode"], row["triton"], row["driver"]) == (BEST, "replay", "3.6.0", "570.86")


def test_show_prints_the_shipped_table_too(patune, tuned, shipped):
    shutil.copy(tuned, shipped / "h100.db")
    assert "B8 L4096" in patune("show").stdout


def test_show_can_be_narrowed_to_a_kernel_or_a_gpu(patune, tuned):
    assert "B8 L4096" in patune("show", "--db", tuned, "--kernel", "append", "--gpu", "h100").stdout
    for other in (("--kernel", "decode"), ("--gpu", "h200")):
        result = patune("show", "--db", tuned, *other)
        assert (result.exit_code, result.stdout) == (0, "Nothing is tuned for that: `patune run` does it.\n")
        assert json.loads(patune("show", "--db", tuned, "--json", *other).stdout) == {"keys": []}
