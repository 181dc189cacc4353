import gzip
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patune.cachedb import landscape
from patune.cachedb.landscape import Recording
from patune.cachedb.trial import STATUSES, Trial
from patune.errors import PatuneError
from patune.workload import Workload

from .builders import ENVIRONMENT, H100, KEY, WORKLOAD

WHEN = "2026-01-02T03:04:05+00:00"
TUNABLES = {"num_warps": (4, 8), "BLOCK_N": (32, 64)}  # not in alphabetical order
POINTS = [(w, n) for w in TUNABLES["num_warps"] for n in TUNABLES["BLOCK_N"]]


def recorded(point, status="ok", samples_us=(10.0,), error=1e-3) -> Trial:
    config = dict(zip(TUNABLES, point, strict=True))
    return Trial(config, status, samples_us, error, source_hash="abc", when=WHEN)


def recording(key=KEY, workload=WORKLOAD, trials=None) -> Recording:
    trials = [recorded((4, 32))] if trials is None else trials
    return Recording(key, workload, "abc", TUNABLES, {"num_warps": 4, "BLOCK_N": 32}, trials)


def write(path, recordings):
    landscape.write(path, ENVIRONMENT, recordings, recorded=WHEN, commit="f00")
    return path


US = st.floats(min_value=0.1, max_value=1e6).map(lambda us: float(f"{us:.4g}"))
TRIALS = st.lists(
    st.builds(
        recorded,
        st.sampled_from(POINTS),
        st.sampled_from(STATUSES),
        st.lists(US, max_size=4).map(tuple),
        st.sampled_from([None, 0.0, 1e-3, math.inf]),
    ),
    unique_by=lambda t: tuple(t.config.values()),
)


@given(trials=TRIALS)
@settings(deadline=None, max_examples=50)
def test_what_was_recorded_comes_back(tmp_path_factory, trials):
    loaded = landscape.load(write(tmp_path_factory.mktemp("l") / "x.gz", [recording(trials=trials)]))
    assert (loaded.environment, loaded.recorded, loaded.commit) == (
        ENVIRONMENT,
        WHEN,
        "f00",
    )
    assert loaded.keys() == [KEY]
    assert loaded.workloads(KEY) == [WORKLOAD]
    assert loaded.source_hash(KEY) == "abc"
    assert loaded.default(KEY, WORKLOAD) == {"num_warps": 4, "BLOCK_N": 32}
    assert loaded.trials(KEY, WORKLOAD) == {tuple(t.config.values()): t for t in trials}


def test_points_keep_the_order_of_the_tunables(tmp_path):
    loaded = landscape.load(write(tmp_path / "x.gz", [recording()]))
    assert list(loaded.tunables(KEY).items()) == list(TUNABLES.items())
    assert list(loaded.trials(KEY, WORKLOAD)) == [(4, 32)]


def test_the_bytes_do_not_depend_on_the_order_of_recording(tmp_path):
    trials = [recorded(p) for p in POINTS]
    prefill = replace(KEY, kernel="prefill")
    one = [
        recording(trials=trials),
        recording(workload=Workload(1, 64)),
        recording(key=prefill),
    ]
    other = [
        recording(key=prefill),
        recording(workload=Workload(1, 64)),
        recording(trials=trials[::-1]),
    ]
    assert write(tmp_path / "a.gz", one).read_bytes() == write(tmp_path / "b.gz", other).read_bytes()


def test_samples_keep_4_significant_digits(tmp_path):
    trials = [recorded((4, 32), samples_us=(123.456789, 0.0123456))]
    loaded = landscape.load(write(tmp_path / "x.gz", [recording(trials=trials)]))
    assert loaded.trials(KEY, WORKLOAD)[4, 32].samples_us == (123.5, 0.01235)


def test_the_optimum_is_the_fastest_right_trial(tmp_path):
    trials = [
        recorded((4, 32), samples_us=(3.0, 9.0, 4.0)),
        recorded((4, 64), samples_us=(5.0, 2.0, 5.0)),
        recorded((8, 32), "wrong_answer", (1.0,)),
        recorded((8, 64), "timeout", ()),
    ]
    loaded = landscape.load(write(tmp_path / "x.gz", [recording(trials=trials)]))
    assert loaded.optimum(KEY, WORKLOAD) == trials[0]


def test_without_a_right_trial_there_is_no_optimum(tmp_path):
    loaded = landscape.load(write(tmp_path / "x.gz", [recording(trials=[recorded((8, 32), "timeout", ())])]))
    with pytest.raises(PatuneError, match="no right trial for decode B8 L8192"):
        loaded.optimum(KEY, WORKLOAD)


def test_one_key_has_one_search_space(tmp_path):
    other = replace(recording(workload=Workload(1, 64)), tunables={**TUNABLES, "num_warps": (4,)})
    with pytest.raises(ValueError, match="differ in source hash or tunables"):
        write(tmp_path / "x.gz", [recording(), other])


def test_a_shipped_landscape_is_found_by_either_name(shipped_folder):
    path = write(shipped_folder / "h100.landscape.json.gz", [recording()])
    assert landscape.shipped("h100") == landscape.shipped("H100") == landscape.shipped(H100) == path
    assert landscape.shipped("h200") is None
    assert landscape.shipped("NVIDIA H100 PCIe") is None


GOOD = {"format": 1, "environment": {}, "recorded": WHEN, "commit": "", "keys": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a patune landscape"),
        (b"hello", "cannot read the landscape|is not a patune landscape"),
        (gzip.compress(b"[1, 2]", mtime=0), "is not a patune landscape"),
        (gzip.compress(b"{}", mtime=0)[:-4], "is not a patune landscape"),
        (gzip.compress(json.dumps(GOOD).encode(), mtime=0), "is not a patune landscape"),
        (
            gzip.compress(json.dumps({**GOOD, "format": 2}).encode(), mtime=0),
            "has landscape format 2, this patune reads 1",
        ),
    ],
)
def test_a_file_that_is_no_landscape_is_named(tmp_path, content, message):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(PatuneError, match=message) as raised:
        landscape.load(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PatuneError, match=r"cannot read the landscape .*x\.gz: No such file"):
        landscape.load(tmp_path / "x.gz")
