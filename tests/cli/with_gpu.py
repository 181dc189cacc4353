"""`patune` on a machine that seems to have $GPUS H100s; kernels run in Triton's interpreter. Run as a program, by tests."""

import os

from patune.cli import source
from patune.cli.main import main

if __name__ == "__main__":
    source.visible_gpus = lambda: ["NVIDIA H100 80GB HBM3"] * int(os.environ["GPUS"])
    main(prog_name="patune")
