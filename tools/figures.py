"""Write the README's tables from the files in results/: no figure there is typed in.

python tools/figures.py           rewrite README.md between its markers
python tools/figures.py --check   exit 1 if that would change it, or if a kernel has changed since it was measured
"""

import json
import re
import statistics
import sys
from pathlib import Path

from patune.kernels.registry import template

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "h100"
README = ROOT / "README.md"


def race_table(mode: str) -> str:
    """The last race of a mode: microseconds of patune and of the best peer in each case."""
    rows = json.loads((RESULTS / f"referee-{mode}.json").read_text())["rows"]
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
    summary = (
        f"Geometric mean over the best peer of each case ×{statistics.geometric_mean(ratios):.3f}, {won} of {len(ratios)} won."
    )
    return "\n".join([*lines, "", summary])


PEERS = {"fa3": "FlashAttention-3", "flashinfer": "FlashInfer", "vllm_triton": "vLLM Triton", "sglang_triton": "SGLang Triton"}


def run_table() -> str:
    """What the main job found for decode: tuned against the default."""
    part = next(part for part in json.loads((RESULTS / "run.json").read_text())["keys"] if part["key"]["kernel"] == "decode")
    lines = ["| workload | default µs | tuned µs | speedup | configs measured |", "|---|--:|--:|--:|--:|"]
    for found in part["workloads"]:
        w = found["workload"]
        name = f"{w['batch_size']} × {w['kv_len']} tokens{', ragged' if w['ragged'] else ''}"
        ratio = found["default_us"] / found["us"]
        lines.append(f"| {name} | {found['default_us']:.1f} | {found['us']:.1f} | ×{ratio:.2f} | {found['evaluations']} |")
    return "\n".join(lines)


def provenance_line() -> str:
    p = json.loads((RESULTS / "provenance.json").read_text())
    hashes = ", ".join(f"{name} {value}" for name, value in p["source_hash"].items())
    return (
        f"Measured on one {p['gpu']} ({p['sm_count']} SMs, driver {p['driver']}), torch {p['torch']}, triton {p['triton']}, "
        f"{p['date'][:10]}, commit {p['commit'][:10]}, kernel hashes {hashes}."
    )


FIGURES = {
    "decode": lambda: race_table("decode"),
    "prefill": lambda: race_table("prefill"),
    "run": run_table,
    "provenance": provenance_line,
}


def rendered(text: str) -> str:
    for name, make in FIGURES.items():
        marked = re.compile(f"(<!-- figures: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


def stale_kernels() -> list[str]:
    measured = json.loads((RESULTS / "provenance.json").read_text())["source_hash"]
    return [name for name, value in measured.items() if template(name).source_hash != value]


def main() -> None:
    text = README.read_text()
    new = rendered(text)
    if "--check" not in sys.argv:
        README.write_text(new)
        return
    if stale_kernels():
        sys.exit(f"results/ was measured with another version of {', '.join(stale_kernels())}: measure again with tools/measure.py")
    if new != text:
        sys.exit("README.md differs from results/: run tools/figures.py")


if __name__ == "__main__":
    main()
