"""The rule that stands in for a table, and how a neighbour's config is fitted."""

from hypothesis import given
from hypothesis import strategies as st

from patune.cachedb import lookup
from patune.kernels import prefill_hopper
from patune.kernels.config import find, query_for
from patune.kernels.defaults import (
    SPLITS,
    adapt,
    block_tokens,
    default_config,
    fit_splits,
    packed_heads,
    prefill_blocks,
    prefill_splits,
)


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
    entry = query(batch_size=4) | {"config": {"BLOCK_N": 64, "num_splits": 16}}
    config = adapt(entry, query(batch_size=batch_size * factor))
    assert config["BLOCK_N"] == 64
    assert config["num_splits"] == max(s for s in SPLITS if s <= max(1, 64 // (batch_size * factor)))


@given(st.sampled_from((1, 2, 4, 8, 16, 64)), st.sampled_from((512, 8192)), st.booleans())
def test_a_neighbour_s_cluster_is_all_splits_or_none(batch_size, kv_len, ragged):
    """A ragged batch gets none: its shares follow from the whole batch. Of other heads, it is the default's."""
    entry = query(batch_size=4) | {"config": {"BLOCK_N": 64, "num_stages": 3, "cluster": 4, "num_splits": 4}}
    sizes = query(
        kernel="decode_hopper", batch_size=batch_size, kv_len=kv_len, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16"
    )
    sizes["ragged"] = ragged
    config, default = adapt(entry, sizes), default_config(sizes)
    assert config["cluster"] in (1, config["num_splits"]) and not (ragged and config["cluster"] > 1)
    assert (config["BLOCK_N"], config["num_stages"]) == (64, 3)
    assert adapt(entry, sizes | {"batch_size": None})["cluster"] == (1 if ragged else 4)
    if batch_size == 4 and not ragged:
        assert config == entry["config"]
    else:
        assert (config["cluster"], config["num_splits"]) == (default["cluster"], default["num_splits"])


@given(
    st.integers(1, 300), st.integers(1, 4096), st.integers(0, 1 << 17), st.integers(1, 32), st.booleans(),
    st.sampled_from(("prefill", "prefill_hopper")),
)  # fmt: skip
def test_a_prefill_is_split_only_where_its_last_wave_ends_earlier(batch_size, q_len, prefix, group, ragged, kernel):
    """In parts of 512 keys or more, all blocks of the plain template in fewer waves, or Hopper's blocks beyond whole waves."""
    sizes = query(
        kernel=kernel, batch_size=batch_size, q_len=q_len, kv_len=prefix + q_len, q_heads_per_kv=group, ragged=ragged,
        head_dim=128, page_size=16, q_dtype="bfloat16", kv_dtype="bfloat16",
    )  # fmt: skip
    config = default_config(sizes)
    splits, blocks = config["num_splits"], prefill_blocks(sizes, config.get("BLOCK_M", 128))
    assert splits in prefill_hopper.TUNABLES["num_splits"]
    assert blocks >= batch_size * 8 * q_len * group / config.get("BLOCK_M", 128)
    assert splits == 1 or splits * 512 <= prefix + q_len
    if kernel == "prefill":
        assert splits == 1 or -(-blocks * splits // 264) < splits * -(-blocks // 264)
    else:
        assert splits == 1 or 132 // (blocks % 132) >= 2


@given(st.integers(513, 4096), st.integers(13, 17))
def test_a_long_prefix_leaves_no_wave_almost_empty(q_len, log_kv_len):
    """A chunk whose items are a few more than the SMs takes a quarter of a wave for them, not a whole one."""
    sizes = query(kernel="prefill_hopper", batch_size=1, q_len=q_len, kv_len=1 << log_kv_len, q_heads_per_kv=4, head_dim=128)
    splits, (waves, tails) = prefill_splits(sizes), divmod(prefill_blocks(sizes), 132)
    if waves <= 2 and 0 < tails <= 32 and q_len <= 1 << log_kv_len - 2:
        assert 1 / min(splits, 132 // tails) <= 0.25


def test_few_items_of_many_keys_are_split_to_fill_the_sms():
    for batch_size, q_len, kv_len in ((1, 16, 8192), (1, 64, 4096), (2, 32, 16384), (1, 128, 32768)):
        sizes = query(kernel="prefill_hopper", batch_size=batch_size, q_len=q_len, kv_len=kv_len, q_heads_per_kv=4, head_dim=128)
        assert 132 / 2 < prefill_blocks(sizes) * prefill_splits(sizes) <= 132


@given(st.integers(1, 40), st.integers(1, 5000), st.sampled_from((None, 16, 32, 64, 128)))
def test_heads_share_a_block_where_that_makes_fewer(group, q_len, block_m):
    """All heads have a block, a block has rows for each of its heads, of an item of prefill_hopper in eights, and no other division
    makes fewer blocks."""
    tokens = block_tokens if block_m is None else lambda heads: block_m // heads
    heads = packed_heads(group, q_len, tokens)
    assert group % heads == 0 and 0 < tokens(heads) * heads <= (block_m or 128)
    assert block_m or tokens(heads) % 8 == 0
    blocks = lambda heads: group // heads * -(-q_len // tokens(heads))
    assert blocks(heads) == min(blocks(n) for n in range(1, 17) if group % n == 0 and tokens(n))


@given(st.sampled_from((1, 2, 4, 8)), st.sampled_from((64, 128, 512, 4096)), st.sampled_from((1, 8)))
def test_a_neighbour_s_prefill_has_the_splits_of_its_own_blocks(batch_size, q_len, measured):
    """Whatever the neighbour had: many blocks of one are no reason to cut fewer of another, nor few to cut more."""
    sizes = query(kernel="prefill", q_heads_per_kv=4, kv_len=1 << 15, head_dim=128)
    entry = sizes | dict(config={"BLOCK_M": 128, "num_splits": measured}, batch_size=1, q_len=32)
    asked = sizes | dict(batch_size=batch_size, q_len=q_len)
    assert adapt(entry, asked) == {"BLOCK_M": 128, "num_splits": prefill_splits(asked, 128)}
    assert q_len < 4096 or adapt(entry, asked)["num_splits"] == 1


def test_a_prefill_is_split_further_where_hbm_feeds_more_blocks():
    """64 items take as long as an H100's HBM brings their keys, but not an H200's; a GPU without a figure is taken for an H100."""
    sizes = query(kernel="prefill_hopper", batch_size=8, q_len=32, kv_len=4096, q_heads_per_kv=4, head_dim=128, q_dtype="bfloat16")
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B300", None)
    assert [prefill_splits(sizes | {"device_name": name}) for name in names] == [1, 2, 1, 1]


def test_a_gpu_with_fewer_sms_gets_fewer_splits():
    entry = query(batch_size=4) | {"config": {"num_splits": 16}}
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


@given(st.integers(1, 64), st.integers(1, 8192), st.integers(0, 1 << 16), st.sampled_from((1, 3, 4, 8)), st.integers(1, 1 << 22))
def test_a_prefill_beside_a_decode_keeps_most_sms(batch_size, q_len, prefix, group, tokens):
    """Of one wave it is not held back; of several, of items that take equally long, next to no decode costs it none more."""
    sizes = query(
        kernel="prefill_hopper", batch_size=batch_size, q_len=q_len, kv_len=prefix + q_len, q_heads_per_kv=group, head_dim=128,
        page_size=16, q_dtype="bfloat16", kv_dtype="bfloat16",
    )  # fmt: skip
    blocks, programs, least = (
        prefill_blocks(sizes),
        prefill_hopper.programs_beside(sizes, 1, tokens),
        prefill_hopper.programs_beside(sizes, 1, 1),
    )
    if blocks <= 132:
        assert programs is None
        return
    assert prefill_hopper.programs_beside(sizes, 2, tokens) == 132
    assert 99 <= programs <= least <= 132, "the less there is to decode, the fewer SMs it is left"
    if prefix >= 3 * q_len:
        assert -(-blocks // least) == -(-blocks // 132)
