"""The live view of a tuning run: what each device does, on a terminal; a plain line for every workload, anywhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..workload import Key, Workload
from .events import Event, Failed, Finished, Progress, Started

REDRAW_PER_S = 8


class ProgressView:
    """A context manager whose `on_event` takes the events of a `tune` call. `live=False`: plain lines on a terminal too."""

    def __init__(self, stream: TextIO | None = None, live: bool = True):
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False) if live and self._console.is_terminal else None
        self._key: Key | None = None  # of the line before
        self._devices: dict[str, Progress | None] = {}
        self._running: dict[tuple[Key, Workload], Progress] = {}
        self._total = self._done = 0
        self._began = self._drawn = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.update(Text(), refresh=True)
            self._live.stop()

    def on_event(self, event: Event) -> None:
        if isinstance(event, Started):
            self._began, self._total = time.monotonic(), event.workloads
            self._devices = dict.fromkeys(event.devices)
        elif isinstance(event, Progress):
            self._devices[event.device] = self._running[event.key, event.workload] = event
        else:
            self._done += 1
            self._running.pop((event.key, event.workload), None)
            self._print(event)
        if self._live and (not isinstance(event, Progress) or time.monotonic() - self._drawn > 1 / REDRAW_PER_S):
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _print(self, event: Finished | Failed) -> None:
        if event.key != self._key:
            self._key = event.key
            self._console.print(_title(event.key), soft_wrap=True, markup=False)
        self._console.print(f"{event.workload}: {_outcome(event)}", soft_wrap=True, markup=False)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for device, event in self._devices.items():
            name = "" if len(self._devices) == 1 else f"GPU {device}"
            if event is None or (event.key, event.workload) not in self._running:
                table.add_row(name, "", "...")
            else:
                table.add_row(name, f"{event.key.kernel} {event.workload}", Text(_progress(event)))
        table.add_row("", f"{self._done}/{self._total} workloads", self._time_left())
        return table

    def _time_left(self) -> str:
        """Estimated from the workloads that are done and the shares of those that run."""
        done = self._done + sum(event.done / max(event.total, 1) for event in self._running.values())
        if done == 0:
            return ""
        seconds = (time.monotonic() - self._began) / done * max(0.0, self._total - done)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


def _title(key: Key) -> str:
    features = f" {key.features}" if key.features else ""
    heads = "" if key.kernel == "append" else f" q_heads_per_kv={key.q_heads_per_kv}"
    return f"{key.kernel} head_dim={key.head_dim} page_size={key.page_size}{heads} {key.q_dtype}/{key.kv_dtype}{features}"


def _progress(event: Progress) -> str:
    text = f"{event.done}/{event.total} configs, {event.trials_per_s:.0f}/s"
    return text if event.best_us is None else f"{text}, best {_times(event.best_us, event.default_us)}"


def _outcome(event: Finished | Failed) -> str:
    if isinstance(event, Failed):
        return f"failed: {event.message}"
    config = " ".join(f"{name}={value}" for name, value in event.config.items())
    regret = "" if event.regret is None else f", {event.regret:.1%} over the optimum"
    note = f" ({event.note})" if event.note else ""
    return f"{_times(event.us, event.default_us)}{regret}, {event.evaluations} configs: {config}{note}"


def _times(us: float, default_us: float | None) -> str:
    return f"{us:.1f} us" if default_us is None else f"{us:.1f} us, x{default_us / us:.2f} of the default's {default_us:.1f} us"
