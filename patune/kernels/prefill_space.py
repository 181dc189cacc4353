"""The rule for num_splits that both templates of prefill share."""

from .defaults import prefill_blocks, prefill_splits


def far_from_even(splits: int, query: dict, block_m: int = 128) -> str | None:
    """Why a number of splits need not run: on an H100 and an H200 the best was at most twice as many or few as prefill_splits says.

    query: of a workload that is tuned, so its sizes are known. block_m: query rows of a block.
    """
    if splits > 1 and splits * 256 > query["kv_len"]:
        return "less than 256 keys a split"
    even = prefill_splits(query, block_m)
    if not even <= 2 * splits <= 4 * even:
        return "too many or few splits for even waves"
    if splits > even and splits * prefill_blocks(query, block_m) > query["sm_count"]:
        return "more programs than SMs, and more than make even waves"
    return None
