"""Put what was recorded anew into a landscape that ships: all keys of the kernels that the newer one has, in the place of theirs.

    python tools/ship_landscape.py patune/tables/h100.landscape.json.gz newer.json.gz

Both are of one GPU. The date and the commit are the newer one's; a key's source hash says which kernel it is of.
"""

import gzip
import json
import sys
from pathlib import Path


def joined(older: dict, newer: dict) -> dict:
    if older["environment"]["gpu"] != newer["environment"]["gpu"]:
        sys.exit(f"one is of {older['environment']['gpu']}, the other of {newer['environment']['gpu']}")
    kernels = {part["key"]["kernel"] for part in newer["keys"]}
    keys = [part for part in older["keys"] if part["key"]["kernel"] not in kernels] + newer["keys"]
    return {**newer, "keys": sorted(keys, key=lambda part: tuple(part["key"].values()))}


def main() -> None:
    path, other = map(Path, sys.argv[1:])
    older, newer = (json.loads(gzip.decompress(file.read_bytes())) for file in (path, other))
    text = json.dumps(joined(older, newer), separators=(",", ":"), allow_nan=False)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
