import importlib.util
import json

from .recording import BEST

NAME = "append,head_dim=128,page_size=16,q_heads_per_kv=1,device_name=NVIDIA_H100_80GB_HBM3,dtype=bfloat16.json"


def test_json_is_one_file_a_key_and_names_what_it_wrote(patune, tuned, tmp_path):
    out = tmp_path / "out"
    result = patune("export", "--to", "json", "--out", out, "--db", tuned)
    assert (result.exit_code, result.stdout) == (0, f"{out / NAME}\n")
    assert json.loads((out / NAME).read_text())["batch_size=8,kv_heads=8,q_len=1,kv_len=4096"] == BEST


def test_python_is_one_module_that_answers_lookups(patune, tuned, tmp_path):
    out = tmp_path / "sub" / "table.py"
    result = patune("export", "--to", "python", "--out", out, "--db", tuned)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    spec = importlib.util.spec_from_file_location("exported_table", out)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_best_config("append", head_dim=128, page_size=16, sm_count=132, batch_size=8, kv_len=4096)
    assert (dict(config), config.source) == (BEST, "measured")


def test_an_empty_table_is_an_error_and_writes_nothing(patune, tuned, tmp_path):
    out = tmp_path / "table.py"
    for args, what in (((), ""), (("--db", tuned, "--gpu", "h200"), " for h200")):
        result = patune("export", "--to", "python", "--out", out, *args)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"patune: error: nothing is tuned{what}, so there is nothing to export")
        assert not out.exists()


def test_a_place_that_cannot_be_written_is_named(patune, tuned, tmp_path):
    (tmp_path / "file").write_text("")
    for form, out in (("json", tmp_path / "file"), ("python", tmp_path), ("python", tmp_path / "file" / "table.py")):
        result = patune("export", "--to", form, "--out", out, "--db", tuned)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"patune: error: --out: {out} cannot be written (")


def test_a_replayed_database_makes_no_landscape(patune, tuned, tmp_path):
    """Only what was measured may be recorded: a replay's trials are a recording already."""
    out = tmp_path / "l.json.gz"
    result = patune("export", "--to", "landscape", "--out", out, "--db", tuned)
    assert result.exit_code == 1
    assert result.stderr.startswith("patune: error: a landscape is of one GPU and one set of versions")
    assert not out.exists()
