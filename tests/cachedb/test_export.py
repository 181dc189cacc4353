import importlib.util
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patune.cachedb import export, lookup
from patune.errors import PatuneError
from patune.kernels.config import get_best_config

from .builders import A100, CONFIG, H100, H200, entry, store_entries

TABLE = [
    entry(),
    entry(batch_size=64, kv_len=4096, ragged=True, us=384.0),
    entry(batch_size=1, kv_len=131072, config={**CONFIG, "num_splits": 64}),
    entry(batch_size=3, kv_heads=1, config={**CONFIG, "BLOCK_N": 128}),
    entry(gpu=H200, batch_size=2),
    entry(gpu=A100, sm_count=108, capability="8.0"),
    entry(kv_dtype="float8_e4m3fn", features="sinks,sliding_window", us=9.0),
    entry(
        kernel="prefill",
        q_len=2048,
        kv_len=2048,
        config={"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 0, "num_splits": 1},
    ),
    entry(kernel="prefill", q_len=4096, kv_len=4096, config={"BLOCK_M": 128, "num_warps": 8}),  # passed over: no BLOCK_N
    entry(
        kernel="append",
        q_heads_per_kv=1,
        q_len=512,
        config={"BLOCK_T": 4, "num_warps": 2},
    ),
]


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_json_has_one_file_a_key_named_as_vllm_names_them(tmp_path):
    written = export.to_json(
        [entry(), entry(batch_size=64, kv_len=4096, ragged=True, triton="3.7.1")],
        tmp_path,
    )
    name = "decode,head_dim=128,page_size=16,q_heads_per_kv=4,device_name=NVIDIA_H100_80GB_HBM3,dtype=bfloat16.json"
    assert written == [tmp_path / name]
    assert json.loads(written[0].read_text()) == {
        "triton_version": "3.6.0, 3.7.1",
        "batch_size=8,kv_heads=8,q_len=1,kv_len=8192": CONFIG,
        "batch_size=64,kv_heads=8,q_len=1,kv_len=4096,ragged": CONFIG,
    }


def test_json_names_tell_kv_dtype_and_features_only_where_they_differ(tmp_path):
    (path,) = export.to_json(
        [entry(kv_dtype="float8_e4m3fn", features="sinks,soft_cap")],
        tmp_path / "new" / "folder",
    )
    assert path.name.endswith("dtype=bfloat16,kv_dtype=float8_e4m3fn,features=sinks+soft_cap.json")


def test_json_never_overwrites_one_key_with_another(tmp_path):
    with pytest.raises(PatuneError, match="two keys would be written to decode,head_dim=128"):
        export.to_json([entry(), entry(sm_count=66)], tmp_path)
    assert list(tmp_path.glob("*.json")) == []


def test_the_module_needs_the_standard_library_only(tmp_path):
    export.to_python(TABLE, tmp_path / "table.py")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import table;"
        "c = table.get_best_config('decode', head_dim=128, page_size=16, q_heads_per_kv=4, device_name=sys.argv[2],"
        " batch_size=8, kv_len=8192, kv_heads=8);"
        "print(c['BLOCK_N'], c.source, c.provenance['measured_us'], 'patune' in sys.modules)"
    )
    # -I -S: no installed package can be imported.
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path), H100]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "64 measured 12.5 False\n"


def test_the_module_says_where_its_times_come_from(tmp_path):
    export.to_python([entry()], tmp_path / "table.py")
    origin = f"- {H100}, driver 570.86, triton 3.6.0, torch 2.11.0, decode kernel 0123456789ab"
    assert origin in load_module(tmp_path / "table.py").__doc__


def test_an_empty_table_exports_a_module_of_defaults(tmp_path):
    export.to_python([], tmp_path / "table.py")
    found = load_module(tmp_path / "table.py").get_best_config("decode", head_dim=128, page_size=16)
    assert found.source == "default" and found == get_best_config("decode", head_dim=128, page_size=16, sm_count=132)


def test_the_module_refuses_an_unknown_kernel(tmp_path):
    export.to_python([], tmp_path / "table.py")
    with pytest.raises(ValueError, match="'encode' is unknown"):
        load_module(tmp_path / "table.py").get_best_config("encode", head_dim=128, page_size=16)


QUESTIONS = st.fixed_dictionaries(
    {
        "kernel": st.sampled_from(["decode", "prefill", "append"]),
        "head_dim": st.sampled_from([128, 128, 64, 256]),
        "page_size": st.just(16),
        "q_heads_per_kv": st.sampled_from([4, 1]),
        "q_len": st.sampled_from([1, 512, 2048, 1000]),
    },
    optional={
        "kv_dtype": st.sampled_from([None, "bfloat16", "float8_e4m3fn"]),
        "features": st.sampled_from(["", "sinks,sliding_window"]),
        "batch_size": st.none() | st.integers(1, 200),
        "kv_len": st.none() | st.sampled_from([8192, 4096, 2048]) | st.integers(1, 1 << 18),
        "kv_heads": st.none() | st.sampled_from([1, 8]),
        "ragged": st.booleans(),
    },
)
# The package fills in the GPU that is there where both are None, which the module cannot.
DEVICES = st.tuples(
    st.none() | st.sampled_from([H100, H200, A100, "new"]),
    st.none() | st.sampled_from([132, 108, 80]),
)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "table.py"
    export.to_python(TABLE, path)
    return load_module(path)


@given(question=QUESTIONS, device=DEVICES.filter(any))
@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_module_answers_as_the_package_does(tmp_path, monkeypatch, module, question, device):
    path = tmp_path / "a.db"
    if not path.exists():
        store_entries(path, TABLE)
        monkeypatch.setenv("PATUNE_DB", str(path))
        lookup.reload()
    question = {**question, "device_name": device[0], "sm_count": device[1]}
    ours, theirs = get_best_config(**question), module.get_best_config(**question)
    assert (dict(ours), ours.source, ours.provenance) == (
        dict(theirs),
        theirs.source,
        theirs.provenance,
    )
