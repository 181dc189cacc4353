"""`patune run`: tune a GPU's kernels, on that GPU or against its recorded landscape."""

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cachedb.file import database_path
from ..cachedb.landscape import Landscape
from ..errors import UsageError
from . import source
from .options import AT_LEAST_1, GPU_OR_AUTO, Count, Duration, Kernel, as_json, database
from .outcome import Tally, by_key, times, times_line
from .plan import FAMILY, KERNELS, Plan, Request, shape_of, sizes_of
from .verbose import logged

if TYPE_CHECKING:
    from ..tuner.events import Event
    from ..tuner.fleet import Fleet
    from ..tuner.session import Work


@click.command(short_help="Tune a GPU, or replay how it went on one.")
@click.option("--gpu", type=GPU_OR_AUTO, required=True, help="The GPU to tune for; auto: the one here.")
@click.option(
    "--kernel", type=Kernel(), default="all", show_default=True, metavar="NAME",
    help="decode, prefill, append, all, one template (decode_hopper), or one of yours: file.py:TEMPLATE.",
)  # fmt: skip
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
@click.option("--devices", metavar="0,1,...", help="The GPUs to measure on. [default: all that are idle]")
@click.option("--storage", metavar="URL", help="Share the search with other workers: a database, grpc://, or a journal file.")
@click.option("--replay", is_flag=False, flag_value="", metavar="[FILE]", help="Replay a landscape, not measure.")
@click.option("-v", "--verbose", is_flag=True, help="Log every decision on stderr.")
@database(must_exist=False)
@as_json
def command(
    gpu: str, kernel: str, model: str | None, head_dim: int | None, page_size: int | None, q_heads: int | None,
    kv_heads: int | None, dtype: str, kv_dtype: str | None, batch_size: int | None, kv_len: int | None, q_len: int | None,
    ragged: bool, trials: int | str, budget: float | None, seed: int, devices: str | None, storage: str | None,
    replay: str | None, verbose: bool, db: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Search for the fastest configs and keep them in the database.

    With the GPU here it measures. With no GPU it runs the same search against the landscape recorded on one, and says
    so. A second run starts from what the first one left. Ctrl-C keeps what was measured.
    """
    began = time.monotonic()
    ends = None if budget is None else began + budget  # what it takes to get going counts as well
    request = Request(
        KERNELS if kernel == "all" else (kernel,),
        shape_of(model, head_dim=head_dim, page_size=page_size, q_heads=q_heads, kv_heads=kv_heads),
        sizes_of(None if kernel == "all" else FAMILY.get(kernel, kernel), batch_size, kv_len, q_len, ragged),
        dtype,
        kv_dtype,
    )
    chosen = source.choose(gpu, _devices(devices), replay)
    for line in chosen.said:
        click.echo(line, err=as_json)
    path = db or database_path()

    limit = None if trials == "all" else int(trials)

    from ..cachedb.store import Store
    from ..tuner.progress import ProgressView
    from ..tuner.session import tune

    tally = Tally()

    def on_event(event: "Event") -> None:
        tally.on_event(event)
        view.on_event(event)

    with contextlib.ExitStack() as stack:
        if storage is not None:
            from ..tuner.storage import explained

            stack.enter_context(explained())
        store = stack.enter_context(Store.open(path))
        fleet = stack.enter_context(contextlib.closing(_fleet(chosen)))
        runner = fleet.runners[0]
        plan = request.measured(runner.environment) if chosen.landscape is None else _replayed(request, chosen.landscape)
        work = _work(plan, fleet, storage, limit)
        stack.callback(work.close)
        stack.enter_context(logged(verbose))
        view = stack.enter_context(ProgressView(live=not verbose))
        results = tune(work, fleet, store, trials=limit, seed=seed, ends=ends, on_event=on_event)
        keys = by_key(plan, results)
        document: dict[str, Any] = {"gpu": runner.environment.gpu, "mode": runner.mode, "keys": keys}
        if chosen.landscape is None:
            document["time"] = times([device.phases for device in fleet.runners], began)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        from .report import print_tables

        print_tables([part for part in keys if part["workloads"]])
        click.echo(f"The table is in {path}; `patune show` prints it, `patune export` takes it elsewhere.")
    if "time" in document:
        click.echo(times_line(document["time"]), err=True)
    if tally.statuses:
        click.echo(f"configs: {tally}", err=True)
    left = sum(map(len, plan.values())) - len(results) - len(tally.failed)
    if left > 0 and storage is not None:
        click.echo(f"{left} workloads are other workers' or left to them, `patune db merge` joins the databases", err=True)
    elif left > 0:
        click.echo(f"the budget ended before {left} workloads, a larger --budget has room for them", err=True)
    for failure in tally.failed:
        click.echo(f"failed: {failure}", err=True)
    if tally.failed:
        click.get_current_context().exit(1)


def _work(plan: Plan, fleet: "Fleet", storage: str | None, trials: int | None) -> "Work":
    from ..kernels.registry import template
    from ..tuner.session import Items, largest_first, soonest_compiled_first
    from ..tuner.task import Item

    items = [Item(template(key.kernel), key, workload) for key, workloads in plan.items() for workload in workloads]
    if storage is None:
        if len(fleet.runners) > 1:
            items = largest_first(items)
        elif fleet.runners[0].mode == "measured":
            items = soonest_compiled_first(items)
        return Items(items)
    from ..tuner.shared import SharedWork
    from ..tuner.storage import connect

    runner = fleet.runners[0]
    return SharedWork(connect(storage), largest_first(items), runner.environment, runner.mode, trials)


def _devices(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    for part in parts:
        if not part.isdecimal():
            raise UsageError(f"--devices: {part!r} is no device index such as 0, several are given as 0,1")
    if len(set(parts)) < len(parts):
        raise UsageError(f"--devices: {text} names a device twice")
    return tuple(map(int, parts))


def _fleet(chosen: source.Source) -> "Fleet":
    from ..tuner.fleet import Threads

    if chosen.landscape is None:
        from ..tuner.gpu import GpuRunner

        runners = GpuRunner.several([source.cuda_name(device) for device in chosen.devices])
        return Threads(runners, [str(device) for device in chosen.devices])
    from ..tuner.replay import ReplayRunner

    return Threads([ReplayRunner(chosen.landscape)], ["replay"])


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
