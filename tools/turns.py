"""Cases for a referee besides its own: few new tokens behind long prefixes, groups of all sizes, chunks that fill waves badly.

    python tools/turns.py OUT.json

A case is (name, new tokens of each sequence, KV tokens of each, query heads, KV heads, head_dim, page size), as `referee.py
prefill --cases` reads them.
"""

import json
import sys
from pathlib import Path

Case = tuple[str, list[int], list[int], int, int, int, int]


def case(
    name: str, batch: int, q_len: int, kv_len: int, q_heads: int = 32, kv_heads: int = 8, head_dim: int = 128, page: int = 16
) -> Case:
    return name, [q_len] * batch, [kv_len] * batch, q_heads, kv_heads, head_dim, page


CASES = [
    case("B1 q600 L32k", 1, 600, 32768),
    case("B1 q576 L8k", 1, 576, 8192),
    case("B1 q1100 L32k", 1, 1100, 32768),
    case("B2 q300 L16k", 2, 300, 16384),
    case("B1 q640 L4k", 1, 640, 4096),
    case("g8 B1 q300 L16k p64", 1, 300, 16384, q_heads=64, page=64),
    case("d64 g8 B1 q300 L20k", 1, 300, 20480, q_heads=64, head_dim=64),
    case("g5 B4 q300 L5k", 4, 300, 5000, q_heads=40),
    case("g7 B2 q1000 L9k", 2, 1000, 9000, q_heads=28, kv_heads=4),
    case("g5 B8 q32 L4k", 8, 32, 4096, q_heads=40),
    case("g7 B8 q16 L4k", 8, 16, 4096, q_heads=28, kv_heads=4),
    case("g3 B16 q8 L8k", 16, 8, 8192, q_heads=24),
    case("g6 d64 B8 q20 L4k", 8, 20, 4096, q_heads=48, head_dim=64),
    case("g7 B2 q64 L16k", 2, 64, 16384, q_heads=28, kv_heads=4),
    case("B1 q128 L32k", 1, 128, 32768),
    case("B1 q64 L4k", 1, 64, 4096),
    case("B8 q32 L4k", 8, 32, 4096),
    case("B64 q128 L2k", 64, 128, 2048),
    case("B256 q64 L1k", 256, 64, 1024),
    case("B1 q512 L128k", 1, 512, 131072),
    case("B32 q17 L3k p64", 32, 17, 3000, page=64),
    case("MHA B2 q2000 L2000", 2, 2000, 2000, kv_heads=32),
    case("d64 g8 B1 q128 L32k", 1, 128, 32768, q_heads=64, head_dim=64),
    case("d64 g8 B16 q100 L3k", 16, 100, 3000, q_heads=64, head_dim=64),
    case("d256 g2 B1 q200 L16k", 1, 200, 16384, q_heads=16, head_dim=256, page=32),
    case("g8 tp8 B8 q512 L8k", 8, 512, 8192, q_heads=8, kv_heads=1),
]

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(CASES) + "\n")
