"""Templates by name; the only place that knows them all."""

import importlib

from ..errors import UsageError
from .template import Template

NAMES = ("decode", "prefill", "append")


def template(name: str) -> Template:
    """The template called `name`, or the one at "package.module:ATTRIBUTE" for a kernel outside patune."""
    if name in NAMES:
        return importlib.import_module(f".{name}", __package__).TEMPLATE
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"kernel {name!r} is unknown: use one of {', '.join(NAMES)}, or 'package.module:TEMPLATE'")
    return getattr(importlib.import_module(module), attribute)
