"""Tuned tables for other repositories: JSON files named as vLLM names its own, or one Python module that stands alone."""

import ast
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import PatuneError
from .lookup import order
from .match import KEY_FIELDS, WORKLOAD_FIELDS, Entry

TABLE_KEY_FIELDS = ("kernel", "gpu", "sm_count", "capability", *KEY_FIELDS[1:])
EMBEDDED = ("cachedb/match.py", "kernels/defaults.py")  # relative to the package


def to_json(entries: Iterable[Entry], folder: Path) -> list[Path]:
    """One file per key; returns their paths. PatuneError if two keys would share a file."""
    files: dict[str, dict[str, Any]] = {}
    for key, group in _by_key(entries):
        name = _file_name(key)
        if name in files:
            raise PatuneError(f"two keys would be written to {name}: export GPUs that differ in sm_count alone one by one")
        versions = sorted({entry["triton"] for entry in group})
        files[name] = {"triton_version": ", ".join(versions)} | {_workload_name(e): e["config"] for e in group}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=4) + "\n")
    return [folder / name for name in files]


def to_python(entries: Iterable[Entry], path: Path) -> None:
    """One module that needs nothing but the standard library and answers as patune.get_best_config does."""
    imports, bodies = set(), []
    for name in EMBEDDED:
        lines, body = _split(resources.files("patune").joinpath(name).read_text())
        imports |= lines
        bodies.append(f"# From patune/{name}\n\n{body}")
    groups = _by_key(entries)
    module = MODULE.format(
        origins="\n".join(sorted({_origin(e) for _, group in groups for e in group})) or "(an empty table)",
        imports="\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line))),
        table="\n".join(line for key, group in groups for line in _table_lines(key, group)),
        embedded="\n\n\n".join(bodies),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(module)


MODULE = '''\
"""Tuned configs of Triton paged attention, exported by patune: do not edit. Standard library only.

    get_best_config("decode", head_dim=128, page_size=16, q_heads_per_kv=4, sm_count=132, batch_size=8, kv_len=8192)

Measured on:
{origins}
"""

{imports}

# fmt: off
# One (key, rows) a kernel and GPU; a row is (workload, config, where and how fast it was measured).
TABLE = [
{table}
]
# fmt: on


{embedded}


class Config(dict):
    """Values of the tunables by name; `source` is "measured", "nearest", "transferred" or "default"."""

    def __init__(self, values, source, provenance):
        super().__init__(values)
        self.source = source
        self.provenance = provenance


def get_best_config(
    kernel, *, head_dim, page_size, sm_count=None, device_name=None, q_heads_per_kv=1, q_dtype="bfloat16",
    kv_dtype=None, batch_size=None, kv_len=None, q_len=1, kv_heads=None, ragged=False, features="",
):  # fmt: skip
    """The best known config of a kernel; None means unknown, and kv_dtype None the same as q_dtype."""
    if kernel not in ("decode", "decode_hopper", "prefill", "prefill_hopper", "append"):
        raise ValueError(f"kernel: {{kernel!r}} is unknown, use one of decode, decode_hopper, prefill, prefill_hopper, append")
    query = {{
        "kernel": kernel, "head_dim": head_dim, "page_size": page_size,
        "q_heads_per_kv": 1 if kernel == "append" else q_heads_per_kv,
        "q_dtype": str(q_dtype).removeprefix("torch."), "kv_dtype": str(kv_dtype or q_dtype).removeprefix("torch."),
        "features": features, "sm_count": sm_count, "device_name": device_name, "capability": None,
        "batch_size": batch_size, "kv_len": kv_len, "q_len": q_len, "kv_heads": kv_heads, "ragged": ragged,
    }}  # fmt: skip
    entry, source = _ENTRIES.find(query)
    values, source = answer(query, entry, source, default_config(query))
    return Config(values, source, {{}} if source == "default" else provenance(entry))


_ENTRIES = Table(
    {{**key, **workload, "config": config, **measured}} for key, rows in TABLE for workload, config, measured in rows
)
'''


def _by_key(entries: Iterable[Entry]) -> list[tuple[dict[str, Any], list[Entry]]]:
    """The entries of each key with that key's fields, keys and workloads in order."""

    def key(entry: Entry) -> tuple:
        return tuple([entry[f] for f in TABLE_KEY_FIELDS])

    return [
        (dict(zip(TABLE_KEY_FIELDS, values, strict=True)), list(group))
        for values, group in groupby(sorted(entries, key=order), key)
    ]


def _file_name(key: dict[str, Any]) -> str:
    parts = [
        key["kernel"],
        f"head_dim={key['head_dim']}",
        f"page_size={key['page_size']}",
        f"q_heads_per_kv={key['q_heads_per_kv']}",
        f"device_name={key['gpu'].replace(' ', '_').replace('/', '_')}",
        f"dtype={key['q_dtype']}",
    ]
    if key["kv_dtype"] != key["q_dtype"]:
        parts.append(f"kv_dtype={key['kv_dtype']}")
    if key["features"]:
        parts.append(f"features={key['features'].replace(',', '+')}")
    return ",".join(parts) + ".json"


def _workload_name(entry: Entry) -> str:
    sizes = ",".join(f"{f}={entry[f]}" for f in ("batch_size", "kv_heads", "q_len", "kv_len"))
    return sizes + (",ragged" if entry["ragged"] else "")


def _origin(entry: Entry) -> str:
    return (
        f"- {entry['gpu']}, driver {entry['driver']}, triton {entry['triton']}, torch {entry['torch']}, "
        f"{entry['kernel']} kernel {entry['source_hash']}"
    )


def _table_lines(key: dict[str, Any], group: Sequence[Entry]) -> list[str]:
    lines = [f"    ({_literal(key)}, ["]
    for entry in group:
        workload = {f: entry[f] for f in WORKLOAD_FIELDS}
        measured = {f: v for f, v in entry.items() if f not in key and f not in workload and f != "config"}
        lines.append(f"        ({_literal(workload)}, {_literal(entry['config'])}, {_literal(measured)}),")
    return [*lines, "    ]),"]


def _literal(row: dict[str, Any]) -> str:
    """A dict as Python source, strings in double quotes."""
    quoted = {k: json.dumps(v) if isinstance(v, str) else repr(v) for k, v in row.items()}
    return "{" + ", ".join(f'"{k}": {v}' for k, v in quoted.items()) + "}"


def _split(source: str) -> tuple[set[str], str]:
    """A module's top-level import lines, and the rest without its docstring."""
    tree = ast.parse(source)
    lines = source.splitlines()
    imports, dropped = set(), set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.add(ast.unparse(node))
        elif node is not tree.body[0] or ast.get_docstring(tree) is None:
            continue
        dropped |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
    return imports, "\n".join(line for i, line in enumerate(lines) if i not in dropped).strip()
