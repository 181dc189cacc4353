"""What a tuning run shows: lines in a file, a table on a terminal, the same facts in both."""

import io
from dataclasses import replace

from patune.tuner import progress
from patune.tuner.events import Failed, Finished, Progress, Started
from patune.tuner.progress import ProgressView
from patune.workload import Workload
from tests.tuner.formula import ENVIRONMENT, KEY, OPTIMUM, WORKLOAD

OTHER = replace(KEY, head_dim=64)
EVENTS = [
    Started(4, ENVIRONMENT, "measured", ("0", "1")),
    Progress(KEY, WORKLOAD, "0", ("ok",) * 16, 16, 48, 12.0, 15.0, 80.0),
    Progress(OTHER, WORKLOAD, "1", ("ok",) * 8, 8, 64, None, None, 40.0),
    Finished(KEY, WORKLOAD, OPTIMUM, 10.0, 15.0, 48, 9.9, 0.0101),
    Failed(KEY, Workload(1, 8192), "no [tensors]"),
    Finished(OTHER, WORKLOAD, OPTIMUM, 11.0, None, 64, note="times were noisy"),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream):
    with ProgressView(stream) as view:
        for event in EVENTS:
            view.on_event(event)
    return stream.getvalue()


def test_file_gets_plain_lines():
    """Where nobody watches, every workload is one line without control characters, when it is done."""
    best = "BLOCK_N=64 num_warps=4 num_splits=12"
    lines = shown(io.StringIO()).splitlines()
    assert lines == [
        "decode head_dim=128 page_size=16 q_heads_per_kv=4 bfloat16/bfloat16",
        f"B8 L4096: 10.0 us, x1.50 of the default's 15.0 us, 1.0% over the optimum, 48 configs: {best}",
        "B1 L8192: failed: no [tensors]",
        "decode head_dim=64 page_size=16 q_heads_per_kv=4 bfloat16/bfloat16",
        f"B8 L4096: 11.0 us, 64 configs: {best} (times were noisy)",
    ]


def test_terminal_gets_progress(monkeypatch):
    """On a terminal there is also what each GPU is at: the rate, the best time so far; and the time left."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(progress, "REDRAW_PER_S", 1e9)
    text = shown(Terminal())
    assert "16/48 configs, 80/s, best 12.0 us, x1.25 of the default's 15.0 us" in text
    assert "failed: no [tensors]" in text
    assert "GPU 0  decode B8 L4096" in text
    assert "GPU 1  decode B8 L4096  8/64 configs, 40/s" in text
    assert "2/4 workloads" in text and " left" in text
