"""What a tuning run shows: lines in a file, a table on a terminal, the same facts in both."""

import io

from patune.tuner.progress import ProgressView
from patune.tuner.session import Failed, Finished, Progress, Started
from patune.workload import Workload
from tests.tuner.formula import ENVIRONMENT, KEY, OPTIMUM, WORKLOAD

EVENTS = [
    Started(KEY, (WORKLOAD, Workload(1, 8192), Workload(64, 8192)), ENVIRONMENT, "measured"),
    Progress(WORKLOAD, 16, 48, 12.0, 15.0, 80.0),
    Finished(WORKLOAD, OPTIMUM, 10.0, 15.0, 48, 9.9, 0.0101),
    Failed(Workload(1, 8192), "no [tensors]"),
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
    ]


def test_terminal_gets_progress(monkeypatch):
    """On a terminal there are also the rate, the best time so far and the time left."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    text = shown(Terminal())
    assert "16/48 configs, 80/s, best 12.0 us, x1.25 of the default's 15.0 us" in text
    assert "failed: no [tensors]" in text
    assert "1 to come" in text and " left" in text
