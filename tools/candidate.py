"""patune as a candidate for a referee that races paged attention: its public calls, nothing tuned for the race."""

import patune


def decode(work):
    ragged = min(work.kv_lens) < work.max_kv

    def call(r):
        return patune.paged_decode(
            work.q[r], work.kv, work.kv_indices[r], work.kv_indptr, work.kv_last_page_len, work.scale,
            max_kv_len=work.max_kv, ragged=ragged, out=work.out[r],
        )  # fmt: skip

    return [lambda r=r: call(r) for r in range(work.R)]


def prefill(work):
    def call(r):
        return patune.paged_prefill(
            work.q[r], work.kv, work.qo_indptr, work.kv_indices[r], work.kv_indptr, work.kv_last_page_len, work.scale,
            max_q_len=work.max_q, out=work.out[r],
        )  # fmt: skip

    return [lambda r=r: call(r) for r in range(work.R)]
