"""Put what was recorded anew into a landscape that ships: all keys of the kernels that the newer one has, in the place of theirs.

    python tools/ship_landscape.py patune/tables/h100.landscape.json.gz newer.json.gz

Both are of one GPU. The date and the commit are the newer one's; a key's source hash says which kernel it is of.
"""

import sys
from pathlib import Path

from patune.cachedb import landscape


def main() -> None:
    path, other = map(Path, sys.argv[1:])
    older, newer = landscape.load(path), landscape.load(other)
    if older.environment.gpu != newer.environment.gpu:
        sys.exit(f"one is of {older.environment.gpu}, the other of {newer.environment.gpu}")
    kernels = {key.kernel for key in newer.keys()}
    kept = [recording for recording in older.recordings() if recording.key.kernel not in kernels]
    landscape.write(path, newer.environment, [*kept, *newer.recordings()], recorded=newer.recorded, commit=newer.commit)


if __name__ == "__main__":
    main()
