"""What `patune run` tunes when it is not told: shapes that are served widely, and workloads that span serving."""

from ..models import Shape
from ..workload import Workload

# (kernel, shape): llama-3.1-8b at two page sizes and with an fp8 cache, gpt-oss, llama-3.1-70b whole and split over 8 GPUs,
# llama-2-7b (a KV head for every query head), gemma-3-12b, and head_dim 512.
TARGETS = [
    ("decode", Shape(32, 8, 128, 16)),
    ("decode", Shape(32, 8, 128, 64)),
    ("decode", Shape(32, 8, 128, 16, "float8_e4m3fn")),
    ("decode", Shape(64, 8, 64, 16)),
    ("decode", Shape(64, 8, 128, 16)),
    ("decode", Shape(8, 1, 128, 16)),
    ("decode", Shape(32, 32, 128, 16)),
    ("decode", Shape(16, 8, 256, 32)),
    ("decode", Shape(16, 2, 512, 16)),
    ("prefill", Shape(32, 8, 128, 16)),
    ("prefill", Shape(32, 8, 128, 64)),
    ("prefill", Shape(64, 8, 64, 16)),
    ("prefill", Shape(16, 8, 256, 32)),
    ("prefill", Shape(16, 2, 512, 16)),
    ("append", Shape(32, 8, 128, 16)),
    ("append", Shape(64, 8, 64, 16)),
]

_DECODE = [(1, 1024), (1, 4096), (1, 8192), (1, 32768), (1, 131072), (4, 4096), (8, 8192), (16, 2048), (32, 4096),
           (64, 2048), (64, 8192), (128, 2048), (256, 1024)]  # fmt: skip
_DECODE_RAGGED = [(16, 8192), (64, 4096), (128, 1024)]
# (sequences, new tokens, KV tokens): whole prompts, chunks of long ones, then turns of conversations
_PREFILL = [(1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (1, 32768, 32768), (4, 4096, 4096), (8, 2048, 2048), (32, 512, 512),
            (1, 2048, 32768), (1, 2048, 131072), (4, 512, 8704), (64, 128, 2048), (256, 64, 1024),
            (1, 64, 4096), (1, 128, 32768), (8, 32, 4096)]  # fmt: skip
_PREFILL_RAGGED = [(16, 1024, 1024), (64, 512, 512)]
_APPEND = [
    (1, 1, 1024),
    (8, 1, 4096),
    (64, 1, 4096),
    (256, 1, 1024),
    (1, 512, 512),
    (1, 2048, 2048),
    (1, 8192, 8192),
    (8, 2048, 2048),
]


def standard_workloads(kernel: str, kv_heads: int) -> list[Workload]:
    """The workloads that a kernel is tuned for by default, small ones first: what they find seeds the larger ones."""
    if kernel == "decode":
        uniform = [Workload(b, n, 1, kv_heads) for b, n in _DECODE]
        return uniform + [Workload(b, n, 1, kv_heads, ragged=True) for b, n in _DECODE_RAGGED]
    if kernel == "prefill":
        uniform = [Workload(b, n, q, kv_heads) for b, q, n in _PREFILL]
        return uniform + [Workload(b, n, q, kv_heads, ragged=True) for b, q, n in _PREFILL_RAGGED]
    return [Workload(b, n, q, kv_heads) for b, q, n in _APPEND]
