"""What is tuned for: `Key` says which compiled kernel, `Workload` which sizes it meets."""

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """One row of the table of tuned kernels: everything that is fixed for a model on a GPU."""

    kernel: str  # "decode", "prefill" or "append"
    gpu: str  # the device name as the driver gives it, such as "NVIDIA H100 80GB HBM3"
    sm_count: int  # streaming multiprocessors of that GPU
    head_dim: int
    page_size: int  # tokens a page
    q_heads_per_kv: int  # query heads that share one KV head; 1 for append, which has no queries
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    features: str = ""  # comma-separated, sorted: "sinks", "sliding_window", "soft_cap"


@dataclass(frozen=True, slots=True, order=True)
class Workload:
    """Sizes of one call. Lengths are means over the batch; `ragged` spreads them log-normally around it."""

    batch_size: int  # sequences
    kv_len: int  # KV tokens a sequence, the new ones included
    q_len: int = 1  # new tokens a sequence
    kv_heads: int = 8
    ragged: bool = False

    def kv_lens(self) -> list[int]:
        """KV tokens of each sequence; always the same list for the same workload."""
        if self.q_len == 1:
            return self._spread(self.kv_len)
        return [q + self.kv_len - self.q_len for q in self.q_lens()]

    def q_lens(self) -> list[int]:
        """New tokens of each sequence. A ragged prefill varies these and keeps the cached prefix's length."""
        return [1] * self.batch_size if self.q_len == 1 else self._spread(self.q_len)

    def distance(self, other: "Workload") -> float:
        """Octaves between the sizes; batch times KV heads is one size, and raggedness counts as two octaves."""
        sizes = ((w.batch_size * w.kv_heads, w.kv_len, w.q_len) for w in (self, other))
        return sum(abs(math.log2(a / b)) for a, b in zip(*sizes)) + 2.0 * (self.ragged != other.ragged)

    def _spread(self, mean: int) -> list[int]:
        if not self.ragged:
            return [mean] * self.batch_size
        rng = random.Random(self.batch_size)
        raw = [math.exp(0.8 * rng.gauss(0.0, 1.0)) for _ in range(self.batch_size)]  # 0.8: longest of 64 about 6x the mean
        scale = mean * self.batch_size / sum(raw)
        return [max(1, int(x * scale)) for x in raw]

    def __str__(self) -> str:
        q = "" if self.q_len == 1 else f" q{self.q_len}"
        heads = "" if self.kv_heads == 8 else f" h{self.kv_heads}"
        return f"B{self.batch_size}{q} L{self.kv_len}{heads}{' ragged' if self.ragged else ''}"
