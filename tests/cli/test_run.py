import json

import pytest

from patune.cachedb import lookup
from patune.cli import source, usage
from patune.errors import UsageError

from .recording import BEST, KEY, WORKLOADS, record, right, wrong

REPLAYING = "replaying the landscape recorded on NVIDIA H100 80GB HBM3, 2026-11-22 (nothing is measured now)"
SHAPE = ("--head-dim", 128, "--q-heads", 32, "--kv-heads", 8)


def test_a_replay_says_so_first_and_ends_in_a_table_a_person_can_read(patune, recorded, db):
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0] == REPLAYING
    assert lines[1].strip() == "append on NVIDIA H100 80GB HBM3: head_dim 128, page_size 16, bfloat16"
    assert lines[3].split() == [
        "workload", "BLOCK_T", "num_warps", "us", "default", "us", "speedup", "configs", "regret",
    ]  # fmt: skip
    assert lines[5].split() == ["B1", "L1024", "4", "4", "6.0", "10.0", "x1.67", "17", "0.0%"]
    assert lines[6].split() == ["B8", "L4096", "4", "4", "13.0", "17.0", "x1.31", "17", "0.0%"]
    assert str(db) in lines[-1]
    assert "B8 L4096: 13.0 us" in result.stderr  # progress


def test_json_is_one_document_on_stdout_and_nothing_else(patune, recorded, db):
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, "--json")
    assert result.exit_code == 0
    assert REPLAYING in result.stderr
    document = json.loads(result.stdout)
    assert document.keys() == {"gpu", "mode", "keys"}
    assert (document["gpu"], document["mode"]) == (KEY.gpu, "replay")
    (part,) = document["keys"]
    assert part["key"] == {
        "kernel": "append", "gpu": KEY.gpu, "sm_count": 132, "head_dim": 128, "page_size": 16, "q_heads_per_kv": 1,
        "q_dtype": "bfloat16", "kv_dtype": "bfloat16", "features": "",
    }  # fmt: skip
    assert part["workloads"][0] == {
        "workload": {"batch_size": 1, "kv_len": 1024, "q_len": 1, "kv_heads": 8, "ragged": False},
        "config": BEST, "us": 6.007, "default_us": 10.01, "evaluations": 17, "optimum_us": 6.007, "regret": 0.0,
    }  # fmt: skip


def test_what_was_tuned_is_what_a_lookup_finds(tuned):
    entries = lookup.load(tuned).entries
    assert [(e["kernel"], e["batch_size"], e["config"], e["mode"]) for e in entries] == [
        ("append", 1, BEST, "replay"),
        ("append", 8, BEST, "replay"),
    ]


def test_without_a_gpu_the_landscape_that_ships_is_replayed(patune, shipped, db):
    record(shipped / "h100.landscape.json.gz")
    result = patune("run", "--gpu", "H100", "--db", db)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"no GPU visible: {REPLAYING}")
    asked = patune("run", "--gpu", "h100", "--db", db, "--replay")
    assert (asked.exit_code, asked.stdout.splitlines()[0]) == (0, REPLAYING)


def test_auto_replays_the_landscape_of_the_gpu_that_is_here(patune, shipped, visible, db):
    record(shipped / "h100.landscape.json.gz")
    visible.append(KEY.gpu)
    result = patune("run", "--gpu", "auto", "--replay", "--db", db)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, REPLAYING)


def failure(result) -> str:
    """The one line on stderr of a command that did nothing."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("patune: error: ")
    return line.removeprefix("patune: error: ")


def test_no_landscape_for_a_gpu_names_those_that_have_one(patune, shipped, db):
    record(shipped / "h100.landscape.json.gz")
    result = patune("run", "--gpu", "a100", "--db", db)
    assert result.exit_code == 1
    assert failure(result).startswith("no landscape of a100 ships with patune (there is: h100): ")


def test_auto_without_a_gpu_says_to_name_one(patune):
    result = patune("run", "--gpu", "auto")
    assert result.exit_code == 2
    assert failure(result).startswith("--gpu: auto needs a GPU and none is visible, name the one to tune for: a100,")


def test_another_gpu_than_the_one_asked_for_names_both(patune, visible):
    visible.append("NVIDIA H200")
    result = patune("run", "--gpu", "h100")
    assert result.exit_code == 2
    assert failure(result).startswith("--gpu: h100 was asked for but the GPU here is NVIDIA H200: ")


def test_a_landscape_of_another_gpu_names_both(patune, recorded):
    result = patune("run", "--gpu", "h200", "--replay", recorded)
    assert result.exit_code == 2
    assert failure(result) == "--replay: that landscape was recorded on NVIDIA H100 80GB HBM3, not on h200"


def test_a_landscape_file_that_is_none_names_the_file(patune, tmp_path):
    bad = tmp_path / "bad.gz"
    bad.write_bytes(b"no landscape")
    assert "bad.gz" in failure(patune("run", "--gpu", "h100", "--replay", bad))
    result = patune("run", "--gpu", "h100", "--replay", tmp_path / "none.gz")
    assert result.exit_code == 1
    assert "none.gz: No such file" in failure(result)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "gpt-9"], "--model: 'gpt-9' is unknown, use one of llama-2-7b, llama-3.1-8b,"),
        (["--model", "qwen3-8b", "--head-dim", 64], "--head-dim: --model qwen3-8b decides it"),
        (["--page-size", 64], "--head-dim, --q-heads, --kv-heads: missing"),
        (["--head-dim", 128, "--q-heads", 8], "--kv-heads: missing"),
        (["--head-dim", 128, "--q-heads", 8, "--kv-heads", 3], "--q-heads: 8 is no multiple of --kv-heads 3"),
        (["--head-dim", 0], "Invalid value for '--head-dim': 0 is not in the range x>=1"),
        (["--dtype", "float64"], "Invalid value for '--dtype': 'float64' is not one of"),
        (["--ragged"], "--batch-size: missing"),
        (["--batch-size", 4], "--kv-len: missing"),
        (["--batch-size", 4, "--kv-len", 64, "--q-len", 8], "--q-len: means another thing for each kernel"),
        (["--kernel", "prefill", "--batch-size", 4, "--kv-len", 64, "--q-len", 65], "--q-len: 65 is more than --kv-len 64"),
        (["--kernel", "decode", "--batch-size", 4, "--kv-len", 64, "--q-len", 2, "--ragged"], "--ragged: decode takes"),
        (["--budget", "soon"], "Invalid value for '--budget': 'soon' is no duration"),
        (["--budget", "0s"], "Invalid value for '--budget': '0s' is no duration"),
        (["--trials", "0"], "Invalid value for '--trials': '0' is no number of configs"),
        (["--trials", "many"], "Invalid value for '--trials': 'many' is no number of configs"),
        (["--devices", "0,0"], "--devices: 0,0 names a device twice"),
        (["--devices", "first"], "--devices: 'first' is no device index"),
        (["--devices", "3"], "--devices: there is no device 3, torch sees 0"),
        (["--devices", "0", "--replay"], "--devices: a replay runs on no device"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it_and_exit_status_2(args, message, patune):
    result = patune("run", "--gpu", "h100", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert failure(result).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kernel", "decode"], "its keys are append head_dim=128 page_size=16 kv_heads=8 bfloat16"),
        (["--model", "gpt-oss-20b"], "its keys are append head_dim=128 page_size=16 kv_heads=8 bfloat16"),
        (["--dtype", "float16"], "its keys are append head_dim=128 page_size=16 kv_heads=8 bfloat16"),
        (["--head-dim", 128, "--q-heads", 4, "--kv-heads", 4], "its workloads are append B1 L1024, append B8 L4096"),
        (["--batch-size", 9, "--kv-len", 4096], "its workloads are append B1 L1024, append B8 L4096"),
    ],
)
def test_what_was_not_recorded_names_what_was(args, message, patune, recorded, db):
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, *args)
    assert (result.exit_code, result.stdout.splitlines()) == (2, [REPLAYING])
    assert failure(result) == f"the landscape of NVIDIA H100 80GB HBM3 has none of it, {message}"


def test_a_shape_recorded_for_some_kernels_says_which_are_left_out(patune, recorded, db):
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, "--model", "llama-3.1-8b")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "not recorded at this shape and left out: decode, prefill"


def test_one_workload_can_be_chosen(patune, recorded, db):
    sizes = ("--batch-size", 8, "--kv-len", 4096)
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, "--json", *SHAPE, *sizes)
    ((row,),) = (part["workloads"] for part in json.loads(result.stdout)["keys"])
    assert (row["workload"]["batch_size"], row["workload"]["kv_len"]) == (8, 4096)


def test_a_landscape_of_another_kernel_version_says_so(patune, tmp_path, db):
    old = record(tmp_path / "old.gz", source_hash="0123456789ab")
    result = patune("run", "--gpu", "h100", "--replay", old, "--db", db)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "the landscape was recorded with another version of the kernel: append"


def test_a_workload_that_fails_costs_itself_alone_and_exit_status_1(patune, tmp_path, db):
    def trial(config, workload):
        return (wrong if workload == WORKLOADS[0] else right)(config, workload)

    bad = record(tmp_path / "bad.gz", trial=trial)
    result = patune("run", "--gpu", "h100", "--replay", bad, "--db", db, "--json")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("failed: append B1 L1024: no config of append B1 L1024 is right")
    assert [row["config"] for row in json.loads(result.stdout)["keys"][0]["workloads"]] == [BEST]
    assert [e["batch_size"] for e in lookup.load(db).entries] == [8]


def test_a_budget_that_ends_early_says_what_it_left(patune, recorded, db):
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, "--budget", "0.000001s")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1].startswith("the budget ended before 2 workloads")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("60s", 60), ("1.5m", 90), ("1h", 3600)])
def test_a_budget_has_a_unit_or_is_in_seconds(text, seconds):
    from patune.cli.options import Duration

    assert Duration().convert(text, None, None) == seconds


def test_trials_is_the_number_of_configs_of_each_workload(patune, recorded, db):
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, "--trials", 5, "--json")
    assert [row["evaluations"] for row in json.loads(result.stdout)["keys"][0]["workloads"]] == [5, 5]


def test_the_same_seed_finds_the_same_table(patune, recorded, tmp_path):
    def run(name, seed):
        args = ("--replay", recorded, "--db", tmp_path / name, "--trials", 8, "--seed", seed, "--json")
        return patune("run", "--gpu", "h100", *args).stdout

    assert run("a.db", 3) == run("b.db", 3)


@pytest.mark.parametrize(("set_to", "device", "name"), [("", 1, "1"), ("4,7", 1, "7"), ("GPU-a,GPU-b", 0, "GPU-a")])
def test_a_device_is_called_what_cuda_calls_it_in_this_process(set_to, device, name, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", set_to)
    assert source.cuda_name(device) == name


H100, H200 = KEY.gpu, "NVIDIA H200"


@pytest.mark.parametrize(
    ("gpu", "wanted", "names", "busy", "chosen", "said"),
    [
        ("h100", None, [H100], {}, (0,), [f"measuring on {H100}"]),
        ("h100", None, [H100] * 4, {}, (0, 1, 2, 3), [f"measuring on 4 x {H100}"]),
        ("auto", None, [H100] * 3, {1: "9%"}, (0, 2), [f"measuring on 2 x {H100}", "device 1 is busy (9%): left out"]),
        ("h100", None, [H200, H100, H100], {}, (1, 2), [f"measuring on 2 x {H100}"]),
        ("auto", None, [H200, H100], {0: "9%"}, (1,), [f"measuring on {H100}"]),
        ("auto", (1,), [H200, H100], {}, (1,), [f"measuring on {H100}"]),
        ("h100", (0,), [H100] * 2, {0: "9%"}, (0,), [f"measuring on {H100}", "device 0 is busy (9%): its times will be unsteady"]),
        ("auto", None, [H100], {0: "9%"}, (0,), [f"measuring on {H100}", "device 0 is busy (9%): its times will be unsteady"]),
    ],
)
def test_a_run_takes_the_idle_gpus_of_one_model_and_says_which_are_busy(
    gpu, wanted, names, busy, chosen, said, visible, monkeypatch
):
    visible += names
    monkeypatch.setattr(usage, "busy_gpus", lambda: busy)
    assert source.choose(gpu, wanted, None) == source.Source(None, chosen, tuple(said))


def test_two_models_in_one_run_are_refused_by_name(visible):
    visible += [H100, H200]
    with pytest.raises(UsageError, match="--devices: device 1 is NVIDIA H200, not NVIDIA H100 80GB HBM3"):
        source.choose("auto", (0, 1), None)


def test_verbose_logs_every_decision_on_stderr(patune, recorded, db):
    result = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, "-v", "--json")
    json.loads(result.stdout)
    best = " ".join(f"{name}={value}" for name, value in BEST.items())
    assert f"task: append B8 L4096: {best} takes the place of" in result.stderr
    assert f"task: append B8 L4096: the last race is over, {best} takes the place of" in result.stderr
    assert "accept: mean log ratio" in result.stderr
    assert f"search: one of all: {best}" in result.stderr
    quiet = patune("run", "--gpu", "h100", "--replay", recorded, "--db", db, "--json")
    assert "task:" not in quiet.stderr
