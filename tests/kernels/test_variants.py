"""Key explosion: neither compiled kernels nor remembered lookups multiply with lengths, batch sizes and splits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patune.cachedb import lookup
from patune.kernels import config

DECODE = {"decode_split": 1, "decode_reduce": 1}
STREAMS = {
    "decode kv_len": DECODE,
    "decode batch": {
        "decode_split": 2,
        "decode_reduce": 2,
    },  # up to 32 sequences are counted in another way; few rows in narrower columns
    "decode num_splits": DECODE,
    "decode window": DECODE,
    "decode alignment": DECODE,
    "decode max_kv_len": DECODE,
    "decode with and without a window": {"decode_split": 2, "decode_reduce": 2},  # the count notices a new kernel
    "prefill q_len": {"prefill_attention": 1},
    "prefill batch": {"prefill_attention": 1},
    "prefill alignment": {"prefill_attention": 1},
    "append tokens": {"append_kv": 1},
    "append of last tokens": {"append_kv": 1},
}


def test_new_lengths_batches_splits_windows_and_slices_compile_nothing():
    """Distinct kernels by stream of calls, counted by variants.py in a process that compiles rather than interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("variants.py")
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == STREAMS


def test_the_memory_of_lookups_does_not_grow_with_every_length():
    """A KV cache that grows by a token a step meets few new lookups, and each answer has splits that fit."""
    query = dict(
        kernel="decode", head_dim=128, page_size=16, q_heads_per_kv=4, q_dtype="bfloat16", kv_dtype="bfloat16", features="",
        sm_count=132, device_name="NVIDIA H100 80GB HBM3", capability="9.0", q_len=1, kv_heads=8, ragged=False,
    )  # fmt: skip
    entry = query | dict(
        gpu="NVIDIA H100 80GB HBM3", batch_size=8, kv_len=4096, us=1.0, when="", triton="", torch="", driver="", source_hash="",
        mode="measured", config=dict(BLOCK_N=64, num_warps=4, num_stages=3, num_splits=8),
    )  # fmt: skip
    table = lookup.Table([entry])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "table", lambda: table)
        for batch_size, kv_len in [*((8, n) for n in range(1, 30_000)), *((n, 5000) for n in range(1, 1000))]:
            found = config.find(query | dict(batch_size=batch_size, kv_len=kv_len))
            assert found["num_splits"] == 1 or found["num_splits"] * 64 <= kv_len
    (group,) = table._groups.values()
    assert len(group.answers) <= 4 * 15 + 64 + 4 * 5  # 4 an octave, and every batch size up to 64
