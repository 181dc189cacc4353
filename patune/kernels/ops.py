"""The torch.library operators `torch.ops.patune.*`: schemas, fake kernels, and the launch with a looked-up config.

The operators write into tensors that they are given, so torch.compile and CUDA graphs see exactly what is mutated.
Nothing here synchronises with the host: configs follow from shapes, host arguments and the device's own facts.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import append, decode, decode_hopper, prefill, prefill_hopper, streams
from .bound import Call, remember
from .cache import paged_cache
from .config import find, find_either
from .defaults import programs_beside, without_cluster
from .device import device_of
from .template import Launch, Template, Values

_library = torch.library.Library("patune", "DEF")

DETERMINISTIC_KV_LEN = 8192  # whose config a deterministic decode takes, whatever the batch

_PAGES = "Tensor kv_indices, Tensor kv_indptr, Tensor kv_last_page_len"
_OPTIONS = "int? window, float? soft_cap, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, float v_factor"


def run(launches: list[Launch], tensor: torch.Tensor) -> list:
    """Launch on the tensor's own device, on that device's current stream, those aside on its second one. Returns the compiled
    kernels."""
    here = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(tensor.device):
        if not any(launch.aside for launch in launches):
            return [launch.run() for launch in launches]
        kernels, second = [], None
        try:
            for launch in launches:
                if launch.aside and second is None:
                    second = streams.fork()
                with torch.cuda.stream(second) if launch.aside else nullcontext():
                    kernels.append(launch.run())
        finally:
            if second is not None:
                streams.join(second)
        return kernels


def _config(template, values: list[int] | None, q, cache, **workload) -> Values:
    """The caller's values in the order of the template's tunables, else the table's answer for these shapes."""
    return _given(template, values) if values is not None else find(_query(template, q, cache, **workload))


def _given(template, values: list[int]) -> Values:
    return dict(zip(template.tunables, values, strict=True))


def _either(
    hopper: Template, plain: Template, served: bool, config: list[int] | None, given: str, q, cache, **workload
) -> tuple[str, Values]:
    """The name of the template to take of two, and the config: the caller's for the one given, else the table's answer.

    served: whether the one for Hopper serves the call. It is taken where the table cannot tell which one is faster.
    """
    if config is not None:
        if given == hopper.name and not served:
            raise ValueError("config: is of the kernel for Hopper, which does not serve this call; leave it out")
        return given, _given(hopper if given == hopper.name else plain, config)
    if not served:
        return plain.name, find(_query(plain, q, cache, **workload))
    return find_either(_query(hopper, q, cache, **workload), _query(plain, q, cache, **workload))


def _query(template, q, cache, *, batch_size, kv_len, q_len, ragged=False, features="") -> dict:
    """What the table is asked about a call."""
    device = device_of(q)
    return {
        "kernel": template.name, "head_dim": cache.head_dim, "page_size": cache.page_size,
        "q_heads_per_kv": 1 if template.name == "append" else q.shape[1] // cache.kv_heads,
        "q_dtype": str(q.dtype)[6:], "kv_dtype": str(cache.k.dtype)[6:], "features": features,
        "sm_count": device.sm_count, "device_name": device.name, "capability": device.capability,
        "batch_size": batch_size, "kv_len": max(1, kv_len), "q_len": max(1, q_len),
        "kv_heads": cache.kv_heads, "ragged": ragged,
    }  # fmt: skip


def _mean_kv_len(kv_indices, kv_indptr, page_size) -> int:
    """Mean KV tokens a sequence as far as the host knows: from the pages in use, which are the length of kv_indices."""
    return kv_indices.shape[0] * page_size // max(1, kv_indptr.shape[0] - 1)


def _parts_kv_len(tokens: int, new_tokens: int, num_prefill: int, num_decode: int, max_kv_len: int | None) -> tuple[int, int]:
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


def _features(window: int | None, soft_cap: float | None, sinks: torch.Tensor | None) -> str:
    named = (("sinks", sinks), ("sliding_window", window), ("soft_cap", soft_cap))
    return ",".join(name for name, value in named if value is not None)


def decode_call(
    q, kv_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, sm_scale, kv_layout, q_len, max_kv_len,
    ragged, window, soft_cap, sinks, k_scale, v_scale, v_factor, deterministic, config, template="decode", kv_len=None,
) -> Call | None:  # fmt: skip
    """The call that operator paged_decode makes of its arguments; None if there is nothing to do."""
    batch_size = kv_indptr.shape[0] - 1
    if batch_size == 0:
        return None
    cache = paged_cache(kv_cache, v_cache, kv_layout)
    kv_len = kv_len or _mean_kv_len(kv_indices, kv_indptr, cache.page_size)
    if max_kv_len is not None:  # a captured graph's kv_indices may be longer than what is in use
        kv_len = min(kv_len, max_kv_len)
    even = batch_size == 1 or ragged is False
    ragged = (max_kv_len or 0) >= 2 * kv_len if ragged is None else ragged
    workload = dict(batch_size=batch_size, kv_len=kv_len, ragged=ragged)
    if deterministic:
        workload = dict(batch_size=1, kv_len=DETERMINISTIC_KV_LEN)
    extras: dict[str, Any] = dict(window=window, soft_cap=soft_cap, sinks=sinks)
    hopper = not deterministic and decode_hopper.serves(device_of(q).capability, q, cache, out, q_len=q_len, **extras)
    template, values = _either(
        decode_hopper.TEMPLATE, decode.TEMPLATE, hopper, config, template, q, cache,
        q_len=q_len, features=_features(window, soft_cap, sinks), **workload,
    )  # fmt: skip
    if config is None and not even and values.get("cluster", 1) > 1:
        # Of a cluster a sequence, the longest one of an uneven batch would hold up all.
        values = without_cluster(dict(values), device_of(q).sm_count, workload | {"kernel": template, "kv_heads": cache.kv_heads})
    if deterministic and config is None:
        values = {**values, "num_splits": decode.own_splits(cache.kv_heads)}

    def build(q, kv_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, sinks, k_scale, v_scale, out, lse):
        cache = paged_cache(kv_cache, v_cache, kv_layout)
        arguments = q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, values
        scales = dict(sm_scale=sm_scale, k_scale=k_scale, v_scale=v_scale, v_factor=v_factor)
        if template == "decode_hopper":
            return decode_hopper.launches(*arguments, q_len=q_len, **scales)
        return decode.launches(
            *arguments, q_len=q_len, window=window, soft_cap=soft_cap, sinks=sinks, own_shares=deterministic, **scales
        )

    tensors = (q, kv_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, sinks, k_scale, v_scale, out, lse)
    return Call(build, tensors, advice=3, config=(template, *values.items()))


def _make(call: Call | None, tensor: torch.Tensor) -> None:
    if call is not None:
        launches = call.build(*call.tensors)
        remember(call, launches, run(launches, tensor))


def _paged_decode(q, *arguments, **options):
    _make(decode_call(q, *arguments, **options), q)


def prefill_call(
    q, kv_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, out, lse, sm_scale, kv_layout, max_q_len,
    causal, window, soft_cap, sinks, k_scale, v_scale, v_factor, config, template="prefill", kv_len=None, decode_tokens=0,
) -> Call | None:  # fmt: skip
    """The call that operator paged_prefill makes of its arguments; None if there is nothing to do.

    decode_tokens: KV tokens of a decode that runs beside it.
    """
    batch_size = kv_indptr.shape[0] - 1
    if batch_size == 0 or q.shape[0] == 0:
        return None
    cache = paged_cache(kv_cache, v_cache, kv_layout)
    kv_len = kv_len or _mean_kv_len(kv_indices, kv_indptr, cache.page_size)
    ragged = (max_q_len or 0) * batch_size >= 2 * q.shape[0]
    extras: dict[str, Any] = dict(window=window, soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    workload = dict(batch_size=batch_size, kv_len=kv_len, q_len=q.shape[0] // batch_size, ragged=ragged,
                    features=_features(window, soft_cap, sinks))  # fmt: skip
    hopper = prefill_hopper.serves(device_of(q).capability, q, cache, out, **extras)
    template, values = _either(prefill_hopper.TEMPLATE, prefill.TEMPLATE, hopper, config, template, q, cache, **workload)
    max_q_len = q.shape[0] if max_q_len is None else max_q_len
    programs = None
    if decode_tokens and template == "prefill_hopper":
        programs = programs_beside(_query(prefill_hopper.TEMPLATE, q, cache, **workload), values["num_splits"], decode_tokens)

    def build(q, kv_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, sinks, k_scale, v_scale, out, lse):
        cache = paged_cache(kv_cache, v_cache, kv_layout)
        arguments = q, cache, kv_indices, kv_indptr, kv_last_page_len, out, lse, values
        options = dict(qo_indptr=qo_indptr, max_q_len=max_q_len, sm_scale=sm_scale, causal=causal, v_factor=v_factor)
        if template == "prefill_hopper":
            return prefill_hopper.launches(*arguments, **options, programs=programs)
        return prefill.launches(
            *arguments, window=window, soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, **options
        )

    tensors = (q, kv_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, sinks, k_scale, v_scale, out, lse)
    return Call(build, tensors, advice=4, config=(template, *values.items(), ("programs", programs)))


def _paged_prefill(q, *arguments, **options):
    _make(prefill_call(q, *arguments, **options), q)


def append_call(
    k, v, batch_indices, positions, kv_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, kv_layout, k_scale, v_scale,
    k_factor, v_factor, config, qo_indptr=None,
) -> Call | None:  # fmt: skip
    """The call that operator append_paged_kv_cache makes of its arguments; None if there is nothing to do.

    Where batch_indices and positions are None, the tokens are the last ones of their sequences, as qo_indptr says.
    """
    batch_size = kv_indptr.shape[0] - 1
    if k.shape[0] == 0 or batch_size == 0:
        return None
    cache = paged_cache(kv_cache, v_cache, kv_layout)
    kv_len = _mean_kv_len(kv_indices, kv_indptr, cache.page_size)
    values = _config(append.TEMPLATE, config, k, cache, batch_size=batch_size, kv_len=kv_len, q_len=k.shape[0] // batch_size)

    def build(
        k, v, batch_indices, positions, kv_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, k_scale, v_scale, qo_indptr
    ):
        cache = paged_cache(kv_cache, v_cache, kv_layout)
        last_tokens = dict(qo_indptr=qo_indptr, kv_last_page_len=kv_last_page_len) if positions is None else {}
        return append.launches(
            k, v, batch_indices, positions, cache, kv_indices, kv_indptr, values,
            k_scale=k_scale, v_scale=v_scale, k_factor=k_factor, v_factor=v_factor, **last_tokens,
        )  # fmt: skip

    pages = kv_indices, kv_indptr, kv_last_page_len
    tensors = (k, v, batch_indices, positions, kv_cache, v_cache, *pages, k_scale, v_scale, qo_indptr)
    return Call(build, tensors, advice=6, config=tuple(values.items()))


def _append(k, *arguments):
    _make(append_call(k, *arguments), k)


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
    of_prefill, of_decode = _parts_kv_len(kv_indices.shape[0] * page_size, n, num_prefill, num_decode, max_kv_len)

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
    # A prefill's programs end far apart. Those of decode_hopper, of which one or two fill an SM, begin wherever one has ended.
    # Several an SM, of the template "decode", would pile up on the SMs that are free first, which cost 28 of 383 us behind a
    # prompt of 512 on an H100: so it goes before the prefill, whose programs fill an SM, too.
    of_decoded = () if decoded is None else decoded.config
    beside = "decode_hopper" in of_decoded
    alone = ("cluster", 1) in of_decoded  # clusters need SMs that are neighbours, and none of them taken
    prefilled = prefill_call(
        q[:n], kv_cache, v_cache, *prompts(qo_indptr, *pages), out[:n], None, scale, kv_layout, max_q_len, True, *options, None,
        kv_len=of_prefill, decode_tokens=num_decode * of_decode if beside and alone else 0,
    )  # fmt: skip
    calls = appended, prefilled, decoded
    # Whoever goes first takes what SMs it can, so that is the prefill where it leaves the decode some.
    yields = prefilled is not None and ("programs", None) not in prefilled.config

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
        append, prefill, decode = ([] if call is None else call.build(*its) for call, its in zip(calls, theirs))
        if not (beside and prefill):
            return [*append, *decode, *prefill]
        first, second = (prefill, decode) if yields else (decode, prefill)
        return [*append, *(replace(launch, aside=True) for launch in first), *second]

    tensors = (q, k, v, kv_cache, v_cache, qo_indptr, *pages, batch_indices, positions, sinks, k_scale, v_scale, out)
    config = tuple(value for call in calls if call for value in call.config)
    return Call(build, tensors, advice=6, config=config, bindable=not padding)


def _paged_attention_with_cache(q, *arguments):
    call = mixed_call(q, *arguments)
    _make(call, q)
    return call.tensors[-1]


def _define(name: str, schema: str, implementation, returns: str = "()", fake=lambda *args: None) -> None:
    _library.define(f"{name}({schema}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):  # CPU: Triton's interpreter, in tests
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"patune::{name}", fake, lib=_library)


_define(
    "paged_decode",
    f"Tensor q, Tensor kv_cache, Tensor? v_cache, {_PAGES}, Tensor(a!) out, Tensor(b!)? lse, float sm_scale, str kv_layout, "
    f'SymInt q_len, SymInt? max_kv_len, bool? ragged, {_OPTIONS}, bool deterministic, int[]? config, str template="decode"',
    _paged_decode,
)
_define(
    "paged_prefill",
    f"Tensor q, Tensor kv_cache, Tensor? v_cache, Tensor qo_indptr, {_PAGES}, Tensor(a!) out, Tensor(b!)? lse, float sm_scale, "
    f'str kv_layout, SymInt max_q_len, bool causal, {_OPTIONS}, int[]? config, str template="prefill"',
    _paged_prefill,
)
_define(
    "append_paged_kv_cache",
    f"Tensor k, Tensor v, Tensor batch_indices, Tensor positions, Tensor(a!) kv_cache, Tensor(b!)? v_cache, {_PAGES}, "
    "str kv_layout, Tensor? k_scale, Tensor? v_scale, float k_factor, float v_factor, int[]? config",
    _append,
)
_define(
    "paged_attention_with_cache",
    f"Tensor q, Tensor k, Tensor v, Tensor(a!) kv_cache, Tensor(b!)? v_cache, Tensor qo_indptr, {_PAGES}, Tensor? batch_indices, "
    "Tensor? positions, float sm_scale, str kv_layout, SymInt num_prefill, SymInt num_decode, "
    "SymInt num_prefill_tokens, SymInt? max_q_len, SymInt? max_kv_len, int? window, float? soft_cap, Tensor? sinks, "
    "Tensor? k_scale, Tensor? v_scale, float k_factor, float v_factor",
    _paged_attention_with_cache,
    returns="Tensor",
    fake=lambda q, *args: q.new_empty(q.shape),
)
