"""The same candidate with the plain prefill template alone, which is what GPUs other than Hopper run."""

import sys
from pathlib import Path

from patune.kernels import prefill_hopper

sys.path.insert(0, str(Path(__file__).parent))
from candidate import prefill  # noqa: F401

prefill_hopper.candidates = lambda *_, **__: ("prefill",)
