"""Device functions that several templates share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # the kernels work in base 2: exp2 is one instruction, exp is two

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with fp32 accumulation. The interpreter multiplies bf16 as if it were integers, so there it is widened."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def kv_length(kv_indptr_ptr, kv_last_page_len_ptr, b, mask, PAGE_SIZE: tl.constexpr):
    """KV tokens of sequence(s) b; 0 for a sequence without pages."""
    first = tl.load(kv_indptr_ptr + b, mask=mask, other=0)
    last = tl.load(kv_indptr_ptr + b + 1, mask=mask, other=0)
    last_page_len = tl.load(kv_last_page_len_ptr + b, mask=mask, other=0)
    return tl.where(last > first, (last - first - 1) * PAGE_SIZE + last_page_len, 0)


@triton.jit
def cap_logits(s, soft_cap):
    """soft_cap * tanh(s / soft_cap), through exp2, which cannot overflow into NaN here."""
    return soft_cap * (1 - 2 / (tl.exp2(s * (2 * LOG2E / soft_cap)) + 1))


@triton.jit
def softmax_step(s, scale, m, l, acc):
    """One step of the online softmax in base 2 over the logits s * scale, scale > 0. Returns p, m, l and the rescaled acc.

    The scale is applied inside the exponent, where it is one fused multiply-add instead of a pass of its own. A row that
    has seen no key yet has m = -inf; it must neither produce -inf - -inf nor weigh anything.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    return p, m_new, l * alpha + tl.sum(p, 1), acc * alpha[:, None]


@triton.jit
def add_sink(sink, m, l):
    """Let a sink logit take its part of the softmax's denominator. Returns m, l and the factor for acc."""
    sink *= LOG2E
    m_new = tl.maximum(m, sink)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - shift)
    return m_new, l * alpha + tl.exp2(sink - shift), alpha
