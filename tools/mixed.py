"""What a mixed batch costs beside its parts run alone: the mixed operator against append, prefill and decode, on a GPU host.

    python tools/mixed.py OUT.json [--commit HASH]

The shape is llama-3.1-8b's. CUDA-graph replay, shuffled pages, page tables in rotation as for the tuner; the table's configs.
OUT has microseconds of each part and of the whole, with its tokens' positions given (as to all layers but one) and without, the
whole's time over its parts', and the host's microseconds for an eager call of the whole.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import patune
from patune.kernels.problem import COLD_BYTES, MAX_SETS, PagedInputs
from patune.kernels.registry import NAMES, template
from patune.models import model
from patune.tuner.timing import Clock, clock
from patune.tuner.worker import environment_of
from patune.workload import Key, Workload

MODEL = "llama-3.1-8b"
ROUNDS = 15
HOST_CALLS = 20  # eager ones in a row, so that the GPU's queue is not full
POOL_BYTES = 24e9  # the most that the sets of a mix may take


@dataclass(frozen=True)
class Mix:
    """The lengths of a batch, in the place of a Workload's."""

    chunks: tuple[tuple[int, int], ...]  # new tokens and KV tokens of each prefill
    decodes: tuple[int, ...]  # KV tokens of each
    kv_heads: int = model(MODEL).kv_heads

    def q_lens(self) -> list[int]:
        return [q for q, _ in self.chunks] + [1] * len(self.decodes)

    def kv_lens(self) -> list[int]:
        return [n for _, n in self.chunks] + list(self.decodes)


MIXES = {
    "1 × 512 + 64 × 4k": Mix(((512, 512),), (4096,) * 64),
    "1 × 2048 of 10k + 32 × 8k": Mix(((2048, 10240),), (8192,) * 32),
    "4 × 256 + 128 × 2k, ragged": Mix(((256, 256),) * 4, tuple(Workload(128, 2048, ragged=True).kv_lens())),
    "1 × 8192 + 256 × 1k": Mix(((8192, 8192),), (1024,) * 256),
    "1 × 128 + 8 × 32k": Mix(((128, 128),), (32768,) * 8),
    "1 × 512 of 128k + 16 × 2k": Mix(((512, 131072),), (2048,) * 16),
    "8 × 1024, ragged, + 1 × 8k": Mix(tuple((n, n) for n in Workload(8, 1024, 1024, ragged=True).q_lens()), (8192,)),
    "1 × 64 of 4k + 1 × 4k": Mix(((64, 4096),), (4096,)),
}


class Batch(PagedInputs):
    """The tensors of a mix, and its calls on one of their sets."""

    def __init__(self, key: Key, mix: Mix, device: str):
        q, n = sum(q for q, _ in mix.chunks), len(mix.chunks)
        token_bytes = 2 * mix.kv_heads * key.head_dim * 2  # a token's K and V, of 16 bits
        rows_bytes = token_bytes * key.q_heads_per_kv  # a token's query and output
        smaller = min(sum(k for _, k in mix.chunks) * token_bytes + q * rows_bytes, sum(mix.decodes) * token_bytes)
        most = max(2, min(MAX_SETS, int(POOL_BYTES // (sum(mix.kv_lens()) * token_bytes))))
        sets = min(most, max(2, -(-int(COLD_BYTES) // smaller)))  # each part alone finds its KV cold too
        super().__init__(key, mix, device, seed=0, sets=sets, bytes_per_set=smaller)
        tokens, heads = sum(self.q_lens), mix.kv_heads * key.q_heads_per_kv
        self.q = [self.randn(tokens, heads, key.head_dim) for _ in range(sets)]
        self.k = self.randn(tokens, mix.kv_heads, key.head_dim)
        self.rows, self.prefills, self.longest = q, n, max(q for q, _ in mix.chunks)
        self.pages = int(self.kv_indptr[n])  # of the prefills
        self.placed = patune.get_batch_indices_positions(self.qo_indptr, self.int32(self.kv_lens), tokens)
        self.decode_indptr = self.kv_indptr[n:] - self.pages

    def append(self, r: int) -> None:
        table = self.kv_indices[r], self.kv_indptr, self.kv_last_page_len
        patune.append_paged_kv_cache(self.k, self.k, *self.placed, self.kv, *table)

    def prefill(self, r: int) -> torch.Tensor:
        n = self.prefills
        table = self.kv_indices[r][: self.pages], self.kv_indptr[: n + 1], self.kv_last_page_len[:n]
        return patune.paged_prefill(self.q[r][: self.rows], self.kv, self.qo_indptr[: n + 1], *table, max_q_len=self.longest)

    def decode(self, r: int) -> torch.Tensor:
        table = self.kv_indices[r][self.pages :], self.decode_indptr, self.kv_last_page_len[self.prefills :]
        return patune.paged_decode(self.q[r][self.rows :], self.kv, *table, max_kv_len=max(self.kv_lens[self.prefills :]))

    def whole(self, r: int, **placed: torch.Tensor) -> torch.Tensor:
        return patune.paged_attention_with_cache(
            self.q[r], self.k, self.k, self.kv, self.qo_indptr, self.kv_indices[r], self.kv_indptr, self.kv_last_page_len,
            num_prefill=self.prefills, num_decode=len(self.kv_lens) - self.prefills, max_q_len=self.longest,
            max_kv_len=max(self.kv_lens[self.prefills :]), **placed,
        )  # fmt: skip

    def placed_whole(self, r: int) -> torch.Tensor:
        return self.whole(r, batch_indices=self.placed[0], positions=self.placed[1])


def cost(clock: Clock, mix: Mix, key: Key, rounds: int = ROUNDS) -> dict:
    """Microseconds of a mix and of its parts; exits where the whole is not what its parts give."""
    batch = Batch(key, mix, clock.device)
    whole, parts = batch.whole(0).float(), torch.cat([batch.prefill(0), batch.decode(0)]).float()
    if not (error := (whole - parts).norm() / parts.norm()) <= 1e-2:
        sys.exit(f"{mix}: the whole is off its parts by {error:.2g}")
    calls: dict[str, Callable] = {name: getattr(batch, name) for name in ("whole", "placed_whole", "append", "prefill", "decode")}
    host_us = statistics.median(_host_us(clock, batch) for _ in range(rounds))
    replays = {}
    for name, call in calls.items():
        once = [lambda call=call, r=r: call(r) for r in range(batch.sets)]
        for run in once:  # nothing compiles under capture
            run()
        replays[name] = clock.capture(once)
    samples: dict[str, list[float]] = {name: [] for name in replays}
    names = list(replays)
    for n in range(rounds):
        order = names[n % len(names) :] + names[: n % len(names)]
        taken = clock.lap(replays[order[0]], [replays[name] for name in order])
        for name, us in zip(order, taken):
            samples[name].append(us / batch.sets)
    us = {name: statistics.median(values) for name, values in samples.items()}
    parts_us = us["append"] + us["prefill"] + us["decode"]
    over = {name: us[name] / parts_us for name in ("whole", "placed_whole")}
    over_attention = us["whole"] / (us["prefill"] + us["decode"])
    return {"us": us, "over_parts": over, "over_attention": over_attention, "host_us": host_us, "sets": batch.sets}


def _host_us(clock: Clock, batch: Batch) -> float:
    """Microseconds that an eager call of the whole takes to return."""
    clock.synchronize()
    began = time.perf_counter()
    for _ in range(HOST_CALLS):
        batch.whole(0)
    return (time.perf_counter() - began) / HOST_CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    timer, shape = clock(), model(MODEL)
    environment = environment_of(timer)
    key = Key("mixed", environment.gpu, environment.sm_count, shape.head_dim, shape.page_size, shape.q_heads // shape.kv_heads)
    document = asdict(environment) | {
        "commit": args.commit, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source_hash": {name: template(name).source_hash for name in NAMES}, "model": MODEL, "rounds": ROUNDS, "mixes": {},
    }  # fmt: skip
    for name, mix in MIXES.items():
        document["mixes"][name] = found = cost(timer, mix, key)
        times = ", ".join(f"{part} {us:.1f}" for part, us in found["us"].items())
        print(f"{name}: {times} us, x{found['over_parts']['whole']:.3f} of its parts", flush=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
