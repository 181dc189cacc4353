"""The config to use where the table has none, and how a neighbour's config is fitted to the call at hand.

Standard library only and free of imports from patune: `patune export --to python` ships this file's text.
"""

CLUSTERS = (1, 2, 4, 8)  # the values of cluster that are searched; of 16, few fit a GPU's groups of SMs: 6 to 35% slower on an H100
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # the values of num_splits that are searched
PREFILL_SPLITS = SPLITS[:8]  # those of a prefill
HBM_BLOCKS = {"h100": 60, "h200": 86}  # by a word of the device name, as their 3.35 and 4.8 TB/s: see hbm_blocks()


def default_config(query: dict) -> dict:
    """A sane config for any GPU: tiles that fit 99 KB of shared memory, splits by how many programs fill the SMs.

    `query` has kernel, head_dim, page_size, q_heads_per_kv, q_dtype, kv_dtype, sm_count, batch_size, kv_heads, kv_len, q_len and
    ragged; sm_count, batch_size, kv_heads and kv_len may be None.
    """
    large = query["head_dim"] > 128 or query["q_dtype"] == "float32"
    huge = query["head_dim"] > 256
    if query["kernel"] == "append":
        # 8 elements a thread: 1.9% behind the best of an H100's landscape in the geometric mean, 2.4% of an H200's, 12% at most. A
        # token by one warp a program takes 2.2 and 2.4 times as long as the best.
        return {"BLOCK_T": max(1, min(32, 1024 >> (query["head_dim"] - 1).bit_length())), "num_warps": 4}
    if query["kernel"] == "prefill_hopper":
        # Behind the best of an H100's landscape, geometric mean: 2.6% (d64), 2.9% and 3.4% (d128, pages of 16 and 64), 1.2%
        # (d256). Items of a ragged batch are taken one by one: between 6% slower (d256) and 5% faster (d128) than dealt out, faster
        # on 6 of 8 batches of an H100.
        small, taken = query["head_dim"] <= 64, query["ragged"] and not in_one_wave(query)
        stages, issue = (3, 2) if small else (2, 1)
        tiles = {"BLOCK_N": 64 if large else 128, "num_stages": stages, "schedule": 2 if taken else 1, "issue": issue}
        return {**tiles, "num_splits": prefill_splits(query)}
    if query["kernel"] == "prefill":
        # Behind the best of an H100's landscape, geometric mean: 8% (d64), 19 and 14% (d128, pages of 16 and 64), 22% (d256). 128
        # rows would make that 2% (d256), or with at most 128 registers 5% (d64) and 8% (d128), but need more shared memory than
        # every GPU has, or spill on GPUs that are no Hopper.
        rows, warps = 32 if huge else 64, 8 if huge or query["q_dtype"] == "float32" else 4
        tiles = {"BLOCK_M": rows, "BLOCK_N": 32 if large else 64, "num_warps": warps, "num_stages": 2, "maxnreg": 0}
        return {**tiles, "num_splits": prefill_splits(query, rows)}
    if query["kernel"] == "decode_hopper":
        # A program an SM, clusters where they keep a third of the SMs busy or as many as stage 2 would: 0.4% behind the best of an
        # H100's landscape in the geometric mean, 5% at most; 1.6% and 21% of an H200's. Of larger clusters few fit side by side.
        row_bytes = query["head_dim"] * (1 if "float8" in query["kv_dtype"] else 2)
        tile, sms = 64 if row_bytes > 256 else 128, query["sm_count"] or 132
        heads, kv_len = _kv_heads(query), query["kv_len"] or 1 << 30
        stages = 6 if row_bytes <= 64 else 3 if row_bytes <= 128 else 2
        for cluster in (8, 4, 2) if query["batch_size"] and not query["ragged"] else ():
            room, programs = sms if cluster == 2 else sms // 2, heads * cluster
            if programs <= room and cluster * tile <= kv_len and (programs >= sms / 3 or kv_len <= 2 * cluster * tile):
                if cluster > 2 and row_bytes == 256:  # up to 19% of a sequence up to 8k; 3% slower at most elsewhere
                    tile, stages = 64, 3
                return {"BLOCK_N": tile, "num_stages": stages, "cluster": cluster, "num_splits": cluster}
        splits = min(96, fit_splits(sms, query, tokens=2 * tile, ragged=2 if heads <= 4 * sms else 1))
        return {"BLOCK_N": tile, "num_stages": stages, "cluster": 1, "num_splits": splits}
    # 2 programs an SM: 4% behind the best of an H100's landscape (d128, page 16, group 4, geometric mean), 14% at most.
    splits = fit_splits(2 * (query["sm_count"] or 132), query)
    return {"BLOCK_N": 32 if large else 64, "num_warps": 8 if huge else 4, "num_stages": 2 if large else 3, "num_splits": splits}


def block_tokens(heads: int) -> int:
    """Tokens of an item of prefill_hopper that has rows of so many query heads: 128 rows, in multiples of 8 a head."""
    return 128 // heads // 8 * 8


def packed_heads(q_heads_per_kv: int, q_len: int, block_tokens=block_tokens) -> int:
    """Query heads of a KV head that share a block of query rows: as many as make the fewest blocks of q_len new tokens.

    block_tokens: the tokens of a block by its heads.
    """
    blocks = lambda heads: q_heads_per_kv // heads * -(-q_len // block_tokens(heads))
    return min((n for n in range(16, 0, -1) if q_heads_per_kv % n == 0 and block_tokens(n)), key=blocks)


def prefill_blocks(sizes: dict, block_m: int = 128) -> int:
    """Blocks of query rows of a prefill, one a program: items of 128 rows of prefill_hopper, block_m rows of the plain template."""
    tokens = block_tokens if sizes["kernel"] == "prefill_hopper" else lambda heads: block_m // heads
    heads = packed_heads(sizes["q_heads_per_kv"], sizes["q_len"], tokens)
    return _kv_heads(sizes) * sizes["q_heads_per_kv"] // heads * -(-sizes["q_len"] // tokens(heads))


def in_one_wave(query: dict) -> bool:
    """Whether a prefill has no more items of prefill_hopper than there are SMs: each program has one, however they are given."""
    return prefill_blocks(query) <= (query["sm_count"] or 132)


def hbm_blocks(query: dict) -> int:
    """The blocks of prefill_hopper, each of other keys, that HBM feeds; another GPU is taken for an H100."""
    words = (query.get("device_name") or "").lower().replace("-", " ").split()
    return next((HBM_BLOCKS[word] for word in words if word in HBM_BLOCKS), HBM_BLOCKS["h100"])


def prefill_splits(query: dict, block_m: int = 128) -> int:
    """The num_splits of a prefill with which its last block ends first, in parts of 512 keys or more; 1 for an unknown batch.

    Time is in keys that a block walks: one takes 13 ns on an H100 (prefill_hopper, head_dim 128). A block spends 128 to start and
    end, a part of one 435 more to be written and joined (both ways of its rows in fp32, at an SM's share of HBM), a second kernel
    256; HBM brings the keys of hbm_blocks() in the time of one, of the plain template 90. Scratch and a second kernel are not
    worth less than 5%. With the best tiles, where a landscape has more than one number of splits, behind the best one in the
    geometric mean: 0.5% and 0.0% (prefill_hopper, an H100 and an H200; 3.9% with 60 blocks on the H200), 2.1% and 0.6% (plain).
    """
    if not query["batch_size"]:
        return 1
    plain = query["kernel"] == "prefill"
    small = plain and query["head_dim"] <= 256 and block_m * query["head_dim"] <= 1 << 14  # two programs an SM
    at_once = (query["sm_count"] or 132) * (2 if small else 1)
    keys, blocks = query["kv_len"] or 8192, prefill_blocks(query, block_m)
    read = _kv_heads(query) * keys / (90 if plain else hbm_blocks(query))
    waves, tails = divmod(blocks, at_once)
    tail_keys = max(keys - query["q_len"], 0) + 128 if waves else keys  # of prefill_hopper's last wave: long items go first

    def walk(splits: int) -> float:
        ends = 128 if splits == 1 else 563
        if plain:  # all blocks in as many parts
            return -(-blocks * splits // at_once) * (keys / splits + ends)
        parts = min(splits, at_once // tails) if tails else 1  # of the blocks beyond whole waves
        return waves * (keys + 128) + (tail_keys / parts + ends if tails else 0)

    def end(splits: int) -> float:
        return max(walk(splits), read) + (0 if splits == 1 else 256)

    best = min((splits for splits in PREFILL_SPLITS if splits == 1 or splits * 512 <= keys), key=end)
    return best if end(best) < 0.95 * end(1) else 1


def _kv_heads(sizes: dict) -> int:
    """KV heads of all sequences."""
    return (sizes["batch_size"] or 1) * (sizes["kv_heads"] or 8)


def fit_splits(programs: int, query: dict, tokens: int = 64, ragged: int = 3) -> int:
    """Splits of a decode so that at most `programs` run, none with less than `tokens`, and at least `ragged` of a ragged batch."""
    wanted = programs // _kv_heads(query)
    if query["ragged"]:  # one split would leave the longest sequence to one program
        wanted = max(wanted, ragged)
    wanted = min(wanted, (query["kv_len"] or 1 << 30) // tokens)
    return max(splits for splits in SPLITS if splits <= max(1, wanted))


def adapt(entry: dict, query: dict) -> dict:
    """The config of a table entry for another workload or GPU: of a decode an SM gets as many programs, so the splits change; those
    of a prefill follow from its blocks, and whether these have to be given out.

    Where a neighbour needs no stage 2, its sequences being a cluster or a program each, programs are not what it has in common with
    other numbers of KV heads: there and on other GPUs the default's rule decides. Left out in turn, decodes of an H100's and of an
    H200's landscape took 0.5% and 1.1% more than the best in the geometric mean, at most 5% and 20%; with as many programs 1.4%
    and 2.5%, 18% and 28%.
    """
    config = dict(entry["config"])
    if "num_splits" in config and query["batch_size"] is not None:
        heads = _kv_heads(query | {size: entry[size] for size in ("batch_size", "kv_heads")})
        sms = query["sm_count"] or entry["sm_count"]
        alike = (heads, sms, bool(entry["ragged"])) == (_kv_heads(query), entry["sm_count"], bool(query["ragged"]))
        if query["kernel"] in ("prefill", "prefill_hopper"):
            config["num_splits"] = prefill_splits(query, config.get("BLOCK_M", 128))
        elif not alike and config["num_splits"] == config.get("cluster"):
            config |= {name: value for name, value in default_config(query).items() if name in ("cluster", "num_splits")}
        elif not alike or config["num_splits"] > 1:
            config["num_splits"] = fit_splits(config["num_splits"] * heads * sms // entry["sm_count"], query)
    if query["kernel"] == "prefill_hopper" and in_one_wave(query):
        config["schedule"] = 1
    if config.get("cluster", 1) > 1:  # of all shares of a sequence
        config["cluster"] = config["num_splits"] if config["num_splits"] in CLUSTERS and not query["ragged"] else 1
    return config


def fit(config, key, of, to) -> dict:
    """adapt() between two Workloads of a Key: what a template proposes on workload `to` after config has won on `of`."""
    return adapt(query_of(key, of) | {"config": config}, query_of(key, to))


def answer(query: dict, entry: dict | None, source: str, default: dict) -> tuple[dict, str]:
    """The config for a query from the table's entry for it, and its source.

    default: what an untuned call uses; empty for a kernel that has none. An entry without one of its tunables, or with another one,
    is from before they were what they are and is passed over.
    """
    if entry is None or (default and entry["config"].keys() != default.keys()):
        return default, "default"
    return dict(entry["config"]) if source == "measured" else adapt(entry, query), source


def without_cluster(config: dict, sm_count: int, query: dict) -> dict:
    """The config with stage 2 in the place of clusters: a program an SM, where clusters may have left half of the SMs idle.

    On the 21 batches of an H100's landscape whose best config has clusters: 0.5% behind the best without in the geometric mean,
    3% at most; on the 18 of an H200's 1.8% and 7%.
    """
    return {**config, "cluster": 1, "num_splits": fit_splits(sm_count, query, tokens=config["BLOCK_N"])}


def query_of(key, workload) -> dict:
    """The query that asks for exactly this Key and Workload."""
    return {
        "kernel": key.kernel, "head_dim": key.head_dim, "page_size": key.page_size, "q_heads_per_kv": key.q_heads_per_kv,
        "q_dtype": key.q_dtype, "kv_dtype": key.kv_dtype, "features": key.features, "sm_count": key.sm_count,
        "device_name": key.gpu, "capability": None, "batch_size": workload.batch_size, "kv_len": workload.kv_len,
        "q_len": workload.q_len, "kv_heads": workload.kv_heads, "ragged": workload.ragged,
    }  # fmt: skip
