"""The torch.library operators `torch.ops.patune.*`: schemas, fake kernels, and the launch with a looked-up config.

The operators write into tensors that they are given, so torch.compile and CUDA graphs see exactly what is mutated.
Nothing here synchronises with the host: configs follow from shapes, host arguments and the device's own facts.
"""

from contextlib import nullcontext

import torch

from .bound import Call, remember
from .calls import append_call, decode_call, prefill_call
from .mixed import mixed_call
from .template import Launch

_library = torch.library.Library("patune", "DEF")

_PAGES = "Tensor kv_indices, Tensor kv_indptr, Tensor kv_last_page_len"
_OPTIONS = "int? window, float? soft_cap, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, float v_factor"


def run(launches: list[Launch], tensor: torch.Tensor) -> list:
    """Launch on the tensor's own device, on that device's current stream. Returns the compiled kernels."""
    here = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(tensor.device):
        return [launch.run() for launch in launches]


def _make(call: Call | None, tensor: torch.Tensor) -> None:
    if call is not None:
        launches = call.build(*call.tensors)
        remember(call, launches, run(launches, tensor))


def _paged_decode(q, *arguments, **options):
    _make(decode_call(q, *arguments, **options), q)


def _paged_prefill(q, *arguments, **options):
    _make(prefill_call(q, *arguments, **options), q)


def _append(k, *arguments):
    _make(append_call(k, *arguments), k)


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
