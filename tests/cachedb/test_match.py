import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patune.cachedb.match import EXACT_BATCH, KEY_FIELDS, Table, find

from .builders import A100, H100, H200, entry, query

SIZES = {
    "batch_size": st.integers(1, 512),
    "kv_len": st.integers(1, 1 << 17),
    "q_len": st.integers(1, 4096),
    "kv_heads": st.sampled_from([1, 2, 4, 8]),
    "ragged": st.booleans(),
}
ENTRIES = st.lists(
    st.builds(entry, **SIZES, gpu=st.sampled_from([H100, H200])),
    min_size=1,
    max_size=6,
    unique_by=lambda e: tuple(e[f] for f in ("gpu", *SIZES)),
)
QUERIES = st.builds(
    query,
    **{f: st.none() | sizes if f in ("batch_size", "kv_len", "kv_heads") else sizes for f, sizes in SIZES.items()},
    device_name=st.sampled_from([None, H100, H200, A100]),
    sm_count=st.sampled_from([None, 132, 114]),
    capability=st.sampled_from([None, "9.0"]),
)


def test_the_same_workload_on_the_same_gpu_is_measured():
    assert find([entry(batch_size=4), entry()], query()) == (entry(), "measured")


def test_else_the_nearest_workload_of_the_same_gpu_is_served():
    entries = [
        entry(kv_len=2048),
        entry(kv_len=16384),
        entry(kv_len=8192, batch_size=64),
    ]
    assert find(entries, query(kv_len=20000)) == (entries[1], "nearest")


def test_the_device_name_decides_before_the_workload():
    exact_on_h200, other_on_h100 = entry(gpu=H200), entry(batch_size=256)
    assert find([exact_on_h200, other_on_h100], query(device_name=H100)) == (
        other_on_h100,
        "nearest",
    )


def test_a_gpu_without_entries_takes_those_of_its_sm_count():
    entries = [entry(gpu="NVIDIA H100 PCIe", sm_count=114), entry(gpu=H100)]
    assert find(entries, query(device_name=H200)) == (entries[1], "transferred")


@pytest.mark.parametrize("gpu", [H100, H200])
def test_of_two_gpus_of_its_sm_count_another_board_takes_the_entries_of_its_model(gpu):
    model = gpu.split()[1]
    entries = [entry(gpu=H100), entry(gpu=H200)]
    assert find(entries, query(device_name=f"NVIDIA {model} NVL"))[0]["gpu"] == gpu
    assert find(entries, query(device_name=f"NVIDIA {model} NVL", sm_count=None))[0]["gpu"] == gpu


def test_the_sm_count_is_enough_where_the_device_name_is_unknown():
    assert find([entry()], query(device_name=None)) == (entry(), "measured")
    assert find([entry()], query(device_name=None, capability=None, kv_len=100)) == (
        entry(),
        "nearest",
    )


def test_else_the_nearest_sm_count_of_the_same_architecture_is_transferred():
    entries = [
        entry(gpu="small", sm_count=66),
        entry(gpu="large", sm_count=160),
        entry(gpu=A100, capability="8.0"),
    ]
    # Nearest by ratio: 160/100 is 1.6, 100/66 is 1.5.
    assert find(entries, query(device_name="new", sm_count=100)) == (
        entries[0],
        "transferred",
    )


@pytest.mark.parametrize("device_name", [None, A100])
def test_nothing_is_transferred_from_another_architecture(device_name):
    assert find([entry()], query(device_name=device_name, capability="8.0")) == (
        None,
        "default",
    )


def test_an_unknown_device_takes_what_there_is():
    asked = query(device_name=None, sm_count=None, capability=None)
    assert find([entry(kv_len=64), entry()], asked) == (entry(), "transferred")


@pytest.mark.parametrize("field", KEY_FIELDS)
def test_another_key_is_never_served(field):
    other = {
        "kernel": "prefill",
        "q_dtype": "float16",
        "kv_dtype": "float8_e4m3fn",
        "features": "sinks",
    }.get(field, 256)
    assert find([entry()], query(**{field: other})) == (None, "default")


def test_an_empty_table_leaves_the_default():
    assert find([], query()) == (None, "default")


def test_an_unknown_batch_size_is_never_measured():
    assert find([entry()], query(batch_size=None)) == (entry(), "nearest")


def test_unknown_lengths_and_heads_exclude_nothing():
    assert find([entry()], query(kv_len=None, kv_heads=None)) == (entry(), "measured")
    entries = [entry(batch_size=2, kv_len=8192), entry(batch_size=16, kv_len=100)]
    assert find(entries, query(batch_size=14, kv_len=None)) == (entries[1], "nearest")


def test_the_batch_counts_where_the_heads_are_unknown():
    entries = [entry(batch_size=1), entry(batch_size=32)]
    assert find(entries, query(batch_size=20, kv_heads=None)) == (entries[1], "nearest")


def test_the_exact_workload_comes_before_one_with_as_many_heads_in_all():
    entries = [entry(batch_size=4, kv_heads=16), entry(batch_size=8, kv_heads=8)]
    assert find(entries, query()) == (entries[1], "measured")
    assert find(entries[:1], query()) == (entries[0], "nearest")


def test_raggedness_weighs_two_octaves():
    near, far = entry(kv_len=8192 * 3, ragged=True), entry(kv_len=8192 * 5, ragged=True)
    assert find([entry(), near], query(ragged=True)) == (near, "nearest")
    assert find([entry(), far], query(ragged=True)) == (entry(), "nearest")


def test_a_tie_goes_to_the_smaller_batch():
    entries = [entry(batch_size=16), entry(batch_size=4)]
    assert find(entries, query(batch_size=8)) == (entries[1], "nearest")


@given(ENTRIES, QUERIES, st.randoms())
@settings(deadline=None)
def test_the_order_of_the_entries_does_not_matter(entries, asked, rng):
    shuffled = list(entries)
    rng.shuffle(shuffled)
    assert find(shuffled, asked) == find(entries, asked)


@given(ENTRIES, st.lists(QUERIES, max_size=8))
@settings(deadline=None)
def test_an_answer_does_not_depend_on_the_queries_before_it(entries, questions):
    table = Table(entries)
    for asked in questions:
        assert table.find(asked) == find(entries, asked)


@given(ENTRIES)
@settings(deadline=None)
def test_every_entry_is_found_as_measured(entries):
    for e in entries:
        asked = query(**{f: e[f] for f in SIZES}, device_name=e["gpu"])
        assert find(entries, asked) == (e, "measured")


@given(ENTRIES, QUERIES)
@settings(deadline=None)
def test_measured_means_that_every_known_size_is_the_same(entries, asked):
    found, source = find(entries, asked)
    if source == "measured":
        assert asked["batch_size"] is not None
        assert all(asked[f] in (None, found[f]) for f in SIZES)


@given(ENTRIES, st.builds(query, **SIZES))
@settings(deadline=None)
def test_no_other_entry_is_nearer_by_more_than_the_rounding(entries, asked):
    def octaves(e):
        heads = math.log2(e["batch_size"] * e["kv_heads"] / asked["batch_size"] / asked["kv_heads"])
        lengths = [math.log2(e[f] / asked[f]) for f in ("kv_len", "q_len")]
        return abs(heads) + sum(map(abs, lengths)) + 2 * (e["ragged"] != asked["ragged"])

    here = [e for e in entries if e["gpu"] == H100] or entries
    found, _ = find(entries, asked)
    assert octaves(found) <= min(map(octaves, here)) + 3 * 0.25


def test_a_growing_kv_cache_is_searched_for_4_times_an_octave():
    table = Table([entry(kv_len=1000)])
    searched = {id(table.find(query(kv_len=n, batch_size=b))) for n in range(1, 1 << 14) for b in (1, 100, 101, 102)}
    assert len(searched) <= 2 * (14 * 4 + 2)


def test_batch_sizes_up_to_64_are_told_apart():
    entries = [entry(batch_size=b) for b in range(1, EXACT_BATCH, 2)]
    for batch_size in random.Random(0).sample(range(1, EXACT_BATCH), 20):
        found, _ = find(entries, query(batch_size=batch_size))
        assert abs(found["batch_size"] - batch_size) <= 1


def test_a_device_name_tells_its_architecture():
    """A config of an H100 may not fit an A100's shared memory: a name alone is enough not to hand it out."""
    assert find([entry(gpu=H100)], query(device_name=A100, sm_count=108, capability=None)) == (None, "default")
    assert find([entry(gpu=H100)], query(device_name="NVIDIA H100 PCIe", sm_count=114, capability=None)) == (
        entry(gpu=H100),
        "transferred",
    )


def test_without_kv_heads_the_whole_model_is_meant():
    """Llama-70b on one GPU and split over 8 share a key; who does not say how many KV heads are here runs it whole."""
    entries = [entry(kv_heads=1), entry(kv_heads=8)]
    for order in (entries, entries[::-1]):
        assert find(order, query(kv_heads=None)) == (entries[1], "measured")
