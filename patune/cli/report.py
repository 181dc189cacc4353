"""Tuned configs as tables that a person reads. A row is one workload of `patune run --json`, or more than that."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..workload import Key, Workload

Row = Mapping[str, Any]

WIDTH = 200  # where nothing tells how wide the page is: no table is folded
LEGEND = "B: sequences, q: new tokens a sequence (1), L: KV tokens a sequence, h: KV heads (8)"


def print_tables(keys: Sequence[Mapping[str, Any]]) -> None:
    """Each of the "keys" of a document as a table on stdout."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
    for part in keys:
        console.print(_table(Key(**part["key"]), part["workloads"]))
    if keys:
        console.print(LEGEND)


def title(key: Key) -> str:
    group = "" if key.kernel == "append" else f", q_heads_per_kv {key.q_heads_per_kv}"
    dtypes = key.q_dtype if key.kv_dtype == key.q_dtype else f"{key.q_dtype} with {key.kv_dtype} KV"
    features = f", {key.features}" if key.features else ""
    return f"{key.kernel} on {key.gpu}: head_dim {key.head_dim}, page_size {key.page_size}{group}, {dtypes}{features}"


def _table(key: Key, rows: Sequence[Row]) -> Table:
    tunables = list(dict.fromkeys(name for row in rows for name in row["config"]))
    optional = [name for name in ("regret", "mode", "when") if any(row.get(name) is not None for row in rows)]
    table = Table(title=title(key), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload", no_wrap=True)
    for name in (*tunables, "us", "default us", "speedup", "configs", *optional):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        values = [str(row["config"].get(name, "")) for name in tunables]
        table.add_row(str(Workload(**row["workload"])), *values, *_times(row), *(_cell(name, row) for name in optional))
    return table


def _times(row: Row) -> list[str]:
    us, default_us = row["us"], row["default_us"]
    default = ["wrong", ""] if default_us is None else [f"{default_us:.1f}", f"x{default_us / us:.2f}"]
    return [f"{us:.1f}", *default, str(row["evaluations"])]


def _cell(name: str, row: Row) -> str:
    value = row.get(name)
    if value is None:
        return ""
    return f"{value:.1%}" if name == "regret" else str(value)[:10]
