"""The calls of decode, prefill and append: which kernel, which config, and the launches, from shapes and the host's arguments."""

from typing import Any

from . import append, decode, decode_hopper, prefill, prefill_hopper
from .bound import Call
from .cache import paged_cache
from .config import find, find_either
from .defaults import without_cluster
from .device import device_of
from .template import Template, Values

DETERMINISTIC_KV_LEN = 8192  # whose config a deterministic decode takes, whatever the batch


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


def _features(window: int | None, soft_cap: float | None, sinks: Any | None) -> str:
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
    return Call(build, tensors, advice=3, config=(("template", template), *values.items()))


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
        programs = prefill_hopper.programs_beside(
            _query(prefill_hopper.TEMPLATE, q, cache, **workload), values["num_splits"], decode_tokens
        )

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
    return Call(build, tensors, advice=4, config=(("template", template), *values.items(), ("programs", programs)))


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
