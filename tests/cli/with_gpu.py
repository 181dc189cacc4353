"""`patune` on a machine that seems to have an H100; kernels run in Triton's interpreter. Run as a program, by tests."""

from patune.cli import source
from patune.cli.main import main

if __name__ == "__main__":
    source.visible_gpus = lambda: ["NVIDIA H100 80GB HBM3"]
    main(prog_name="patune")
