"""Templates by name; the only place that knows them all."""

import functools
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path

from ..errors import UsageError
from .template import Template

OF_KERNEL = {"decode": ("decode", "decode_hopper"), "prefill": ("prefill", "prefill_hopper"), "append": ("append",)}
NAMES = tuple(name for names in OF_KERNEL.values() for name in names)
FP8 = ("float8_e4m3fn", "float8_e5m2")
ENTRY_POINTS = "patune.templates"  # the group in which an installed package names its templates


def candidates(
    kernel: str,
    capability: str | None,
    head_dim: int,
    page_size: int,
    rows: int = 1,
    q_dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
) -> tuple[str, ...]:
    """The templates that can run a kernel's calls of a shape on a GPU, first the one to take where the table cannot tell.

    rows: a decode's queries for a KV head. q_dtype, kv_dtype: names as in a Key.
    """
    shape = head_dim in (64, 128, 256) and page_size in (8, 16, 32, 64, 128, 256)
    types = {"prefill": (q_dtype,), "decode": (q_dtype, *FP8)}  # of the cache
    hopper = capability == "9.0" and shape and q_dtype in ("bfloat16", "float16") and kv_dtype in types.get(kernel, ())
    if hopper and (kernel == "prefill" or rows <= 16):
        return OF_KERNEL[kernel][::-1]
    return (kernel,)


@functools.cache
def template(name: str) -> Template:
    """The template called `name`: one of patune's, one that an installed package names, or that at "package.module:ATTRIBUTE"
    or "path/to/file.py:ATTRIBUTE". UsageError if there is none."""
    if name in NAMES:
        return importlib.import_module(f".{name}", __package__).TEMPLATE
    place, _, attribute = name.rpartition(":")
    named = entry_points(group=ENTRY_POINTS, name=name)
    if not place and not named:
        raise UsageError(
            f"kernel {name!r} is unknown: use one of {', '.join(NAMES)}, 'package.module:TEMPLATE' or 'path/to/file.py:TEMPLATE'"
        )
    try:
        found = next(iter(named)).load() if named else getattr(_module(place), attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise UsageError(f"kernel {name!r} cannot be loaded: {error}") from error
    if not isinstance(found, Template):
        raise UsageError(f"kernel {name!r} is a {type(found).__name__}, not a patune.kernels.template.Template")
    return found


def _module(place: str):
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module
