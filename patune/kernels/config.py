"""get_best_config: the table's answer, or the default's, as a frozen mapping that says where it came from.

Neither triton nor a GPU is needed; torch is imported only to ask which GPU is there.
"""

import functools
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from ..cachedb import lookup
from ..errors import UsageError
from .defaults import answer, default_config
from .registry import ENTRY_POINTS, NAMES


class Config(Mapping[str, int]):
    """One point of a search space, frozen; `.source` says how it was found and `.provenance` who measured it.

    source: "measured" (this workload, on this GPU), "nearest" (a neighbouring workload), "transferred" (another GPU of
    this architecture), "default" (a rule; provenance is empty), or "given" (the caller's own).
    """

    __slots__ = ("_values", "provenance", "source")
    _values: dict[str, int]
    source: str
    provenance: dict[str, Any]

    def __init__(self, values: Mapping[str, int], source: str = "given", provenance: Mapping[str, Any] | None = None):
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "provenance", dict(provenance or {}))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Config is frozen; dict(config) gives a copy to change ({name})")

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._values.items())))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self._values.items())
        return f"Config({values}; source={self.source})"


def get_best_config(
    kernel: str,
    *,
    head_dim: int,
    page_size: int,
    sm_count: int | None = None,
    device_name: str | None = None,
    q_heads_per_kv: int = 1,
    q_dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    batch_size: int | None = None,
    kv_len: int | None = None,
    q_len: int = 1,
    kv_heads: int | None = None,
    ragged: bool = False,
    features: str = "",
) -> Config:
    """The best known config of a kernel for a workload.

    kernel: "decode", "prefill", "append", "decode_hopper" and "prefill_hopper" (what paged_decode and paged_prefill prefer on a
    Hopper), or a template outside patune, as `patune run --kernel` takes it; without an entry that one's config is empty.
    page_size in tokens; kv_len and q_len are mean tokens a sequence; ragged if the longest sequence is at least twice the mean.
    kv_dtype defaults to q_dtype. With neither device_name nor sm_count, the current CUDA device is meant if there is one. Looks
    in the user's table, then in the ones that ship with patune: this workload, else the nearest one, else another GPU of the same
    architecture, else a rule; `.source` says which.

    Raises UsageError (a ValueError) for an unknown kernel or a size below 1.
    """
    return find(query_for(**locals()))


def query_for(kernel: str, **sizes: Any) -> dict:
    """What the table is asked by get_best_config with these arguments, all of them; UsageError as there."""
    if kernel not in NAMES and not _is_outside(kernel):
        raise UsageError(f"kernel: {kernel!r} is unknown, use one of {', '.join(NAMES)}")
    for name in ("head_dim", "page_size", "q_heads_per_kv", "q_len", "sm_count", "batch_size", "kv_len", "kv_heads"):
        value, optional = sizes[name], name in ("sm_count", "batch_size", "kv_len", "kv_heads")
        if not (value is None and optional) and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name}: expected an int of at least 1, got {value!r}")
    query = {"kernel": kernel, "capability": None, **sizes}
    query |= {"q_dtype": _plain(sizes["q_dtype"]), "kv_dtype": _plain(sizes["kv_dtype"] or sizes["q_dtype"])}
    if kernel == "append":
        query["q_heads_per_kv"] = 1
    if sizes["device_name"] is None and sizes["sm_count"] is None:
        query["device_name"], query["sm_count"], query["capability"] = _current_device()
    return query


def find(query: dict, *, table: lookup.Table | None = None) -> Config:
    """get_best_config for a query that is already complete and valid; what the kernels call. table: in place of this process's."""
    return _answer(query, *(table or lookup.table()).find(query))


def _answer(query: dict, entry: dict | None, source: str) -> Config:
    """The config for a query from what the table has for it."""
    default = default_config(query) if query["kernel"] in NAMES else {}
    values, source = answer(query, entry, source, default)
    return Config(values, source, lookup.provenance(entry) if entry and source != "default" else None)


def find_either(first: dict, second: dict, *, table: lookup.Table | None = None) -> tuple[str, Config]:
    """The kernel to take for a call that two can do: the faster one if the table has both for this workload, else the first.

    That the second one was faster on a neighbour says little: left out in turn, workloads of an H200's landscape whose neighbours
    decided took 4.9% more than the best of both in the geometric mean, decodes, and 51% at most; with the first one 3.4% and 22%.
    """
    found = [(query, *(table or lookup.table()).find(query)) for query in (first, second)]
    (_, a, _), (_, b, _) = found
    measured = a and b and a["gpu"] == b["gpu"] and all(a[field] == b[field] == first[field] for field in lookup.WORKLOAD_FIELDS)
    query, entry, source = found[bool(measured and a and b and b["us"] < a["us"])]
    return query["kernel"], _answer(query, entry, source)


@functools.cache
def _is_outside(kernel: str) -> bool:
    return ":" in kernel or bool(entry_points(group=ENTRY_POINTS, name=kernel))


def _plain(dtype: object) -> str:
    """ "bfloat16" for "bfloat16" and torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _current_device() -> tuple[str | None, int | None, str | None]:
    import torch

    if not torch.cuda.is_available():
        return None, None, None
    from .device import cuda_device

    return cuda_device(torch.cuda.current_device())
