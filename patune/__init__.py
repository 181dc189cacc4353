"""patune: Triton paged attention, tuned. See README.md and `patune --help`.

Importing patune imports neither torch nor triton; each name below loads what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "Config": "kernels.config",
    "get_best_config": "kernels.config",
    "get_batch_indices_positions": "kernels.indices",
    "reference_paged_attention": "kernels.reference",
    "append_paged_kv_cache": "kernels.api",
    "merge_states": "kernels.api",
    "paged_attention_with_cache": "kernels.api",
    "paged_decode": "kernels.api",
    "paged_prefill": "kernels.api",
}
__all__ = [
    "Config",
    "append_paged_kv_cache",
    "get_batch_indices_positions",
    "get_best_config",
    "merge_states",
    "paged_attention_with_cache",
    "paged_decode",
    "paged_prefill",
    "reference_paged_attention",
]

if TYPE_CHECKING:
    from .kernels.api import (
        append_paged_kv_cache,
        merge_states,
        paged_attention_with_cache,
        paged_decode,
        paged_prefill,
    )
    from .kernels.config import Config, get_best_config
    from .kernels.indices import get_batch_indices_positions
    from .kernels.reference import reference_paged_attention


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'patune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
