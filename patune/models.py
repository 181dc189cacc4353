"""Attention shapes of models that people serve, by the names of the command line."""

from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides its attention kernels."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 16  # tokens; 16 is what vLLM and FlashInfer users run by default
    kv_dtype: str | None = None  # None: that of the queries


MODELS = {
    "llama-2-7b": Shape(32, 32, 128),
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-3.1-70b": Shape(64, 8, 128),
    "llama-3.2-1b": Shape(32, 8, 64),
    "llama-3.2-3b": Shape(24, 8, 128),
    "mistral-7b": Shape(32, 8, 128),
    "qwen3-8b": Shape(32, 8, 128),
    "qwen3-32b": Shape(64, 8, 128),
    "gemma-3-12b": Shape(16, 8, 256),
    "gpt-oss-20b": Shape(64, 8, 64),
    "gpt-oss-120b": Shape(64, 8, 64),
}


def model(name: str) -> Shape:
    """The shape of that model; UsageError names the known ones."""
    if name.lower() not in MODELS:
        known = ", ".join(MODELS)
        raise UsageError(f"--model: {name!r} is unknown, use one of {known}, or give --q-heads, --kv-heads and --head-dim")
    return MODELS[name.lower()]
