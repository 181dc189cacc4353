"""Keys, trials, entries and queries with sensible values where a test does not care."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from patune.cachedb.match import Entry
from patune.cachedb.store import Store
from patune.cachedb.trial import Environment, Trial
from patune.workload import Key, Workload

H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
KEY = Key("decode", H100, 132, 128, 16, 4)
WORKLOAD = Workload(8, 8192)
ENVIRONMENT = Environment(H100, 132, "9.0", "570.86", "3.6.0", "2.11.0")
CONFIG = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "num_splits": 8}


def trial(us: float = 12.5, **changes: Any) -> Trial:
    values = {
        "config": CONFIG,
        "status": "ok",
        "samples_us": (us, us + 0.25, us - 0.25),
        "error": 1e-3,
    }
    return Trial(
        **{
            **values,
            "source_hash": "0123456789ab",
            "when": "2026-01-02T03:04:05+00:00",
            **changes,
        }
    )


def entry(**changes: Any) -> Entry:
    values = {
        **asdict(KEY), **asdict(WORKLOAD), "capability": "9.0", "config": CONFIG, "us": 12.5, "default_us": 14.0,
        "evaluations": 64, "mode": "measured", "when": "2026-01-02T03:04:05+00:00", "triton": "3.6.0",
        "torch": "2.11.0", "driver": "570.86", "source_hash": "0123456789ab", "optimum_us": None,
    }  # fmt: skip
    return {**values, **changes}


def query(**changes: Any) -> dict[str, Any]:
    key = asdict(KEY)
    device_name = key.pop("gpu")
    return {
        **key,
        **asdict(WORKLOAD),
        "device_name": device_name,
        "capability": "9.0",
        **changes,
    }


def store_entries(path: Path, entries: list[Entry]) -> None:
    """A database that holds these entries."""
    with Store.open(path) as store:
        for e in entries:
            key = Key(**{name: e[name] for name in asdict(KEY)})
            workload = Workload(**{name: e[name] for name in asdict(WORKLOAD)})
            environment = Environment(**{name: e[name] for name in asdict(ENVIRONMENT)})
            won = Trial(
                e["config"],
                "ok",
                (e["us"],),
                1e-3,
                source_hash=e["source_hash"],
                when=e["when"],
            )
            (trial_id,) = store.add_trials(key, workload, environment, [won], e["mode"])
            store.set_config(
                key,
                workload,
                trial_id,
                e["default_us"],
                e["evaluations"],
                e["mode"],
                e["optimum_us"],
            )
