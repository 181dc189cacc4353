"""Bad input: one line that begins with the argument's name and says what was expected, before anything is launched."""

from functools import partial

import pytest
import torch
from paged import Batch, Case

import patune
from patune.errors import UsageError
from patune.kernels import checks, decode, registry
from patune.kernels.cache import paged_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = Batch(Case((1, 1), (20, 33), dtype="bfloat16"), DEVICE)  # 8 query heads, 2 KV heads, head_dim 64, pages of 16
PAGES = dict(kv_indices=BATCH.kv_indices, kv_indptr=BATCH.kv_indptr, kv_last_page_len=BATCH.kv_last_page_len)
KV, Q = BATCH.kv_cache, BATCH.q
NEW = torch.zeros(2, 2, 64, dtype=torch.bfloat16, device=DEVICE)
ROWS = torch.zeros(2, dtype=torch.int32, device=DEVICE)
LSE = torch.zeros(2, 8, device=DEVICE)
CALLS = {
    "decode": (patune.paged_decode, dict(q=Q, kv_cache=KV, **PAGES)),
    "prefill": (patune.paged_prefill, dict(q=Q, kv_cache=KV, qo_indptr=BATCH.qo_indptr, **PAGES, max_q_len=1)),
    "append": (
        patune.append_paged_kv_cache,
        dict(k=NEW, v=NEW, batch_indices=ROWS, positions=ROWS, kv_cache=KV, **PAGES),
    ),
    "mixed": (
        patune.paged_attention_with_cache,
        dict(q=Q, k=NEW, v=NEW, kv_cache=KV, qo_indptr=BATCH.qo_indptr, **PAGES, num_prefill=1, num_decode=1, max_q_len=1),
    ),
    "merge": (patune.merge_states, dict(o_a=Q, lse_a=LSE, o_b=Q, lse_b=LSE)),
    "positions": (
        patune.get_batch_indices_positions,
        dict(qo_indptr=BATCH.qo_indptr, seq_lens=BATCH.seq_lens, num_tokens=2),
    ),
}


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def empty(*shape: int, dtype=torch.bfloat16, device=DEVICE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def nothing_launched(launched):
    """A wrong call must not get as far as a launch, and a right one need not run."""
    return launched


def check(call: str, changes: dict, message: str, error: type = ValueError) -> None:
    function, arguments = CALLS[call]
    with pytest.raises(error) as caught:
        function(**(arguments | changes))
    text = str(caught.value)
    assert text.startswith(message), text
    assert "\n" not in text and len(text) < 200


def test_the_calls_below_are_right_but_for_what_they_change(nothing_launched):
    """Unchanged, each of them launches or returns."""
    for function, arguments in CALLS.values():
        function(**arguments)
    assert {launch.fn.__name__ for launch in nothing_launched} >= {"decode_split", "prefill_attention", "append_kv"}


ATTENTION = ("decode", "prefill", "mixed")
PAGED = (*ATTENTION, "append")
META = "meta"

WRONG = [
    # q, k, v
    (ATTENTION, dict(q=empty(2, 512)), "q: expected [tokens, heads, head_dim], got shape (2, 512)"),
    (ATTENTION, dict(q=Q.to(torch.float64)), "q: expected bfloat16, float16 or float32, got torch.float64"),
    (ATTENTION, dict(q=Q.to(torch.float8_e4m3fn)), "q: expected bfloat16, float16 or float32, got torch.float8_e4m3fn"),
    (ATTENTION, dict(q=empty(2, 7, 64)), "q: 7 query heads are no multiple of the cache's 2 KV heads"),
    (ATTENTION, dict(q=empty(2, 0, 64)), "q: 0 query heads are no multiple of the cache's 2 KV heads"),
    (("decode",), dict(q=empty(3, 8, 64)), "q: expected 2 tokens for 2 sequences of 1, got 3"),
    (("decode",), dict(q_len_per_seq=2), "q: expected 4 tokens for 2 sequences of 2, got 2"),
    (("decode",), dict(q_len_per_seq=0), "q_len_per_seq: expected at least 1, got 0"),
    (("append", "mixed"), dict(k=empty(2, 3, 64)), "k: expected 2 heads, got 3"),
    (("append", "mixed"), dict(v=empty(2, 3, 64)), "v: expected 2 heads, got 3"),
    (("append", "mixed"), dict(v=empty(2, 2, 32)), "v: expected head_dim 64, got 32"),
    (("append", "mixed"), dict(k=empty(4, 64)), "k: expected [tokens, heads, head_dim], got shape (4, 64)"),
    (("append",), dict(k=NEW.to(torch.int32)), "k: expected bfloat16, float16 or float32, got torch.int32"),
    (("append",), dict(v=empty(3, 2, 64)), "v: expected torch.bfloat16 (2, 2, 64) like k"),
    (("append",), dict(v=NEW.half()), "v: expected torch.bfloat16 (2, 2, 64) like k"),
    (("mixed",), dict(k=empty(3, 2, 64)), "k: expected 2 tokens of torch.bfloat16 on"),
    (("mixed",), dict(v=NEW.half()), "v: expected 2 tokens of torch.bfloat16 on"),
    # kv_cache
    (ATTENTION, dict(kv_cache=KV.float()), "kv_cache: expected torch.bfloat16 like q, or fp8, got torch.float32"),
    (("append",), dict(kv_cache=KV.float()), "kv_cache: expected torch.bfloat16 like k, or fp8, got torch.float32"),
    (PAGED, dict(kv_cache=KV[:, 0]), "kv_cache: expected [pages, 2, kv_heads, page_size, head_dim] for HND, got shape"),
    (PAGED, dict(kv_cache=KV[:, :1]), "kv_cache: expected [pages, 2, kv_heads, page_size, head_dim] for HND, got shape"),
    (PAGED, dict(kv_cache=KV[:, 0], kv_layout="NHD"), "kv_cache: expected [pages, 2, page_size, kv_heads, head_dim] for NHD"),
    (PAGED, dict(kv_cache=(KV, KV)), "kv_cache: expected a pair of [pages, kv_heads, page_size, head_dim] for HND"),
    (PAGED, dict(kv_cache=(KV[:, 0],)), "kv_cache: expected one tensor or a (k, v) pair, got 1 tensors"),
    (PAGED, dict(kv_cache=(KV[:, 0], KV[1:, 0])), "kv_cache: k is (8, 2, 16, 64) but v is (7, 2, 16, 64)"),
    (PAGED, dict(kv_cache=(KV[:, 0], KV[:, 1].half())), "kv_cache: k is torch.bfloat16 but v is torch.float16"),
    (PAGED, dict(kv_cache=(KV[:, 0], KV[:, 1].to(META))), "kv_cache: v is on meta but"),
    (PAGED, dict(kv_cache=KV.to(META)), "kv_cache: is on meta but"),
    (PAGED, dict(kv_cache=empty(8, 2, 2, 16, 32)), "kv_cache: head_dim is 32 but"),
    (PAGED, dict(kv_cache=empty(8, 2, 2, 64, 16).transpose(3, 4)), "kv_cache: head_dim must be contiguous; pass a contig"),
    (PAGED, dict(kv_cache=empty(8, 2, 2, 0, 64)), "kv_cache: page_size is 0, expected 1 to 256; is kv_layout 'HND' right?"),
    (PAGED, dict(kv_cache=empty(1, 2, 2, 257, 64)), "kv_cache: page_size is 257, expected 1 to 256; is kv_layout 'HND' right?"),
    (ATTENTION, dict(kv_cache=empty(8, 2, 0, 16, 64)), "q: 8 query heads are no multiple of the cache's 0 KV heads"),
    (PAGED, dict(kv_layout="hnd"), "kv_layout: expected 'HND' or 'NHD', got 'hnd'"),
    # page tables
    *(
        (calls, changes, message)
        for name, calls in [("kv_indices", PAGED), ("kv_indptr", PAGED), ("kv_last_page_len", PAGED),
                            ("qo_indptr", ("prefill", "mixed")), ("batch_indices", ("append",)), ("positions", ("append",))]
        for changes, message in [
            ({name: i32(0, 1, 2).long()}, f"{name}: expected int32, got torch.int64; use .to(torch.int32)"),
            ({name: i32(0, 1, 2)[None]}, f"{name}: expected 1 dimension, got shape (1, 3)"),
            ({name: i32(0)[0]}, f"{name}: expected 1 dimension, got shape ()"),
            ({name: i32(0, 1, 2).to(META)}, f"{name}: is on meta, expected"),
            ({name: i32(0, 0, 1, 0, 2, 0)[::2]}, f"{name}: must be contiguous; call .contiguous()"),
        ]
    ),
    (PAGED, dict(kv_last_page_len=i32(4)), "kv_last_page_len: expected 2 entries for a batch of 2, got 1"),
    (("prefill", "mixed"), dict(qo_indptr=i32(0, 1)), "qo_indptr: expected 3 entries for a batch of 2, got 2"),
    (("mixed",), dict(kv_indptr=i32(0, 1)), "kv_indptr: expected 3 entries for a batch of 2, got 2"),
    (("decode", "prefill", "append"), dict(kv_indptr=i32()), "kv_indptr: expected batch+1 entries, got none"),
    (("append",), dict(positions=i32(1)), "positions: expected 2 entries for a batch of 2, got 1"),
    (("append",), dict(batch_indices=i32(1)), "batch_indices: expected 2 entries for a batch of 2, got 1"),
    # options
    (ATTENTION, dict(sliding_window=0), "sliding_window: expected at least 1 or None, got 0"),
    (ATTENTION, dict(logits_soft_cap=0.0), "logits_soft_cap: expected a positive number or None, got 0.0"),
    (ATTENTION, dict(logits_soft_cap=-1.0), "logits_soft_cap: expected a positive number or None, got -1.0"),
    (ATTENTION, dict(logits_soft_cap=float("nan")), "logits_soft_cap: expected a positive number or None, got nan"),
    (ATTENTION, dict(logits_soft_cap=float("inf")), "logits_soft_cap: expected a positive number or None, got inf"),
    (ATTENTION, dict(sinks=empty(2)), "sinks: expected [8], a logit a query head, got (2,)"),
    (ATTENTION, dict(sinks=empty(8, device=META)), "sinks: is on meta but q is on"),
    (ATTENTION, dict(sinks=empty(16)[::2]), "sinks: must be contiguous; call .contiguous()"),
    *(
        (PAGED, {name: value}, f"{name}: {message}")
        for name in ("k_scale", "v_scale")
        for value, message in [
            (torch.ones(2, device=DEVICE), "expected one element (per-tensor scale), got shape (2,)"),
            (torch.ones(1, device=META), "is on meta, expected"),
            (torch.ones(1, device=DEVICE).half(), "expected float32, got torch.float16"),
        ]
    ),
    (("decode", "prefill"), dict(out=empty(2, 8, 32)), "out: expected (2, 8, 64) like q, got (2, 8, 32)"),
    (("decode", "prefill"), dict(out=Q.float()), "out: expected torch.bfloat16 on"),
    (("decode", "prefill"), dict(out=Q.to(META)), "out: expected torch.bfloat16 on"),
    (("prefill",), dict(max_q_len=-1), "max_q_len: expected at least 0, got -1"),
    (("decode", "prefill", "append"), dict(config=dict(BLOCK_X=1)), "config: unknown tunable BLOCK_X; "),
    (("decode",), dict(config=dict(BLOCK_N=16, num_splits=1)), "config: lacks num_stages, num_warps"),
    (("decode",), dict(config=dict(BLOCK_N=16, num_warps=4, num_stages=2, num_splits=0)), "config: num_splits must be at least 1"),
    # mixed
    (("mixed",), dict(num_prefill=-1), "num_prefill: expected at least 0, got -1"),
    (("mixed",), dict(num_decode=-1), "num_decode: expected at least 0, got -1"),
    (("mixed",), dict(num_decode=3), "num_prefill_tokens: -1 prefill rows and 3 decode rows do not fit q's 2 tokens"),
    (("mixed",), dict(num_prefill_tokens=2), "num_prefill_tokens: 2 prefill rows and 1 decode rows do not fit q's 2 tokens"),
    (("mixed",), dict(positions=ROWS), "positions: give both batch_indices and positions, or neither"),
    (("mixed",), dict(batch_indices=ROWS), "positions: give both batch_indices and positions, or neither"),
    # merge_states and get_batch_indices_positions
    (("merge",), dict(o_b=Q[:1]), "o_b: expected (2, 8, 64) like o_a, got (1, 8, 64)"),
    (("merge",), dict(lse_a=LSE.T), "lse_a: expected (2, 8), got (8, 2)"),
    (("merge",), dict(lse_b=LSE[:1]), "lse_b: expected (2, 8), got (1, 8)"),
    (("positions",), dict(num_tokens=-1), "num_tokens: expected a host int >= 0, got -1"),
    (("positions",), dict(num_tokens=2.0), "num_tokens: expected a host int >= 0, got 2.0"),
    (("positions",), dict(qo_indptr=i32(0, 1)), "qo_indptr: expected [batch+1] for seq_lens [batch], got (2,) and (2,)"),
    (("positions",), dict(qo_indptr=i32(0, 1, 2)[None]), "qo_indptr: expected [batch+1] for seq_lens [batch], got (1, 3) and (2,)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "changes", "message"), [pytest.param(c, x, m, id=f"{c}-{m[:60]}") for calls, x, m in WRONG for c in calls]
)
def test_a_wrong_argument_is_a_value_error_that_names_it(call, changes, message, nothing_launched):
    """The message begins with the argument, is one line, and comes before any launch."""
    check(call, changes, message)
    assert not nothing_launched


FAR_HEADS = torch.empty(2, 8, 64, dtype=torch.bfloat16, device=META).as_strided((2, 8, 64), (64, 2**29, 1))
UNSUPPORTED = [
    (ATTENTION, dict(q=FAR_HEADS), "q: its heads lie more than 2^31 elements apart; call .contiguous()"),
    (("decode", "prefill"), dict(out=FAR_HEADS), "out: its heads lie more than 2^31 elements apart; call .contiguous()"),
    (("prefill",), dict(causal=False, sliding_window=4), "sliding_window: needs causal=True; a window around non-causal rows"),
    (ATTENTION, dict(q=empty(2, 8, 520), kv_cache=empty(8, 2, 2, 16, 520)), "kv_cache: head_dim 520 is not supported, at most 512"),
    (ATTENTION, dict(q=Q.clone().requires_grad_()), "q: requires grad, but patune has no backward; call under torch.no_grad()"),
    (("append", "mixed"), dict(k=NEW.clone().requires_grad_()), "k: requires grad, but patune has no backward; call under"),
    (("append", "mixed"), dict(v=NEW.clone().requires_grad_()), "v: requires grad, but patune has no backward; call under"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [pytest.param(c, x, m, id=f"{c}-{m[:60]}") for calls, x, m in UNSUPPORTED for c in calls],
)
def test_what_is_not_supported_is_a_not_implemented_error_that_names_it(call, changes, message, nothing_launched):
    """Never a silent approximation."""
    check(call, changes, message, NotImplementedError)
    assert not nothing_launched


def test_requires_grad_is_fine_where_no_gradient_is_recorded(nothing_launched):
    """The way out that the message names works."""
    function, arguments = CALLS["decode"]
    with torch.no_grad():
        function(**(arguments | dict(q=Q.clone().requires_grad_())))
    assert nothing_launched


@pytest.mark.parametrize("call", PAGED)
def test_a_cpu_tensor_needs_the_interpreter(call, monkeypatch):
    """Without TRITON_INTERPRET=1 a tensor on the CPU is an error that says so."""
    monkeypatch.setattr(checks, "INTERPRETED", False)
    name = "k" if call == "append" else "q"
    value = CALLS[call][1][name].cpu()
    check(
        call,
        {name: value},
        f"{name}: expected a CUDA tensor, got one on cpu; move it, or set TRITON_INTERPRET=1 to run on the CPU",
    )


def test_an_unknown_template_names_those_there_are():
    """registry.template says what it knows."""
    with pytest.raises(
        UsageError, match=r"kernel 'encode' is unknown: use one of decode, decode_hopper, prefill, prefill_hopper, append"
    ):
        registry.template("encode")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kernel="encode"), "kernel: 'encode' is unknown, use one of decode, decode_hopper, prefill, prefill_hopper, append"),
        (dict(head_dim=0), "head_dim: expected an int of at least 1, got 0"),
        (dict(page_size=16.0), "page_size: expected an int of at least 1, got 16.0"),
        (dict(batch_size=-1), "batch_size: expected an int of at least 1, got -1"),
        (dict(kv_len=0), "kv_len: expected an int of at least 1, got 0"),
        (dict(sm_count="132"), "sm_count: expected an int of at least 1, got '132'"),
        (dict(q_len=0), "q_len: expected an int of at least 1, got 0"),
    ],
)
def test_get_best_config_names_the_bad_argument(changes, message):
    """Its errors are UsageErrors, which are ValueErrors."""
    with pytest.raises(ValueError, match=r"expected|unknown") as caught:
        patune.get_best_config(**(dict(kernel="decode", head_dim=64, page_size=16) | changes))
    assert str(caught.value) == message


# Values, under PATUNE_CHECK=1

BAD_VALUES = [
    (PAGED, dict(kv_indices=i32(0, 1, 2, -3, 4)), "kv_indices: holds the negative page -3"),
    (PAGED, dict(kv_indices=i32(0, 1, 2, 3, 8)), "kv_indices: holds page 8 but the cache has 8 pages"),
    (PAGED, dict(kv_indptr=i32(-1, 2, 5)), "kv_indptr: starts at -1, expected 0 or more"),
    (PAGED, dict(kv_indptr=i32(0, 5, 2)), "kv_indptr: decreases from 5 to 2 at sequence 1"),
    (PAGED, dict(kv_indptr=i32(0, 2, 6)), "kv_indptr: ends at 6 but kv_indices has 5 pages"),
    (PAGED, dict(kv_last_page_len=i32(0, 1)), "kv_last_page_len: is 0 for sequence 0, expected 1 to page_size 16"),
    (PAGED, dict(kv_last_page_len=i32(4, 17)), "kv_last_page_len: is 17 for sequence 1, expected 1 to page_size 16"),
    (("prefill", "mixed"), dict(qo_indptr=i32(1, 1, 2)), "qo_indptr: starts at 1, expected 0"),
    (("prefill", "mixed"), dict(qo_indptr=i32(0, 2, 1)), "qo_indptr: decreases from 2 to 1 at sequence 1"),
    (("prefill", "mixed"), dict(qo_indptr=i32(0, 1, 3)), "qo_indptr: ends at 3 but q has 2 tokens"),
    (("prefill",), dict(qo_indptr=i32(0, 2, 2)), "max_q_len: is 1 but a sequence has 2 new tokens"),
    (("mixed",), dict(qo_indptr=i32(0, 0, 2)), "qo_indptr: is [0, 0, 2] but 1 prefill sequences have 1 tokens"),
    (("append", "mixed"), dict(batch_indices=i32(0, 2), positions=ROWS), "batch_indices: holds sequence 2 but the batch has 2"),
    (("append", "mixed"), dict(batch_indices=ROWS, positions=i32(0, 32)), "positions: is 32 for token 1 but the pages"),
    (("append", "mixed"), dict(batch_indices=ROWS, positions=i32(-1, 0)), "positions: is -1 for token 0 but the pages"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "changes", "message"), [pytest.param(c, x, m, id=f"{c}-{m[:60]}") for calls, x, m in BAD_VALUES for c in calls]
)
def test_patune_check_finds_wrong_values(call, changes, message, monkeypatch, nothing_launched):
    """A negative or too large index is an error under PATUNE_CHECK=1, before anything reads through it."""
    monkeypatch.setenv("PATUNE_CHECK", "1")
    check(call, changes, message)
    assert not nothing_launched


RIGHT_VALUES = [
    (PAGED, {}),
    (PAGED, dict(kv_indices=i32(0, 1, 2, 3, 4, 99, -1))),  # pages past the last sequence's are nobody's business
    (ATTENTION, dict(kv_indptr=i32(0, 0, 3), kv_last_page_len=i32(0, 1))),  # nor is the last page of an empty sequence
    (("append", "mixed"), dict(batch_indices=i32(0, -1), positions=i32(3, 10**6))),  # padding
    (("append", "mixed"), dict(kv_indptr=i32(0, 3, 3), kv_last_page_len=i32(1, 0), batch_indices=i32(0, 1), positions=i32(32, -1))),
]


@pytest.mark.parametrize(("call", "changes"), [(c, x) for calls, x in RIGHT_VALUES for c in calls])
def test_patune_check_takes_what_is_right(call, changes, monkeypatch, nothing_launched):
    """Also padding, and the position that get_batch_indices_positions gives the row of an unused decode slot."""
    monkeypatch.setenv("PATUNE_CHECK", "1")
    function, arguments = CALLS[call]
    function(**(arguments | changes))
    assert nothing_launched


def test_the_position_of_an_unused_decode_slot():
    """Is -1, which append skips and PATUNE_CHECK=1 takes."""
    indices, positions = patune.get_batch_indices_positions(i32(0, 1, 2), i32(20, 0), 3)
    assert (indices.tolist(), positions.tolist()) == ([0, 1, -1], [19, -1, -1])


def test_without_patune_check_no_value_is_read(monkeypatch, nothing_launched):
    """Off, the checks cost no host sync."""
    monkeypatch.delenv("PATUNE_CHECK", raising=False)
    function, arguments = CALLS["decode"]
    function(**(arguments | dict(kv_indices=i32(0, 1, 2, 3, 99))))
    assert nothing_launched


@pytest.mark.parametrize(("batch", "config"), [(600, dict(num_splits=128)), (70_000, dict(num_splits=1))])
def test_a_decode_that_no_grid_can_hold_names_the_batch(batch, config):
    """CUDA allows 65,535 programs along a grid's second axis; its own error would be 'invalid argument'."""
    meta = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="meta")
    q, kv = meta(batch, 1, 16, dtype=torch.float16), meta(4, 2, 1, 16, 16, dtype=torch.float16)
    launches = partial(
        decode.launches, q, paged_cache(kv, None, "HND"), meta(4), meta(batch + 1), meta(batch), q, None, sm_scale=1.0
    )
    with pytest.raises(ValueError, match=f"^q: {batch} sequences in .* cut the batch$"):
        launches(dict(BLOCK_N=16, num_warps=2, num_stages=2) | config)
