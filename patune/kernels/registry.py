"""Templates by name; the only place that knows them all."""

import importlib

from ..errors import UsageError
from .template import Template

NAMES = ("decode", "prefill", "prefill_hopper", "append")


def candidates(kernel: str, capability: str | None, head_dim: int, page_size: int) -> tuple[str, ...]:
    """The templates that can run a kernel's calls of a shape on a GPU; where there are several, the table knows the faster one."""
    hopper = capability == "9.0" and head_dim in (64, 128, 256) and page_size in (8, 16, 32, 64, 128, 256)
    return ("prefill", "prefill_hopper") if kernel == "prefill" and hopper else (kernel,)


def template(name: str) -> Template:
    """The template called `name`, or the one at "package.module:ATTRIBUTE" for a kernel outside patune."""
    if name in NAMES:
        return importlib.import_module(f".{name}", __package__).TEMPLATE
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"kernel {name!r} is unknown: use one of {', '.join(NAMES)}, or 'package.module:TEMPLATE'")
    return getattr(importlib.import_module(module), attribute)
