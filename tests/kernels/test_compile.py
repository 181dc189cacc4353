"""The default configs compile for GPUs that are not there, within shared memory and registers."""

from dataclasses import asdict

import pytest
from compile_configs import compile_all

from patune.kernels.registry import template
from patune.tuner.compile import SHARED_BYTES
from patune.tuner.space import valid_points, variant
from patune.tuner.workloads import standard_workloads
from patune.workload import Key, Workload

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
    ("9.0", "decode", 512, 16, 8, {}),
    ("9.0", "decode", 64, 16, 8, FP32),
    ("9.0", "decode_hopper", 128, 16, 4, {}),
    ("9.0", "decode_hopper", 64, 16, 8, E5M2),
    ("9.0", "decode_hopper", 128, 16, 4, FP8),
    ("9.0", "decode_hopper", 256, 32, 2, FP8),
    ("9.0", "prefill", 64, 16, 8, {}),
    ("9.0", "prefill", 80, 1, 1, {}),
    ("9.0", "prefill", 128, 16, 4, {}),
    ("9.0", "prefill", 128, 64, 7, FP8),
    ("9.0", "prefill", 256, 256, 8, {}),
    ("9.0", "prefill", 512, 16, 8, {}),
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
    ("8.6", "prefill", 512, 16, 1, {}),
]


def test_the_default_config_compiles_for_its_gpu():
    """Every key's fits a block's shared memory, and on Hopper, which the templates are written for, spills no register."""
    fields = ("kernel", "head_dim", "page_size", "q_heads_per_kv")
    jobs = []
    for capability, *values, other in KEYS:
        key = dict(zip(fields, values, strict=True)) | dict(gpu="", sm_count=132) | other
        jobs.append([capability, key, dict(batch_size=4, kv_len=4096, q_len=512 if values[0] == "prefill" else 1), None])
    wrong = {}
    for key, build in zip(KEYS, compile_all(jobs), strict=True):
        spills_allowed = key[0] != "9.0" or key[5] is FP32  # fp32 is for tests
        compiled = 0 < build["registers"] <= 255  # 0 would mean that the disassembler was not there to ask
        fits = build["shared_bytes"] <= SHARED_BYTES[key[0]]
        if not (compiled and fits and (spills_allowed or build["spill_bytes"] == 0)):
            wrong[str(key)] = build
    assert not wrong


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_at_head_dim_512_the_rules_leave_what_fits_the_registers_and_the_default(kernel):
    """There the registers are the limit, which no compiler has to find out first; for Hopper."""
    key, of = Key(kernel, "", 132, 512, 16, 8), template(kernel)
    workload = next(w for w in standard_workloads(kernel, 2) if w.batch_size > 1)
    variants = {variant(of, config): config for config in valid_points(of, key, workload)}
    assert len(variants) >= 8
    builds = compile_all([["9.0", asdict(key), asdict(workload), config] for config in variants.values()])
    wrong = {str(config): build for config, build in zip(variants.values(), builds, strict=True) if build["status"] != "ok"}
    assert not wrong
    assert all(0 < build["registers"] <= 255 and build["spill_bytes"] <= 128 for build in builds)
    for w in standard_workloads(kernel, 2):
        assert variant(of, of.default(key, w)) in {variant(of, config) for config in valid_points(of, key, w)}


def test_the_default_config_is_a_point_of_its_search_space():
    """What a table would be tuned from lies in the space, whatever the key and workload, so the tuner can start from it."""
    from patune.kernels.registry import NAMES

    for name in NAMES:
        for _, _, head_dim, page_size, group, other in KEYS:
            for workload in (
                Workload(1, 1),
                Workload(1, 1 << 20),
                Workload(256, 4096, ragged=True),
                Workload(3, 500, 500, 1),
            ):
                config = template(name).default(Key(name, "", 132, head_dim, page_size, group, **other), workload)
                for tunable, values in template(name).tunables.items():
                    assert config[tunable] in values, f"{name}: {tunable}={config[tunable]}"
