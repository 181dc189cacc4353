"""The rule that stands in for a table, and how a neighbour's config is fitted."""

from hypothesis import given
from hypothesis import strategies as st

from patune.cachedb import lookup
from patune.kernels import prefill_hopper
from patune.kernels.config import find, query_for
from patune.kernels.defaults import SPLITS, adapt, default_config, fit_splits, packed_heads, parts


def query(**changes):
    sizes = dict(kernel="decode", batch_size=8, kv_heads=8, kv_len=8192, q_len=1, sm_count=132, ragged=False)
    return sizes | changes


@given(st.integers(1, 5000), st.integers(1, 512), st.integers(1, 1 << 17), st.booleans())
def test_splits_are_searched_values_that_leave_64_tokens_a_share(programs, batch_size, kv_len, ragged):
    splits = fit_splits(programs, query(batch_size=batch_size, kv_len=kv_len, ragged=ragged))
    assert splits in SPLITS
    assert splits == 1 or splits * 64 <= kv_len
    assert splits <= max(1, 3 if ragged else 1, programs // (batch_size * 8))


@given(st.sampled_from((4, 8, 16, 32, 64)), st.sampled_from((1, 2, 4, 8)))
def test_a_neighbour_s_config_keeps_its_programs(batch_size, factor):
    """Twice the batch takes half of the splits; every other tunable stays."""
    entry = dict(config={"BLOCK_N": 64, "num_splits": 16}, batch_size=4, kv_heads=8, q_len=1, sm_count=132)
    config = adapt(entry, query(batch_size=batch_size * factor))
    assert config["BLOCK_N"] == 64
    assert config["num_splits"] == max(s for s in SPLITS if s <= max(1, 64 // (batch_size * factor)))


@given(st.sampled_from((1, 2, 4, 8, 16, 64)), st.booleans())
def test_a_neighbour_s_cluster_is_all_splits_or_none(batch_size, ragged):
    """A ragged batch gets none: its shares follow from the whole batch."""
    entry = dict(
        config={"BLOCK_N": 64, "num_stages": 3, "cluster": 4, "num_splits": 4}, batch_size=4, kv_heads=8, q_len=1, sm_count=132
    )
    config = adapt(entry, query(batch_size=batch_size) | {"ragged": ragged})
    assert config["cluster"] == (config["num_splits"] if config["num_splits"] in (1, 2, 4, 8) and not ragged else 1)


@given(st.integers(1, 300), st.integers(1, 4096), st.integers(0, 1 << 17), st.integers(1, 32), st.booleans())
def test_a_prefill_is_split_where_its_items_leave_sms_idle(batch_size, q_len, prefix, group, ragged):
    """As many items as fit the SMs, each of 512 keys or more, and never one split too few by half."""
    sizes = query(
        kernel="prefill_hopper", batch_size=batch_size, q_len=q_len, kv_len=prefix + q_len, q_heads_per_kv=group, ragged=ragged
    )
    splits = default_config(sizes | dict(head_dim=128, page_size=16, q_dtype="bfloat16", kv_dtype="bfloat16"))["num_splits"]
    assert splits in prefill_hopper.TUNABLES["num_splits"]
    items = parts(sizes)
    assert items >= batch_size * 8 * q_len * group / 128
    assert splits == 1 or (splits * items <= 132 and splits * 512 <= prefix + q_len)
    assert splits == 16 or 2 * splits * items > 132 or 2 * splits * 512 > prefix + q_len


@given(st.integers(1, 40), st.integers(1, 5000))
def test_rows_of_no_head_only_where_they_make_fewer_items(group, q_len):
    """Rows of a token are a power of two, which a box of TMA can bring; never more items than with heads that fill their rows."""
    pack = packed_heads(group, q_len)
    assert pack in (1, 2, 4, 8, 16)
    items = lambda pack: -(-group // pack) * -(-q_len * pack // 128)
    divisors = [n for n in (1, 2, 4, 8, 16) if group % n == 0]
    assert items(pack) <= min(map(items, divisors))
    assert group % pack == 0 or (pack > group and items(pack) < min(map(items, divisors)))


@given(st.sampled_from((1, 2, 4, 8)), st.sampled_from((64, 128, 512)))
def test_a_neighbour_s_prefill_keeps_its_items(batch_size, q_len):
    """Measured with 8 splits of the 8 items of 32 tokens."""
    sizes = query(kernel="prefill_hopper", q_heads_per_kv=4, kv_len=1 << 16)
    entry = sizes | dict(config={"num_splits": 8}, batch_size=1, q_len=32)
    config = adapt(entry, sizes | dict(batch_size=batch_size, q_len=q_len))
    assert config["num_splits"] == max(1, 8 * 32 // (batch_size * q_len))
    assert adapt(entry, sizes | dict(q_len=q_len, kv_len=q_len))["num_splits"] == 1


def test_a_neighbour_with_items_for_all_sms_says_nothing_about_splits():
    """Half of its items are still more than SMs, and are not cut in two."""
    sizes = query(kernel="prefill_hopper", q_heads_per_kv=4, kv_len=4096, q_len=4096)
    assert adapt(sizes | dict(config={"num_splits": 1}, batch_size=8), sizes | dict(batch_size=4))["num_splits"] == 1


def test_a_gpu_with_fewer_sms_gets_fewer_splits():
    entry = dict(config={"num_splits": 16}, batch_size=4, kv_heads=8, q_len=1, sm_count=132)
    assert adapt(entry, query(batch_size=4, sm_count=66)) == {"num_splits": 8}


def test_a_measured_config_without_one_of_the_kernel_s_tunables_is_not_used():
    """A table outlives a version that gave the kernel another tunable; a launch could only miss it."""
    gpu = "NVIDIA H100 80GB HBM3"
    sizes = dict(head_dim=128, page_size=16, sm_count=132, q_heads_per_kv=4, q_dtype="bfloat16", batch_size=8, kv_len=4096)
    asked = query_for(
        "decode_hopper", **sizes, device_name=gpu, kv_dtype=None, q_len=1, kv_heads=8, ragged=False, features=""
    )  # fmt: skip
    whole = default_config(asked)
    entry = asked | dict(gpu=gpu, us=1.0, when="", triton="", torch="", driver="", source_hash="", mode="measured")

    def found(values):
        return find(asked, table=lookup.Table([entry | {"config": values}]))

    assert found(whole | {"num_stages": 6}) == whole | {"num_stages": 6}
    for name in whole:
        assert found({k: v for k, v in whole.items() if k != name}) == whole
    assert found(whole | {"waves": 2}) == whole
