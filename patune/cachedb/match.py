"""Which entry of a tuned table answers a query. `patune export --to python` embeds this file, so it imports no patune.

An entry is a dict: the fields of its key, of its workload, its config and where that was measured. A query is a dict
of the key's and the workload's fields; its device_name, sm_count, capability, batch_size, kv_len and kv_heads may be
None: unknown, which excludes nothing. Kernel, head_dim, page_size, q_heads_per_kv, dtypes and features must agree.
"""

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

Entry = dict[str, Any]

KEY_FIELDS = (
    "kernel",
    "head_dim",
    "page_size",
    "q_heads_per_kv",
    "q_dtype",
    "kv_dtype",
    "features",
)
WORKLOAD_FIELDS = ("batch_size", "kv_len", "q_len", "kv_heads", "ragged")
PROVENANCE_FIELDS = ("gpu", "when", "triton", "torch", "driver", "source_hash", "mode")
EXACT_BATCH = 64  # batch sizes up to this are told apart
RAGGED_PENALTY = 2.0  # a workload of the other raggedness is as far away as one of four times the size

# Compute capability by a word of the device name: a config may fit one architecture's shared memory and not another's.
ARCHITECTURES = {"a100": "8.0", "l40s": "8.9", "h100": "9.0", "h200": "9.0", "gh200": "9.0", "b200": "10.0"}

_key = operator.itemgetter(*KEY_FIELDS)
_workload = operator.itemgetter(*WORKLOAD_FIELDS)


def find(entries: Iterable[Entry], query: Mapping[str, Any]) -> tuple[Entry | None, str]:
    """The entry for a query and how it came: "measured", "nearest", "transferred", or (None, "default").

    The device decides first: the same name, else the same SM count, else the nearest SM count of the same compute
    capability; of those the same model, such as an H200 SXM for an H200 NVL. Then the workload: the same, else the nearest one.
    """
    return Table(entries).find(query)


class Table:
    """Entries indexed by what must agree, with a memory of the answers given. Entries found are not to be changed."""

    def __init__(self, entries: Iterable[Entry]):
        self.entries = list(entries)
        self._groups: dict[tuple, _Group] = {}
        for entry in self.entries:
            self._groups.setdefault(_key(entry), _Group()).add(entry)

    def find(self, query: Mapping[str, Any]) -> tuple[Entry | None, str]:
        """As `find` above; the second time for the same sizes, or sizes close to them, costs two dict reads."""
        group = self._groups.get(_key(query))
        return group.find(query) if group else (None, "default")


class _Group:
    """The entries that agree in KEY_FIELDS."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.batch_sizes: set[float] = set(range(1, EXACT_BATCH + 1))
        self.kv_lens: set[float] = set()
        self.q_lens: set[float] = set()
        self.answers: dict[tuple, tuple[Entry | None, str]] = {}

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.batch_sizes.add(entry["batch_size"])
        self.kv_lens.add(entry["kv_len"])
        self.q_lens.add(entry["q_len"])

    def find(self, query: Mapping[str, Any]) -> tuple[Entry | None, str]:
        # The search itself sees the coarse sizes, so an answer does not depend on which query came first.
        batch_size = _coarse(query["batch_size"], self.batch_sizes)
        kv_len = _coarse(query["kv_len"], self.kv_lens)
        q_len = _coarse(query["q_len"], self.q_lens)
        workload = batch_size, kv_len, q_len, query["kv_heads"], query["ragged"]
        question = (
            query["device_name"],
            query["sm_count"],
            query["capability"] or _architecture(query["device_name"]),
            workload,
        )
        answer = self.answers.get(question)
        if answer is None:
            answer = self.answers[question] = _search(self.entries, *question)
        return answer


def provenance(entry: Entry) -> dict[str, Any]:
    """Where an entry's config was measured, and how fast it was in microseconds."""
    return {**{f: entry[f] for f in PROVENANCE_FIELDS}, "measured_us": entry["us"]}


def _coarse(size: float | None, known: set[float]) -> float | None:
    """The size if the table knows it, else the middle of its quarter of an octave, which is never a whole number.

    So a KV cache that grows by a token a step meets a new size 4 times while it doubles.
    """
    if size is None or size in known:
        return size
    return 2.0 ** ((math.floor(4 * math.log2(max(size, 1))) + 0.5) / 4)


def name_words(device_name: str | None) -> list[str]:
    """The words of a device name: "nvidia", "a100", "sxm4", "80gb"."""
    return (device_name or "").lower().replace("-", " ").split()


def _model(device_name: str | None) -> str | None:
    return next((word for word in name_words(device_name) if word in ARCHITECTURES), None)


def _architecture(device_name: str | None) -> str | None:
    return ARCHITECTURES.get(_model(device_name) or "")


def _search(
    entries: list[Entry],
    device_name: str | None,
    sm_count: int | None,
    capability: str | None,
    workload: tuple,
) -> tuple[Entry | None, str]:
    named = [e for e in entries if e["gpu"] == device_name]
    near = named or [e for e in entries if capability in (None, e["capability"])]
    if not near:
        return None, "default"
    if sm_count is not None:
        away = min(_octaves(e["sm_count"], sm_count) for e in near)
        near = [e for e in near if _octaves(e["sm_count"], sm_count) == away]
    if model := _model(device_name):
        near = [e for e in near if _model(e["gpu"]) == model] or near
    entry = min(
        near,
        key=lambda e: (_differs(e, workload), _distance(e, workload), _tie_break(e)),
    )
    if not named and (device_name is not None or entry["sm_count"] != sm_count):
        return entry, "transferred"
    return entry, "nearest" if _differs(entry, workload) else "measured"


def _differs(entry: Entry, workload: tuple) -> bool:
    """Whether the workload is another one than the entry's. An unknown batch size is never the same."""
    pairs = zip(workload, _workload(entry), strict=True)
    return workload[0] is None or any(asked is not None and asked != has for asked, has in pairs)


def _distance(entry: Entry, workload: tuple) -> float:
    """Octaves between two workloads; batch size times KV heads is one size, the number of pieces of work."""
    batch_size, kv_len, q_len, kv_heads, ragged = workload

    def larger(field: str, size: float | None) -> float:
        return 0.0 if size is None else math.log2(entry[field] / size)

    return (
        abs(larger("batch_size", batch_size) + larger("kv_heads", kv_heads))
        + abs(larger("kv_len", kv_len))
        + abs(larger("q_len", q_len))
        + RAGGED_PENALTY * (ragged != entry["ragged"])
    )


def _octaves(a: float, b: float) -> float:
    return abs(math.log2(a / b))


def _tie_break(entry: Entry) -> tuple:
    """An order among equally good entries that does not depend on the table's: the whole model before a part of one."""
    return (-entry["kv_heads"], *_workload(entry), entry["gpu"], entry["sm_count"])
