"""Quantization of Q, K and V: the one definition that the portable path and the kernels share.

Every rounding here is specified to the bit, and the CUDA kernels repeat it: given the same channel
means, codes and scales of both are identical.

Granularity. Q: one scale per token. K: in each block of 64 keys, one scale for the keys congruent
to {2j, 2j+1} modulo 8, j = 0..3. Those are the columns that one thread holds of a C fragment of
``mma.m16n8`` as well as of ``wgmma.m64nN``, so a thread multiplies its scores by one number per
row. V: one scale per channel over the sequence.

Inputs that are not finite cannot be quantized. In Q they make the scale of their token NaN; in K
and V they are replaced by zero and the first position where one occurred is kept per channel
(``first_bad``), so that the outputs that attend to it, and no others, are set to NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_sage.recipe import BLOCK_KV, V_MAX, Recipe

INT8_MAX = 127.0
# Divisions by an absolute maximum are guarded by this floor: all-zero and constant channels get
# codes 0 and a scale that is not 0. Its reciprocal times 127 is still finite in float32.
ABSMAX_FLOOR = 2.0**-100
# A channel mean beyond this is not subtracted: x - mean could overflow.
MEAN_MAX = 2.0**100
DOWNSCALE = 2.0**-16  # of V in channels beyond 1
NEVER = np.iinfo(np.int32).max  # first_bad of a channel that is finite everywhere

_f32 = np.float32


class Quantized(NamedTuple):
    """Q, K and V as the attention reads them. S is padded to Sp, a multiple of 64, by zeros."""

    q: jax.Array  # int8 [*B, N, T, H]
    q_scale: jax.Array  # float32 [*B, N, T], times |softmax scale| * log2(e)
    q_dot_mean: jax.Array  # float32 [*B, N, T], q·k̄ * softmax scale * log2(e)
    k: jax.Array  # int8 [*B, K, Sp, H]
    k_scale: jax.Array  # float32 [*B, K, Sp/64, 4]
    v: jax.Array  # float8_e4m3fn or float16 [*B, K, Sp, H]
    v_scale: jax.Array  # float32 [*B, K, H]
    v_offset: jax.Array  # float32 [*B, K, H], added to the output
    first_bad: jax.Array  # int32 [*B, K, H], first key whose K, or V in this channel, is not finite
    first_bad_k: jax.Array  # int32 [*B, K], the same of K alone


def round_to(x: jax.Array, mantissa_bits: int, min_exponent: int) -> jax.Array:
    """Rounds float32 to nearest, ties to even, on the grid of a narrower type, subnormals included.

    Spelt as arithmetic because a pair of converts may be dropped by XLA
    (``xla_allow_excess_precision``). Adding and subtracting 1.5 * 2^(e + 23 - mantissa_bits) leaves
    x on a grid of 2^(e - mantissa_bits). The caller keeps x below the type's maximum.
    """
    exponent = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7F800000)
    exponent = jnp.maximum(exponent, np.int32((127 + min_exponent) << 23))
    magic_bits = (exponent + np.int32((23 - mantissa_bits) << 23)) | np.int32(0x00400000)
    magic = lax.bitcast_convert_type(magic_bits, jnp.float32)
    return (x + magic) - magic


def round_e4m3(x: jax.Array) -> jax.Array:
    return round_to(x, mantissa_bits=3, min_exponent=-6)


def round_fp16(x: jax.Array) -> jax.Array:
    return round_to(x, mantissa_bits=10, min_exponent=-14)


def _round_bf16(x: jax.Array) -> jax.Array:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _finite_or_zero(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, _f32(0))


def _mean(x: jax.Array, length: int) -> jax.Array:
    """Mean over tokens of [*B, K, S, H] in float32; 0 where it is too large to be subtracted."""
    mean = jnp.sum(x, axis=-2) * _f32(1 / length)
    return jnp.where(jnp.abs(mean) <= _f32(MEAN_MAX), mean, _f32(0))


def _first_bad(x: jax.Array) -> jax.Array:
    """First token of [..., S, C] where a channel is not finite: int32 [..., C]."""
    position = jnp.arange(x.shape[-2], dtype=jnp.int32)[:, None]
    return jnp.min(jnp.where(jnp.isfinite(x), np.int32(NEVER), position), axis=-2)


def quantize_query(
    q: jax.Array,  # float32 [*B, N, T, H]
    scale_log2: float,  # softmax scale * log2(e)
) -> tuple[jax.Array, jax.Array]:
    """INT8 codes of sign(scale) * q, and scales [*B, N, T]; NaN for a token that is not finite."""
    finite = _finite_or_zero(q)
    absmax = jnp.maximum(jnp.max(jnp.abs(finite), axis=-1), _f32(ABSMAX_FLOOR))
    inverse = _f32(np.copysign(INT8_MAX, scale_log2)) / absmax
    codes = jnp.round(finite * inverse[..., None]).astype(jnp.int8)
    # One constant: XLA may put two together, which rounds differently.
    scale = absmax * _f32(abs(float(_f32(scale_log2))) / INT8_MAX)
    bad = jnp.any(~jnp.isfinite(q), axis=-1)
    return codes, jnp.where(bad, _f32(np.nan), scale)


def quantize_key(
    k: jax.Array,  # float32 [*B, K, S, H], finite
    k_mean: jax.Array,  # float32 [*B, K, H]
) -> tuple[jax.Array, jax.Array]:
    """INT8 codes [*B, K, Sp, H] of k - k̄, and scales [*B, K, Sp/64, 4]."""
    *lead, length, head_dim = k.shape
    centered = _pad_tokens(k - k_mean[..., None, :])
    blocks = centered.shape[-2] // BLOCK_KV
    grouped = centered.reshape(*lead, blocks, BLOCK_KV // 8, 4, 2, head_dim)
    absmax = jnp.max(jnp.abs(grouped), axis=(-4, -2, -1))
    absmax = jnp.maximum(absmax, _f32(ABSMAX_FLOOR))
    inverse = (_f32(INT8_MAX) / absmax)[..., None, :, None, None]
    codes = jnp.round(grouped * inverse).astype(jnp.int8).reshape(centered.shape)
    return codes, absmax * _f32(1 / INT8_MAX)


def quantize_value(
    v: jax.Array,  # float32 [*B, K, S, H], finite
    v_mean: jax.Array,  # float32 [*B, K, H]
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
    """Codes [*B, K, Sp, H] of v - v̄ with absolute maximum V_MAX, and scales [*B, K, H]."""
    centered = v - v_mean[..., None, :]
    absmax = jnp.maximum(jnp.max(jnp.abs(centered), axis=-2), _f32(ABSMAX_FLOOR))
    # V_MAX / absmax may be below the smallest normal number, which XLA flushes to 0: large channels
    # are first scaled down by a power of two.
    down = jnp.where(absmax > 1, _f32(DOWNSCALE), _f32(1))
    inverse = _f32(V_MAX) / (absmax * down)
    scaled = _pad_tokens(centered * down[..., None, :] * inverse[..., None, :])
    if recipe.pv == "fp8":
        codes = round_e4m3(scaled).astype(jnp.float8_e4m3fn)
    else:
        codes = round_fp16(scaled).astype(jnp.float16)
    return codes, absmax * _f32(1 / V_MAX)


def quantize(
    query: jax.Array,  # [*B, T, N, H]
    key: jax.Array,  # [*B, S, K, H]
    value: jax.Array,  # [*B, S, K, H]
    *,
    scale_log2: float,  # softmax scale * log2(e)
    recipe: Recipe,
) -> Quantized:
    q, k, v = (jnp.swapaxes(x, -2, -3).astype(jnp.float32) for x in (query, key, value))
    length = k.shape[-2]
    bad_k = jnp.min(_first_bad(k), axis=-1)
    first_bad = jnp.minimum(_first_bad(v), bad_k[..., None])
    k, v = _finite_or_zero(k), _finite_or_zero(v)

    # The means are rounded to bfloat16: any constant is exact, and rounding hides the order of the
    # sum, on which a kernel and this code differ.
    k_mean = _round_bf16(_mean(k, length)) if recipe.smooth_k else jnp.zeros_like(k[..., 0, :])
    v_average = _mean(v, length)
    v_mean = _round_bf16(v_average) if recipe.smooth_v else jnp.zeros_like(v_average)

    q_codes, q_scale = quantize_query(q, scale_log2)
    k_codes, k_scale = quantize_key(k, k_mean)
    v_codes, v_scale = quantize_value(v, v_mean, recipe)

    *batch, kv_heads, _, head_dim = k.shape
    grouped_q = q.reshape(*batch, kv_heads, -1, q.shape[-2], head_dim)
    q_dot_mean = jnp.einsum(
        "...kgth,...kh->...kgt", grouped_q, k_mean, precision=lax.Precision.HIGHEST
    ).reshape(q_scale.shape)

    # Restoring mean(V) - mean(dequantized V), not v̄, cancels the rounding errors of V as far as
    # the attention is uniform: -12 % error on normal inputs, for one integer sum per channel.
    # Where the average is 0 (or was too large to subtract), nothing was taken from V.
    v_offset = v_mean
    if recipe.smooth_v:
        code_mean = jnp.sum(v_codes.astype(jnp.float32), axis=-2) * _f32(1 / length)
        v_offset = jnp.where(v_average == 0, _f32(0), v_average - v_scale * code_mean)

    return Quantized(
        q_codes,
        q_scale,
        q_dot_mean * _f32(scale_log2),
        k_codes,
        k_scale,
        v_codes,
        v_scale,
        v_offset,
        first_bad,
        bad_k,
    )


def _pad_tokens(x: jax.Array) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[-2] = (0, -x.shape[-2] % BLOCK_KV)
    return jnp.pad(x, padding)
