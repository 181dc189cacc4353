"""The live view of a tuning run: a table that is redrawn on a terminal, plain lines anywhere else."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..workload import Key, Workload
from .session import Event, Failed, Finished, Progress, Started

REDRAW_PER_S = 8


class ProgressView:
    """A context manager whose `on_event` takes the events of any number of `tune` calls, one after the other."""

    def __init__(self, stream: TextIO | None = None):
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._key: Key | None = None
        self._rows: dict[Workload, Event | None] = {}
        self._began = self._drawn = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def on_event(self, event: Event) -> None:
        if isinstance(event, Started):
            self._start(event)
            return
        self._rows[event.workload] = event
        if self._live is None:
            if not isinstance(event, Progress):
                self._console.print(f"{event.workload}: {_outcome(event)}", soft_wrap=True, markup=False)
        elif not isinstance(event, Progress) or time.monotonic() - self._drawn > 1 / REDRAW_PER_S:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _start(self, event: Started) -> None:
        if self._live and self._key is not None:  # the finished table of the key before stays above
            self._console.print(self._table())
        self._key, self._began = event.key, time.monotonic()
        self._rows = dict.fromkeys(event.workloads)
        if self._live is None:
            self._console.print(_title(event.key), soft_wrap=True, markup=False)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, title=_title(self._key) if self._key else None, title_justify="left")
        table.add_column("workload", no_wrap=True)
        table.add_column("", overflow="fold")
        for workload, event in self._rows.items():
            if event is not None:
                text = _progress(event) if isinstance(event, Progress) else _outcome(event)
                table.add_row(str(workload), Text(text))  # a message's brackets are no markup
        waiting = sum(event is None for event in self._rows.values())
        if waiting:
            table.add_row(f"{waiting} to come", self._time_left())
        return table

    def _time_left(self) -> str:
        """Estimated from the workloads that are done and the share of the one that runs."""
        done = sum(
            event.done / max(event.total, 1) if isinstance(event, Progress) else 1.0 for event in self._rows.values() if event
        )
        if done == 0:
            return ""
        seconds = (time.monotonic() - self._began) / done * (len(self._rows) - done)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


def _title(key: Key) -> str:
    features = f" {key.features}" if key.features else ""
    heads = "" if key.kernel == "append" else f" q_heads_per_kv={key.q_heads_per_kv}"
    return f"{key.kernel} head_dim={key.head_dim} page_size={key.page_size}{heads} {key.q_dtype}/{key.kv_dtype}{features}"


def _progress(event: Progress) -> str:
    text = f"{event.done}/{event.total} configs, {event.trials_per_s:.0f}/s"
    return text if event.best_us is None else f"{text}, best {_times(event.best_us, event.default_us)}"


def _outcome(event: Event) -> str:
    if isinstance(event, Failed):
        return f"failed: {event.message}"
    assert isinstance(event, Finished)
    config = " ".join(f"{name}={value}" for name, value in event.config.items())
    regret = "" if event.regret is None else f", {event.regret:.1%} over the optimum"
    return f"{_times(event.us, event.default_us)}{regret}, {event.evaluations} configs: {config}"


def _times(us: float, default_us: float | None) -> str:
    return f"{us:.1f} us" if default_us is None else f"{us:.1f} us, x{default_us / us:.2f} of the default's {default_us:.1f} us"
