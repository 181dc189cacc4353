"""The default configs compile for GPUs that are not there, within shared memory and registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patune.tuner.compile import SHARED_BYTES

FP8, FP32 = dict(kv_dtype="float8_e4m3fn"), dict(q_dtype="float32", kv_dtype="float32")
E5M2, FP16 = dict(kv_dtype="float8_e5m2"), dict(q_dtype="float16", kv_dtype="float16")
# capability, kernel, head_dim, page_size, q_heads_per_kv, other fields of the key
KEYS = [
    ("9.0", "decode", 64, 16, 8, {}),
    ("9.0", "decode", 80, 1, 1, {}),
    ("9.0", "decode", 112, 256, 4, FP16),
    ("9.0", "decode", 128, 16, 4, {}),
    ("9.0", "decode", 128, 64, 7, {}),
    ("9.0", "decode", 128, 16, 8, FP8),
    ("9.0", "decode", 256, 256, 8, {}),
    ("9.0", "decode", 64, 16, 8, FP32),
    ("9.0", "prefill", 64, 16, 8, {}),
    ("9.0", "prefill", 80, 1, 1, {}),
    ("9.0", "prefill", 128, 16, 4, {}),
    ("9.0", "prefill", 128, 64, 7, FP8),
    ("9.0", "prefill", 256, 256, 8, {}),
    ("9.0", "prefill", 64, 16, 1, FP32),
    ("9.0", "append", 128, 16, 1, {}),
    ("9.0", "append", 80, 1, 1, FP8),
    ("8.0", "decode", 128, 16, 4, {}),
    ("8.0", "decode", 256, 64, 8, {}),
    ("8.0", "decode", 64, 16, 1, E5M2),
    ("8.0", "prefill", 128, 16, 4, {}),
    ("8.0", "prefill", 256, 16, 8, {}),
    ("8.6", "decode", 128, 16, 4, {}),
    ("8.6", "prefill", 256, 16, 1, {}),
]


@pytest.fixture(scope="module")
def builds() -> dict[int, dict]:
    """A build of each key; they share two compiling processes a capability, in a process where nothing is interpreted."""
    fields = ("kernel", "head_dim", "page_size", "q_heads_per_kv")
    jobs = [(key[0], dict(zip(fields, key[1:5], strict=True)) | dict(gpu="", sm_count=132) | key[5]) for key in KEYS]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("compile_defaults.py")
    done = subprocess.run([sys.executable, program], input=json.dumps(jobs), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(enumerate(json.loads(done.stdout)))


def ids(keys) -> list[str]:
    return [" ".join(map(str, (*key[:5], *key[5].values()))) for key in keys]


@pytest.mark.parametrize("i", range(len(KEYS)), ids=ids(KEYS))
def test_the_default_config_compiles_and_fits_shared_memory(builds, i):
    """No compile error, and a block's shared memory is within what its GPU has."""
    build = builds[i]
    assert build["status"] == "ok" or build["spill_bytes"], build["message"]
    assert 0 < build["shared_bytes"] <= SHARED_BYTES[KEYS[i][0]] or KEYS[i][1] == "append"
    assert 0 < build["registers"] <= 255  # 0 would mean that the disassembler was not there to ask


TUNED_FOR = [i for i, key in enumerate(KEYS) if key[0] == "9.0" and key[5] is not FP32]  # fp32 is for tests


@pytest.mark.parametrize("i", TUNED_FOR, ids=ids(KEYS[i] for i in TUNED_FOR))
def test_the_default_config_spills_no_register_on_hopper(builds, i):
    """The architecture that the templates are written for."""
    assert builds[i]["spill_bytes"] == 0


def test_the_default_config_is_a_point_of_its_search_space():
    """What a table would be tuned from lies in the space, whatever the key and workload, so the tuner can start from it."""
    from patune.kernels.registry import NAMES, template
    from patune.workload import Key, Workload

    for name in NAMES:
        for _, _, head_dim, page_size, group, other in KEYS:
            for workload in (Workload(1, 1), Workload(1, 1 << 20), Workload(256, 4096, ragged=True), Workload(3, 500, 500, 1)):
                config = template(name).default(Key(name, "", 132, head_dim, page_size, group, **other), workload)
                for tunable, values in template(name).tunables.items():
                    assert config[tunable] in values, f"{name}: {tunable}={config[tunable]}"
