"""`patune lookup`: the config that a kernel call would get, and why."""

import json
import os
from pathlib import Path

import click

from ..errors import UsageError
from . import gpus, tables
from .options import AT_LEAST_1, AUTO, FLOATS, GPU_OR_AUTO, as_json, database
from .plan import KERNELS

MEANINGS = {
    "measured": "tuned for this workload on this GPU",
    "nearest": "tuned for a neighbouring workload on this GPU",
    "transferred": "tuned on another GPU",
    "default": "a rule, nothing that fits is tuned",
}


@click.command(short_help="Print the config that a kernel call gets.")
@click.option("--kernel", type=click.Choice(KERNELS), required=True)
@click.option("--head-dim", type=AT_LEAST_1, required=True)
@click.option("--page-size", type=AT_LEAST_1, required=True, help="Tokens a page.")
@click.option("--q-heads-per-kv", type=AT_LEAST_1, help="Query heads that share a KV head. [default: 1]")
@click.option("--q-heads", type=AT_LEAST_1, help="In its place, with --kv-heads.")
@click.option("--kv-heads", type=AT_LEAST_1)
@click.option("--batch-size", type=AT_LEAST_1, help="Sequences.")
@click.option("--kv-len", type=AT_LEAST_1, help="Mean KV tokens a sequence, the new ones included.")
@click.option("--q-len", type=AT_LEAST_1, default=1, show_default=True, help="Mean new tokens a sequence.")
@click.option("--ragged", is_flag=True, help="The longest sequence is at least twice the mean.")
@click.option("--gpu", type=GPU_OR_AUTO, default=AUTO, show_default=True, help="The GPU that the kernel runs on.")
@click.option("--sm-count", type=AT_LEAST_1, help="In the place of --gpu: any GPU with so many SMs.")
@click.option("--dtype", type=click.Choice(FLOATS), default="bfloat16", show_default=True, help="Of the queries.")
@click.option("--kv-dtype", type=click.Choice([*FLOATS, "float8_e4m3fn", "float8_e5m2"]), help="Of the cache. [default: --dtype]")
@database(must_exist=True)
@as_json
def command(
    kernel: str, head_dim: int, page_size: int, q_heads_per_kv: int | None, q_heads: int | None, kv_heads: int | None,
    batch_size: int | None, kv_len: int | None, q_len: int, ragged: bool, gpu: str, sm_count: int | None, dtype: str,
    kv_dtype: str | None, db: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the config that the kernels get for a workload, where it comes from and who measured it."""
    from ..kernels.config import find, find_either, query_for
    from ..kernels.registry import candidates

    device_name, capability = None, None
    if gpu != AUTO:
        if sm_count is not None:
            raise UsageError("--sm-count: --gpu decides it, leave one of them out")
        device_name, sm_count, capability = gpus.gpu(gpu).name, gpus.gpu(gpu).sm_count, gpus.gpu(gpu).capability
    os.environ["PATUNE_DB"] = str(tables.readable(db))  # as a process says which table its kernels use
    query = query_for(
        kernel, head_dim=head_dim, page_size=page_size, sm_count=sm_count, device_name=device_name,
        q_heads_per_kv=_group(q_heads_per_kv, q_heads, kv_heads), q_dtype=dtype, kv_dtype=kv_dtype,
        batch_size=batch_size, kv_len=kv_len, q_len=q_len, kv_heads=kv_heads, ragged=ragged, features="",
    )  # fmt: skip
    rows, capability = query["q_heads_per_kv"] * q_len, capability or query["capability"]
    names = candidates(kernel, capability, head_dim, page_size, rows, query["q_dtype"], query["kv_dtype"])
    queries = [query | {"kernel": name} for name in names]
    template, config = find_either(*queries) if len(queries) == 2 else (kernel, find(query))
    if as_json:
        document = {"template": template, "config": dict(config), "source": config.source, "provenance": config.provenance}
        click.echo(json.dumps(document, indent=2))
        return
    if len(names) > 1:
        click.echo(f"template: {template}")
    click.echo(" ".join(f"{name}={value}" for name, value in config.items()))
    click.echo(f"source: {config.source} ({MEANINGS[config.source]})")
    for name, value in config.provenance.items():
        click.echo(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def _group(q_heads_per_kv: int | None, q_heads: int | None, kv_heads: int | None) -> int:
    if q_heads is None:
        return q_heads_per_kv or 1
    if q_heads_per_kv is not None:
        raise UsageError("--q-heads: --q-heads-per-kv decides it, leave one of them out")
    if kv_heads is None or q_heads % kv_heads:
        raise UsageError(f"--q-heads: {q_heads} needs a --kv-heads that divides it")
    return q_heads // kv_heads
