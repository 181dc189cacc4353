import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import patune as package
from patune.cli import gpus

from .recording import BEST, H100

APPEND = ("lookup", "--kernel", "append", "--head-dim", 128, "--page-size", 16)


def test_lookup_prints_the_config_where_it_comes_from_and_who_measured_it(patune, tuned):
    result = patune(*APPEND, "--gpu", "h100", "--batch-size", 8, "--kv-len", 4096, "--db", tuned)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[:2] == ["BLOCK_T=4 num_warps=4", "source: measured (tuned for this workload on this GPU)"]
    assert f"gpu: {H100.gpu}" in lines
    assert "measured_us: 13.01" in lines


def test_lookup_finds_the_database_of_the_environment(patune, tuned, monkeypatch):
    monkeypatch.setenv("PATUNE_DB", str(tuned))
    assert json.loads(patune(*APPEND, "--gpu", "h100", "--json").stdout)["config"] == BEST


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kernel=st.sampled_from(["append", "decode", "prefill"]),
    batch_size=st.none() | st.sampled_from([1, 3, 8, 100]),
    kv_len=st.none() | st.sampled_from([1, 1024, 4000, 4096]),
    kv_heads=st.none() | st.sampled_from([1, 8]),
    gpu=st.none() | st.sampled_from(["h100", "h200", "a100"]),
    sm_count=st.none() | st.sampled_from([108, 132]),
    ragged=st.booleans(),
    group=st.sampled_from([1, 4]),
)
def test_lookup_answers_as_get_best_config(
    kernel, batch_size, kv_len, kv_heads, gpu, sm_count, ragged, group, patune, tuned, monkeypatch
):
    sm_count = None if gpu else sm_count
    sizes = {"--batch-size": batch_size, "--kv-len": kv_len, "--kv-heads": kv_heads, "--gpu": gpu, "--sm-count": sm_count}
    args = [word for name, value in sizes.items() if value is not None for word in (name, value)]
    args += ["--kernel", kernel, "--q-heads-per-kv", group, "--db", tuned, *(["--ragged"] if ragged else [])]
    answer = json.loads(patune("lookup", "--head-dim", 128, "--page-size", 16, "--json", *args).stdout)
    monkeypatch.setenv("PATUNE_DB", str(tuned))
    template = answer.pop("template")
    assert template == (f"{kernel}_hopper" if gpu in ("h100", "h200") and kernel != "append" else kernel)
    expected = package.get_best_config(
        template, head_dim=128, page_size=16, q_heads_per_kv=group, batch_size=batch_size, kv_len=kv_len,
        kv_heads=kv_heads, ragged=ragged, device_name=gpu and gpus.gpu(gpu).name,
        sm_count=gpus.gpu(gpu).sm_count if gpu else sm_count,
    )  # fmt: skip
    assert answer == {"config": dict(expected), "source": expected.source, "provenance": expected.provenance}


def test_lookup_names_the_template_that_a_call_takes(patune):
    """Of the two on an H100, by the table that ships: the Hopper one's, also of an fp8 cache, but for fp32 queries."""
    decode = ("lookup", "--kernel", "decode", "--head-dim", 128, "--page-size", 16, "--q-heads", 32, "--kv-heads", 8,
              "--batch-size", 8, "--kv-len", 8192, "--gpu", "h100")  # fmt: skip
    assert patune(*decode).stdout.splitlines()[0] == "template: decode_hopper"
    fp8 = ("--kv-dtype", "float8_e4m3fn", "--json")
    assert json.loads(patune(*decode, *fp8).stdout)["template"] == "decode_hopper"
    assert json.loads(patune(*decode, *fp8, "--dtype", "float32").stdout)["template"] == "decode"


def test_query_heads_and_kv_heads_give_the_group(patune, tuned):
    decode = ("lookup", "--kernel", "decode", "--head-dim", 128, "--page-size", 16, "--json", "--db", tuned)
    by_heads = patune(*decode, "--q-heads", 32, "--kv-heads", 8).stdout
    assert by_heads == patune(*decode, "--q-heads-per-kv", 4, "--kv-heads", 8).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--q-heads", 8], "--q-heads: 8 needs a --kv-heads that divides it"),
        (["--q-heads", 8, "--kv-heads", 3], "--q-heads: 8 needs a --kv-heads that divides it"),
        (["--q-heads", 8, "--kv-heads", 8, "--q-heads-per-kv", 1], "--q-heads: --q-heads-per-kv decides it"),
        (["--gpu", "h100", "--sm-count", 132], "--sm-count: --gpu decides it"),
        (["--dtype", "int8"], "Invalid value for '--dtype': 'int8' is not one of"),
        (["--gpu", "h1000"], "Invalid value for '--gpu': 'h1000' is not one of"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it_and_exit_status_2(args, message, patune):
    result = patune(*APPEND, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"patune: error: {message}")
    assert result.stderr.count("\n") == 1
