"""Calls of every operator's implementation, for tests that look at launches instead of making them."""

import torch
from paged import Batch

import patune
from patune.kernels import ops


def call_all(batch: Batch) -> None:
    """Every operator with every optional tensor, as the operators' implementations are called on a GPU."""
    k = batch.q[:, :2]
    out, lse = torch.empty_like(batch.q), batch.q.new_empty(batch.q.shape[:2], dtype=torch.float32)
    one = batch.q.new_empty(1, dtype=torch.float32)
    sinks = batch.q.new_empty(batch.q.shape[1], dtype=torch.float32)
    options = (7, 5.0, sinks, one, one, 1.0)
    kv, qo = batch.kv_cache, batch.qo_indptr
    ops._paged_decode(batch.q, kv, None, *batch.pages, out, lse, 0.1, "HND", 1, 30, None, *options, False, None)
    ops._paged_decode(batch.q, kv, None, *batch.pages, out, lse, 0.1, "HND", 1, None, None, *options, False, [16, 4, 2, 3])
    ops._paged_prefill(batch.q, kv, None, qo, *batch.pages, out, lse, 0.1, "HND", 1, True, *options, None)
    indices = patune.get_batch_indices_positions(qo, batch.seq_lens, 2)
    ops._append(k, k, *indices, kv, None, *batch.pages, "HND", one, one, 1.0, 1.0, None)
    ops._paged_attention_with_cache(
        batch.q, k, k, kv, None, qo, *batch.pages, None, None, 0.1, "HND", 1, 1, 1, 1, None, *options[:5], 1.0, 1.0
    )


def to_meta(batch: Batch) -> Batch:
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, value.to("meta"))
    batch.pages = (batch.kv_indices, batch.kv_indptr, batch.kv_last_page_len)
    return batch
