"""`patune run`: tune a GPU's kernels, on that GPU or against its recorded landscape."""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cachedb.file import database_path
from ..cachedb.landscape import Landscape
from ..errors import UsageError
from . import source
from .options import AT_LEAST_1, GPU_OR_AUTO, Count, Duration, as_json, database
from .plan import KERNELS, Plan, Request, shape_of, sizes_of

if TYPE_CHECKING:
    from ..cachedb.store import Store
    from ..tuner.runner import Runner


@click.command(short_help="Tune a GPU, or replay how it went on one.")
@click.option("--gpu", type=GPU_OR_AUTO, required=True, help="The GPU to tune for; auto: the one here.")
@click.option("--kernel", type=click.Choice([*KERNELS, "all"]), default="all", show_default=True)
@click.option("--model", metavar="NAME", help="Take the shape of a model such as llama-3.1-8b.")
@click.option("--head-dim", type=AT_LEAST_1, help="The shape, without --model: with --q-heads and --kv-heads.")
@click.option("--page-size", type=AT_LEAST_1, help="Tokens a page. [default: 16]")
@click.option("--q-heads", type=AT_LEAST_1)
@click.option("--kv-heads", type=AT_LEAST_1)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--kv-dtype", type=click.Choice(["float8_e4m3fn", "float8_e5m2"]), help="Of the KV cache. [default: --dtype]")
@click.option("--batch-size", type=AT_LEAST_1, help="One workload, not the standard ones: with --kv-len.")
@click.option("--kv-len", type=AT_LEAST_1, help="Mean KV tokens a sequence, the new ones included.")
@click.option("--q-len", type=AT_LEAST_1, help="Mean new tokens a sequence. [default: 1; prefill: --kv-len]")
@click.option("--ragged", is_flag=True, help="Sequences of different lengths.")
@click.option("--trials", type=Count(), default=64, show_default=True, metavar="N|all", help="Configs a workload.")
@click.option("--budget", type=Duration(), metavar="TIME", help="Stop after this long: 60s, 5m, 1h or plain seconds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
@click.option("--devices", metavar="INDEX", help="The device to measure on. [default: 0]")
@click.option("--replay", is_flag=False, flag_value="", metavar="[FILE]", help="Replay a landscape, not measure.")
@database(must_exist=False)
@as_json
def command(
    gpu: str, kernel: str, model: str | None, head_dim: int | None, page_size: int | None, q_heads: int | None,
    kv_heads: int | None, dtype: str, kv_dtype: str | None, batch_size: int | None, kv_len: int | None, q_len: int | None,
    ragged: bool, trials: int | str, budget: float | None, seed: int, devices: str | None, replay: str | None, db: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Search for the fastest configs and keep them in the database.

    With the GPU here it measures. With no GPU it runs the same search against the landscape recorded on one, and says
    so. A second run starts from what the first one left. Ctrl-C keeps what was measured.
    """
    request = Request(
        KERNELS if kernel == "all" else (kernel,),
        shape_of(model, head_dim=head_dim, page_size=page_size, q_heads=q_heads, kv_heads=kv_heads),
        sizes_of(None if kernel == "all" else kernel, batch_size, kv_len, q_len, ragged),
        dtype,
        kv_dtype,
    )
    landscape, announcement = source.choose(gpu, _device(devices), replay)
    click.echo(announcement, err=as_json)
    path = db or database_path()

    from ..cachedb.store import Store

    with Store.open(path) as store, contextlib.closing(_runner(landscape)) as runner:
        plan = request.measured(runner.environment) if landscape is None else _replayed(request, landscape)
        keys, failed = _tune(plan, runner, store, None if trials == "all" else int(trials), seed, budget)
        document = {"gpu": runner.environment.gpu, "mode": runner.mode, "keys": keys}
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        from .report import print_tables

        print_tables([part for part in keys if part["workloads"]])
        click.echo(f"The table is in {path}; `patune show` prints it, `patune export` takes it elsewhere.")
    left = sum(map(len, plan.values())) - sum(len(part["workloads"]) for part in keys) - len(failed)
    if left:
        click.echo(f"the budget ended before {left} workloads, a larger --budget has room for them", err=True)
    for failure in failed:
        click.echo(f"failed: {failure}", err=True)
    if failed:
        click.get_current_context().exit(1)


def _tune(
    plan: Plan, runner: "Runner", store: "Store", trials: int | None, seed: int, budget_s: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The "keys" of the document, and which workloads failed and why. The budget is shared out by workloads."""
    from ..kernels.registry import template
    from ..tuner.progress import ProgressView
    from ..tuner.session import Event, Failed, tune

    keys: list[dict[str, Any]] = []
    failed: list[str] = []
    ends = None if budget_s is None else time.monotonic() + budget_s
    to_come = sum(map(len, plan.values()))

    def on_event(event: Event) -> None:
        if isinstance(event, Failed):
            failed.append(f"{key.kernel} {event.workload}: {event.message}")
        view.on_event(event)

    with ProgressView() as view:
        for key, workloads in plan.items():
            share = None if ends is None else (ends - time.monotonic()) * len(workloads) / to_come
            to_come -= len(workloads)
            results = tune(
                template(key.kernel), key, workloads, runner, store, trials=trials, seed=seed, budget_s=share, on_event=on_event
            )
            keys.append({"key": asdict(key), "workloads": results})
    return keys, failed


def _device(devices: str | None) -> int | None:
    if devices is None:
        return None
    if "," in devices:
        raise UsageError(f"--devices: {devices} are several, this version measures on one")
    if not devices.isdecimal():
        raise UsageError(f"--devices: {devices!r} is no device index such as 0")
    return int(devices)


def _runner(landscape: Landscape | None) -> "Runner":
    if landscape is None:
        from ..tuner.gpu import GpuRunner

        return GpuRunner()
    from ..tuner.replay import ReplayRunner

    return ReplayRunner(landscape)


def _replayed(request: Request, landscape: Landscape) -> Plan:
    from ..kernels.registry import template

    plan, absent = request.replayed(landscape)
    if absent and request.shape is not None:
        kernels = ", ".join(key.kernel for key in absent)
        click.echo(f"not recorded at this shape and left out: {kernels}", err=True)
    stale = [key.kernel for key in plan if landscape.source_hash(key) != template(key.kernel).source_hash]
    if stale:
        kernels = ", ".join(dict.fromkeys(stale))
        click.echo(f"the landscape was recorded with another version of the kernel: {kernels}", err=True)
    return plan
