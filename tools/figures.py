"""Write the tables of README.md and docs/ from the files in results/: no figure there is typed in.

python tools/figures.py           rewrite the pages between their markers
python tools/figures.py --check   exit 1 if that would change it, or if a kernel has changed since it was measured
"""

import json
import math
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from transfer import Loss, losses, table_of

from patune.cachedb import landscape
from patune.cachedb.match import Table
from patune.kernels.registry import NAMES, template
from patune.workload import Workload

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "h100"
GPUS = (RESULTS, *sorted(path for path in RESULTS.parent.iterdir() if path.is_dir() and path != RESULTS))
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def race_table(mode: str, results: Path = RESULTS, cases: str | None = None) -> str:
    """The last races of a mode, or of other cases of it: microseconds of patune and of the best peer; nothing where none ran."""
    path = results / f"referee-{cases or mode}.json"
    if not path.exists():
        return ""
    rows = json.loads(path.read_text())["rows"]
    share = "of the streaming floor" if mode == "decode" else "TFLOP/s"
    lines = [f"| {mode} | patune µs | {share} | best peer µs | peer | speedup |", "|---|--:|--:|--:|---|--:|"]
    ratios = []
    for row in rows:
        us = row["us"]["candidate"]
        peer, ratio = row["best_peer"], row["speedup_over_best_peer"]
        ratios.append(ratio)
        what = f"{row['floor_us'] / us:.0%}" if mode == "decode" else f"{row['flops'] / us / 1e6:.0f}"
        lines.append(f"| {row['case']} | {us:.1f} | {what} | {row['us'][peer]:.1f} | {PEERS[peer]} | ×{ratio:.2f} |")
    won = sum(ratio >= 1 for ratio in ratios)
    summary = f"Geometric mean over the best peer of each case ×{statistics.geometric_mean(ratios):.3f}, {won} of {len(ratios)} won"
    by_peer = {
        name: statistics.geometric_mean(row["us"][peer] / row["us"]["candidate"] for row in rows)
        for peer, name in PEERS.items()
        if all(peer in row["us"] for row in rows)
    }
    if len(by_peer) > 1:
        summary += "; over " + ", ".join(f"{name} ×{ratio:.3f}" for name, ratio in by_peer.items())
    return "\n".join([*lines, "", summary + "."])


def host_line() -> str:
    """The host's time for one eager call, which graphs pay at capture only."""
    rows = json.loads((RESULTS / "referee-decode.json").read_text())["rows"]
    medians = {
        who: statistics.median(row["host_us"][who] for row in rows if who in row["host_us"]) for who in ("candidate", *PEERS)
    }
    mine = medians.pop("candidate")
    others = ", ".join(f"{PEERS[who]} {us:.0f}" for who, us in medians.items())
    return f"Outside a graph, one decode call takes {mine:.0f} µs of host time (median of the cases; {others})."


PEERS = {"fa3": "FlashAttention-3", "flashinfer": "FlashInfer", "vllm_triton": "vLLM Triton", "sglang_triton": "SGLang Triton"}


def run_table() -> str:
    """What tuning found for the decode of one model's shape: both templates tuned against the plain one's default."""
    key = dict(head_dim=128, page_size=16, q_heads_per_kv=4, kv_dtype="bfloat16")
    of: dict[Workload, dict[str, dict]] = {}
    for part in _tuned("decode"):
        if key.items() <= part["key"].items():
            for found in part["workloads"]:
                of.setdefault(Workload(**found["workload"]), {})[part["key"]["kernel"]] = found
    lines = ["| workload | default µs | plain µs | Hopper template µs | speedup | configs measured |", "|---|--:|--:|--:|--:|--:|"]
    for w, found in sorted(of.items(), key=lambda item: (item[0].ragged, item[0].batch_size, item[0].kv_len)):
        plain, hopper = found["decode"], found["decode_hopper"]
        name = f"{w.batch_size} × {w.kv_len} tokens{', ragged' if w.ragged else ''}"
        ratio = plain["default_us"] / min(plain["us"], hopper["us"])
        lines.append(
            f"| {name} | {plain['default_us']:.1f} | {plain['us']:.1f} | {hopper['us']:.1f} | ×{ratio:.2f} "
            f"| {plain['evaluations'] + hopper['evaluations']} |"
        )
    return "\n".join(lines)


def _tuned(kernel: str) -> list[dict]:
    return json.loads((RESULTS / f"tuned-{kernel}.json").read_text())["keys"]


def prefill_table(*shapes: tuple[int, int]) -> str:
    """The best times of both templates of paged_prefill, at these (head_dim, page_size)."""
    best: dict[tuple, dict[str, float]] = {}
    for part in _tuned("prefill"):
        key = part["key"]
        for found in part["workloads"] if (key["head_dim"], key["page_size"]) in shapes else ():
            shape = (key["head_dim"], key["page_size"], key["q_heads_per_kv"], Workload(**found["workload"]))
            best.setdefault(shape, {})[key["kernel"]] = found["us"]
    lines = ["| prefill | plain Triton µs | Hopper template µs | TFLOP/s | speedup |", "|---|--:|--:|--:|--:|"]
    for (head_dim, page_size, group, w), us in best.items():
        pairs = sum(q * (n - q) + q * (q + 1) // 2 for q, n in zip(w.q_lens(), w.kv_lens(), strict=True))
        plain, hopper = us["prefill"], us.get("prefill_hopper")  # which does not take head_dim 512
        rate = 4 * group * w.kv_heads * head_dim * pairs / (hopper or plain) / 1e6
        both = f"{hopper:.1f} | {rate:.0f} | ×{plain / hopper:.2f}" if hopper else f"| {rate:.0f} |"
        lines.append(f"| d{head_dim} p{page_size} {w} | {plain:.1f} | {both} |")
    return "\n".join(lines)


def search_table() -> str:
    """Median regret over all workloads and seeds of a key."""
    document = json.loads((RESULTS / "search.json").read_text())
    lines = ["| key | workloads | after | patune | random | patune saves of the possible |", "|---|--:|--:|--:|--:|--:|"]
    for part in document["keys"]:
        name = _key_name(part["key"])
        for n in ("16", "32", "64"):
            mine, random = part["patune"][n], part["random"][n]
            lines.append(
                f"| {name} | {part['workloads']} | {n} | {mine['median_regret']:.2%} | {random['median_regret']:.2%} "
                f"| {mine['fraction_of_optimum']:.0%} |"
            )
            name = ""
    return "\n".join([*lines, "", f"{document['seeds']} seeds each."])


def _key_name(key: dict) -> str:
    name = f"{key['kernel']} d{key['head_dim']} p{key['page_size']}"
    name += "" if key["kernel"] == "append" else f" group {key['q_heads_per_kv']}"
    return name + ("" if key["kv_dtype"] == key["q_dtype"] else " fp8 KV")


def ablation_table() -> str:
    """What is saved of the possible, over evaluations, with a part of the search left out, and by other samplers."""
    document = json.loads((RESULTS / "ablation.json").read_text())
    after = list(document["variants"]["patune"]["fraction_of_optimum"])
    lines = [f"| search | {' | '.join(f'after {n}' for n in after)} |", f"|---|{'--:|' * len(after)}"]
    for name, found in document["variants"].items():
        shares = [f"{found['fraction_of_optimum'][n]:.0%}" for n in after]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    mine, pruners = document["variants"]["patune"], document["pruners"]
    whole = pruners["none"]["rounds"]
    said = [f"{name} {p['rounds'] / whole:.0%} ({p['mean_regret']:.2%})" for name, p in pruners.items() if name != "none"]
    return "\n".join([
        *lines, "",
        f"Median of {document['seeds']} seeds, {document['workloads']} workloads of {document['keys']} keys. The search compiles "
        f"{mine['compiled']:.0f} kernels, {mine['compiled_if_not_shared']:.0f} if its workloads did not share them.", "",
        f"Rounds that a pruner leaves, and the regret that it costs: {', '.join(said)}.",
    ])  # fmt: skip


def autotune_table() -> str:
    """The main job beside triton.autotune, which ran for a while only; nothing until that was measured."""
    path = RESULTS / "autotune.json"
    if not path.exists():
        return ""
    document = json.loads(path.read_text())
    mine, other = document["patune"], document["triton_autotune"]
    lines = ["| kernel | to evaluate | triton.autotune evaluated | in | would take, extrapolated |", "|---|--:|--:|--:|--:|"]
    for name, found in other["kernels"].items():
        rest_s = found["extrapolated_rest_s"]
        whole = "unknown" if rest_s is None else f"{found['seconds'] + rest_s:.0f} s"
        lines.append(f"| {name} | {found['of']} | {found['evaluations']} | {found['seconds']:.0f} s | {whole} |")
    said = [
        f"`patune run --gpu h100 --model {document['model']}` took {mine['seconds']:.0f} s for {mine['workloads']} workloads, from "
        f"an empty Triton cache. triton.autotune finished {other['workloads']} of them in {other['seconds']:.0f} s."
    ]
    if ratio := document["extrapolated"]["times_patune"]:
        said.append(f"For all it would take {ratio:.1f} times as long as patune, extrapolated from its rate.")
    if quality := document["geomean_us_over_patune"]:
        said.append(f"Its configs take ×{quality:.3f} of the time of patune's (geometric mean, raced as patune measures).")
    said.append(f"One {document['gpu']}, triton {document['triton']}, {document['date'][:10]}, commit {document['commit'][:10]}.")
    return "\n".join([*lines, "", " ".join(said)])


def landscape_lines() -> str:
    lines = ["Landscapes that ship, each with every valid config of its workloads:", ""]
    for recorded in (landscape.load(results / "landscape.json.gz") for results in GPUS):
        keys = recorded.keys()
        sizes = [len(recorded.trials(key, workload)) for key in keys for workload in recorded.workloads(key)]
        lines.append(
            f"- {sum(sizes):,} trials of {len(sizes)} workloads of {len(keys)} keys, measured on one {recorded.environment.gpu} "
            f"on {recorded.recorded[:10]} (commit {recorded.commit[:10]})"
        )
    return "\n".join(lines)


def measured(step: str, results: Path = RESULTS) -> dict | None:
    """The run that the file of a step comes from: the last one that made it; None without a file."""
    runs = [run for run in json.loads((results / "provenance.json").read_text())["runs"] if step in run["steps"]]
    return runs[-1] if runs and (results / MEASURED[step][0]).exists() else None


MEASURED = {  # step -> its file, and the templates whose times it has; one that came after the run is in none of its hashes
    "tune-decode": ("tuned-decode.json", ("decode",)),
    "tune-decode-hopper": ("tuned-decode.json", ("decode_hopper",)),  # its template was measured anew alone
    "tune-prefill": ("tuned-prefill.json", ("prefill",)),
    "tune-prefill-hopper": ("tuned-prefill.json", ("prefill_hopper",)),
    "referee-decode": ("referee-decode.json", ("decode", "decode_hopper")),
    "referee-prefill": ("referee-prefill.json", ("prefill_hopper",)),  # which serves all of its cases, and all mixes
    "referee-plain": ("referee-plain.json", ("prefill",)),
    "referee-turns": ("referee-turns.json", ("prefill_hopper",)),
    "mixed": ("mixed.json", ("append", "prefill_hopper", "decode_hopper")),
    "autotune": ("autotune.json", NAMES),
}


def provenance_lines(results: Path = RESULTS) -> str:
    lines = []
    for step, (_, templates) in MEASURED.items():
        if (run := measured(step, results)) is None:
            continue
        hashes = ", ".join(f"{name} {run['source_hash'][name]}" for name in templates if name in run["source_hash"])
        lines.append(
            f"- {step}: one {run['gpu']} ({run['sm_count']} SMs, driver {run['driver']}), torch {run['torch']}, "
            f"triton {run['triton']}, {run['date'][:10]}, commit {run['commit'][:10]}, kernel hashes {hashes}"
        )
    return "\n".join(lines)


def mixed_table(results: Path = RESULTS) -> str:
    """A mixed batch beside its parts run alone; nothing until that was measured."""
    path = results / "mixed.json"
    if not path.exists():
        return ""
    document = json.loads(path.read_text())
    lines = ["| prompts + decodes | append µs | prefill µs | decode µs | mixed µs | over its parts |", "|---|--:|--:|--:|--:|--:|"]
    for name, found in document["mixes"].items():
        times = " | ".join(f"{found['us'][part]:.1f}" for part in ("append", "prefill", "decode", "whole"))
        lines.append(f"| {name} | {times} | ×{found['over_parts']['whole']:.3f} |")
    said = f"{document['model']}; a prompt `of` so many tokens is a chunk behind a cached prefix."
    return "\n".join([*lines, "", f"{said} One {document['gpu']}, {document['date'][:10]}, commit {document['commit'][:10]}."])


def technique_table(kernel: str) -> str:
    """What each technique was expected to do and did: microseconds before and after, by case."""
    techniques = json.loads((RESULTS / f"{kernel}-techniques.json").read_text())["techniques"]
    lines = ["| technique | predicted | measured, µs | outcome |", "|---|---|---|---|"]
    for tried in techniques:
        us = "; ".join(f"{case}: {before:.1f} → {after:.1f}" for case, (before, after) in tried["us"].items())
        lines.append(f"| {tried['name']} | {tried['predicted']} | {us} | {tried['verdict']} |")
    return "\n".join(lines)


def timeline_table() -> str:
    """Where a decode's time goes."""
    rows = json.loads((RESULTS / "decode-techniques.json").read_text())["timeline"]
    stamps = ["released", "share_found", "page_ids", "loop_ends", "stage1_ends", "stage2_released", "stage2_ends"]
    heads = [name.replace("_", " ") for name in stamps]
    lines = [f"| case | programs | {' | '.join(heads)} |", "|---|--:" + "|--:" * len(stamps) + "|"]
    for row in rows:
        times = [row.get(name, "") for name in stamps]
        cells = ["/".join(f"{us:.1f}" for us in x) if isinstance(x, list) else f"{x:.1f}" if x else "" for x in times]
        lines.append(f"| {' | '.join([row['case'], str(row['programs']), *cells])} |")
    return "\n".join([*lines, "", "Loop ends: the first, the median and the last program."])


def reads_table() -> str:
    """What stage 1 of a decode adds to reading the same pages, part by part."""
    rows = json.loads((RESULTS / "decode-techniques.json").read_text())["reads"]
    parts = {
        "contiguous": "contiguous read", "ring": "shuffled pages, a ring that only reads", "found": "shares found on the device",
        "merged": "states merged and written", "whole": "attention",
    }  # fmt: skip
    lines = [f"| case | MiB | {' | '.join(parts.values())} |", "|---|--:" + "|--:" * len(parts) + "|"]
    for row in rows:
        cells = [f"{row[part]:.1f}" if row[part] else "" for part in parts]
        lines.append(f"| {row['case']} | {row['mib']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fp8_table() -> str:
    """The best times with a cache of e4m3 beside those of bf16, where the bf16 cache has at least 256 MiB."""
    key = dict(head_dim=128, page_size=16, q_heads_per_kv=4)
    best: dict[Workload, dict[str, float]] = {}
    for part in _tuned("decode"):
        if key.items() <= part["key"].items():
            for found in part["workloads"]:
                us = best.setdefault(Workload(**found["workload"]), {})
                us[part["key"]["kv_dtype"]] = min(found["us"], us.get(part["key"]["kv_dtype"], math.inf))
    lines = ["| workload | bf16 KV µs | fp8 KV µs | speedup |", "|---|--:|--:|--:|"]
    for w, us in best.items():
        if sum(w.kv_lens()) * w.kv_heads * key["head_dim"] * 4 >= 256 << 20:
            wide, narrow = us["bfloat16"], us["float8_e4m3fn"]
            lines.append(f"| {w} | {wide:.1f} | {narrow:.1f} | ×{wide / narrow:.2f} |")
    return "\n".join(lines)


def other_gpus() -> str:
    """The GPUs besides the H100, a section each: races, and what its calls lose with another GPU's table; nothing without one."""
    sections = []
    for results in GPUS[1:]:
        recorded = landscape.load(results / "landscape.json.gz")
        races = [race_table(*race) for race in (("decode", results), ("prefill", results), ("prefill", results, "turns"))]
        parts = [f"## {recorded.environment.gpu}", *races]
        parts += [mixed_table(results), transfer_table(results, recorded), provenance_lines(results)]
        sections += [part for part in parts if part]
    return "\n\n".join(sections)


def transfer_table(results: Path, recorded: landscape.Landscape) -> str:
    """Times on this GPU, over its best, of what its own table, every other GPU's and the rule take, in the geometric mean."""
    tables = {path.stem: table_of(path / "table.db") for path in (results, *(path for path in GPUS if path != results))}
    found = {name: list(losses(table, recorded)) for name, table in {**tables, "rule": Table([])}.items()}
    lines = [f"| call | workloads | {' | '.join(found)} |", f"|---|--:|{'--:|' * len(found)}"]
    for key in dict.fromkeys(loss.key for loss in found["rule"]):
        of = [[loss for loss in column if loss.key == key] for column in found.values()]
        lines.append(f"| {_key_name(asdict(key))} | {len(of[0])} | {' | '.join(map(_lost, of))} |")
    said = "Time over the best recorded on this GPU: geometric mean (worst), by the table that the calls take their configs from"
    return "\n".join([f"{said}.", "", *lines, f"| all | {len(found['rule'])} | {' | '.join(map(_lost, found.values()))} |"])


def _lost(column: list[Loss]) -> str:
    ratios = [loss.us / loss.best_us for loss in column if loss.us]
    absent = f", {len(column) - len(ratios)} not recorded" if len(ratios) < len(column) else ""
    return f"×{statistics.geometric_mean(ratios):.3f} (×{max(ratios):.2f}){absent}" if ratios else "not recorded"


FIGURES = {
    "decode": lambda: race_table("decode"),
    "prefill": lambda: prefill_table((128, 16)),
    "prefill race": lambda: race_table("prefill"),
    "plain race": lambda: race_table("prefill", cases="plain"),
    "prefill elsewhere": lambda: prefill_table((128, 64), (64, 16), (256, 32), (512, 16)),
    "host": host_line,
    "decode techniques": lambda: technique_table("decode"),
    "prefill techniques": lambda: technique_table("prefill"),
    "decode timeline": timeline_table,
    "decode reads": reads_table,
    "fp8": fp8_table,
    "mixed": mixed_table,
    "run": run_table,
    "search": search_table,
    "ablation": ablation_table,
    "autotune": autotune_table,
    "landscapes": landscape_lines,
    "other gpus": other_gpus,
    "provenance": provenance_lines,
}


def rendered(text: str) -> str:
    for name, make in FIGURES.items():
        marked = re.compile(f"(<!-- figures: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


def stale_kernels() -> set[str]:
    """Kernels whose source is not the one that results/ was measured with; figures of the search are of the landscape's kernels."""
    runs = [(names, run) for results in GPUS for step, (_, names) in MEASURED.items() if (run := measured(step, results))]
    pairs = [(name, run["source_hash"].get(name)) for names, run in runs for name in names]
    stale = {name for name, value in pairs if value not in (None, template(name).source_hash)}
    recorded = landscape.load(RESULTS / "landscape.json.gz")
    hashes = {key.kernel: recorded.source_hash(key) for key in recorded.keys()}
    of_search = [(part["key"]["kernel"], part["source_hash"]) for part in json.loads((RESULTS / "search.json").read_text())["keys"]]
    of_search += json.loads((RESULTS / "ablation.json").read_text())["source_hash"].items()
    return stale | {name for name, value in of_search if hashes.get(name, value) != value}


def main() -> None:
    if "--check" in sys.argv and (stale := stale_kernels()):
        sys.exit(f"results/ was measured with another version of {', '.join(sorted(stale))}: measure again with tools/measure.py")
    for page in PAGES:
        text = page.read_text()
        new = rendered(text)
        if "--check" not in sys.argv:
            page.write_text(new)
        elif new != text:
            sys.exit(f"{page.name} differs from results/: run tools/figures.py")


if __name__ == "__main__":
    main()
