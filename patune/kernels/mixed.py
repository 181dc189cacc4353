"""The call of a mixed step: append, then prefill and decode, beside each other where that is faster."""

from dataclasses import replace

from torch import Tensor

from .bound import Call
from .calls import append_call, decode_call, prefill_call
from .decode_hopper_jit import decode_split_hopper
from .prefill_hopper_jit import prefill_attention_hopper
from .template import Launch


def parts_kv_len(tokens: int, new_tokens: int, num_prefill: int, num_decode: int, max_kv_len: int | None) -> tuple[int, int]:
    """Mean KV tokens of a mixed batch's prompts and of its decodes as far as the host knows: of the tokens in use, their sum.

    A prompt has at least its new tokens, and a decode at most max_kv_len: they are taken to have that much, or as much as is left.
    Without a bound, a decode is taken to have as many as a prompt, where that leaves a prompt its new tokens.
    """
    prompt = new_tokens // max(1, num_prefill)
    if num_decode == 0:
        return max(prompt, tokens // max(1, num_prefill)), 1
    bound = max_kv_len if max_kv_len is not None else tokens // (num_prefill + num_decode)
    decode = max(1, min(bound, (tokens - num_prefill * prompt) // num_decode))
    return max(prompt, (tokens - num_decode * decode) // max(1, num_prefill)), decode


def in_order(append: list[Launch], prefill: list[Launch], decode: list[Launch]) -> list[Launch]:
    """The launches of a step's parts. All are programmatic: a kernel's programs take places as those of the one before leave them.

    Where both have a kernel for Hopper, the decode is launched when every program of the prefill has seen the append end, and runs
    beside it: on the SMs that the prefill does not take, and that its programs, which end far apart, leave. It waits for the
    prefill before it ends, so that who waits for the decode waits for both.

    Several programs of the plain decode would pile up on the SMs that are free first, which cost 28 of 383 us behind a prompt of
    512 on an H100: it goes before the prefill, whose programs fill an SM.
    """
    if any(launch.fn is prefill_attention_hopper for launch in prefill) and decode and decode[0].fn is decode_split_hopper:
        return [*append, *prefill, replace(decode[0], args=decode[0].args | {"beside": 1}), *decode[1:]]
    return [*append, *decode, *prefill]


def mixed_call(
    q, k, v, kv_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, batch_indices, positions, sm_scale,
    kv_layout, num_prefill, num_decode, num_prefill_tokens, max_q_len, max_kv_len, window, soft_cap, sinks, k_scale, v_scale,
    k_factor, v_factor,
) -> Call:  # fmt: skip
    """The call that operator paged_attention_with_cache makes of its arguments: an append, then a decode and a prefill, beside each
    other where the decode's kernel allows it. Its last tensor is the output, new, whose rows of padding are zeros already."""
    n, end = num_prefill_tokens, num_prefill_tokens + num_decode
    out, padding = q.new_empty(q.shape), end < q.shape[0]
    if padding:
        out[end:].zero_()
    scale, options = sm_scale * k_factor, (window, soft_cap, sinks, k_scale, v_scale, v_factor)
    page_size = kv_cache.shape[-2 if kv_layout == "HND" else -3]
    of_prefill, of_decode = parts_kv_len(kv_indices.shape[0] * page_size, n, num_prefill, num_decode, max_kv_len)

    def prompts(qo_indptr, kv_indices, kv_indptr, kv_last_page_len) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return qo_indptr[: num_prefill + 1], kv_indices, kv_indptr[: num_prefill + 1], kv_last_page_len[:num_prefill]

    def decodes(kv_indices, kv_indptr, kv_last_page_len) -> tuple[Tensor, Tensor, Tensor]:
        return kv_indices, kv_indptr[num_prefill:], kv_last_page_len[num_prefill:]

    pages = kv_indices, kv_indptr, kv_last_page_len
    appended = append_call(
        k, v, batch_indices, positions, kv_cache, v_cache, *pages, kv_layout, k_scale, v_scale, k_factor, v_factor, None, qo_indptr
    )
    decoded = decode_call(
        q[n:end], kv_cache, v_cache, *decodes(*pages), out[n:end], None, scale, kv_layout, 1, max_kv_len, None, *options, False,
        None, kv_len=of_decode,
    )  # fmt: skip
    anywhere = decoded is not None and dict(decoded.config).get("cluster") == 1  # a cluster needs free SMs that are neighbours
    prefilled = prefill_call(
        q[:n], kv_cache, v_cache, *prompts(qo_indptr, *pages), out[:n], None, scale, kv_layout, max_q_len, True, *options, None,
        kv_len=of_prefill, decode_tokens=num_decode * of_decode if anywhere else 0,
    )  # fmt: skip
    calls = appended, prefilled, decoded

    def build(
        q, k, v, kv_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, batch_indices, positions, sinks, k_scale,
        v_scale, out,
    ) -> list[Launch]:  # fmt: skip
        kv, pages, extras = (kv_cache, v_cache), (kv_indices, kv_indptr, kv_last_page_len), (sinks, k_scale, v_scale)
        theirs = (
            (k, v, batch_indices, positions, *kv, *pages, k_scale, v_scale, qo_indptr),
            (q[:n], *kv, *prompts(qo_indptr, *pages), *extras, out[:n], None),
            (q[n:end], *kv, *decodes(*pages), *extras, out[n:end], None),
        )
        return in_order(*([] if call is None else call.build(*its) for call, its in zip(calls, theirs)))

    tensors = (q, k, v, kv_cache, v_cache, qo_indptr, *pages, batch_indices, positions, sinks, k_scale, v_scale, out)
    config = tuple(value for call in calls if call for value in call.config)
    return Call(build, tensors, advice=6, config=config, bindable=not padding)
