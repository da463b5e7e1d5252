"""Quantization of Q, K and V: the one definition that the portable path and the kernels share.

Every rounding here is specified to the bit, and the CUDA kernels repeat it: given the same channel
means, codes and scales of both are identical.

Granularity. Q: one scale per token. K: in each block of 64 keys, one scale for the keys congruent
to {2j, 2j+1} modulo 8, j = 0..3. Those are the columns that one thread holds of a C fragment of
``mma.m16n8`` as well as of ``wgmma.m64nN``, so a thread multiplies its scores by one number per
row. V: one scale per channel over the sequence.

K's mean is that of half the keys (:func:`is_sample`): to read the others takes time, and any vector
may be subtracted.

Keys that no query sees (``seen``) do not count: their codes are zero, and nothing depends on what
they hold. Segments that do not see each other have statistics of their own: means, V's scales, and
for K a power of two that brings every segment to the same size and goes into the scales of the
segment's queries; so keys of two segments may share an INT8 scale.

Inputs that are not finite cannot be quantized. In Q they make the scale of their token NaN; in K
and V they are replaced by zero here, and the attention finds out who sees them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_sage.masking import Segments
from jax_sage.recipe import BLOCK_KV, V_MAX, Recipe

INT8_MAX = 127.0
# Divisions by an absolute maximum are guarded by this floor: all-zero and constant channels get
# codes 0 and a scale that is not 0. Its reciprocal times 127 is still finite in float32.
ABSMAX_FLOOR = 2.0**-100
# A channel mean beyond this is not subtracted: x - mean could overflow.
MEAN_MAX = 2.0**100
DOWNSCALE = 2.0**-16  # of V in channels beyond 1

_f32 = np.float32


class Quantized(NamedTuple):
    """Q, K and V as the attention reads them. S is padded to Sp, a multiple of 64, by zeros.

    U is 1, or S if there are segments: a table of theirs, see :class:`jax_sage.masking.Segments`.
    """

    q: jax.Array  # int8 [*B, N, T, H]
    q_scale: jax.Array  # float32 [*B, N, T], times |softmax scale| * log2(e)
    q_dot_mean: jax.Array  # float32 [*B, N, T], q·k̄ * softmax scale * log2(e)
    k: jax.Array  # int8 [*B, K, Sp, H]
    k_scale: jax.Array  # float32 [*B, K, Sp/64, 4]
    v: jax.Array  # float8_e4m3fn or float16 [*B, K, Sp, Hv]
    v_scale: jax.Array  # float32 [*B, K, U, Hv]
    v_offset: jax.Array  # float32 [*B, K, U, Hv], added to the output


class Switches(NamedTuple):
    """What is left out, to see what it costs. Traced bools are compiled once for all."""

    exact_qk: bool | jax.Array = False  # Q and K in FP32
    exact_p: bool | jax.Array = False  # P in FP32
    exact_v: bool | jax.Array = False  # V in FP32
    exact_sums: bool | jax.Array = False  # FP32 in place of FP16 partial sums
    rough_k: bool | jax.Array = False  # K not smoothed
    rough_v: bool | jax.Array = False  # V not smoothed


def choose(switch: bool | jax.Array, on: jax.Array, off: jax.Array) -> jax.Array:
    if isinstance(switch, bool):
        return on if switch else off
    return jnp.where(switch, on, off.astype(on.dtype))


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


def _total(x: jax.Array, segments: Segments | None) -> jax.Array:
    """Sum over the tokens of [*B, K, S, C], or over those of each segment: [*B, K, U, C]."""
    if segments is None:
        return jnp.sum(x, axis=-2, keepdims=True)
    return segments.table(x, jnp.add)


def _absmax(x: jax.Array, segments: Segments | None) -> jax.Array:
    """As _total: the largest absolute value of each channel."""
    if segments is None:
        return jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    return segments.table(jnp.abs(x), jnp.maximum)


def look_up(table: jax.Array, index: jax.Array | None) -> jax.Array:
    """From a table [*B, K, U, C] what each token needs, [*B, K, tokens, C], or of all: [.., 1, C].

    The index is [*B, tokens].
    """
    if index is None:
        return table
    return jnp.take_along_axis(table, index[..., None, :, None], axis=-2)


def is_sample(number: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Whether K's mean is also of the keys with these numbers: the first or last 32 of each 64.

    Which of them is the parity of the bits of the block's number. That has no period, so no column
    of an image is left out, and where rows are as long as a power of two all count about alike.
    """
    count_bits = np.bitwise_count if isinstance(number, np.ndarray) else lax.population_count
    last_half = count_bits(number // BLOCK_KV) % 2
    return number // (BLOCK_KV // 2) % 2 == last_half


def _mean(total: jax.Array, one_over_count: jax.Array | np.float32) -> jax.Array:
    """0 where it is too large to be subtracted."""
    mean = total * one_over_count
    return jnp.where(jnp.abs(mean) <= _f32(MEAN_MAX), mean, _f32(0))


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
    centered: jax.Array,  # float32 [*B, K, S, H], finite, k - k̄
) -> tuple[jax.Array, jax.Array]:
    """INT8 codes [*B, K, Sp, H], and scales [*B, K, Sp/64, 4]."""
    *lead, _, head_dim = centered.shape
    padded = _pad_tokens(centered)
    blocks = padded.shape[-2] // BLOCK_KV
    grouped = padded.reshape(*lead, blocks, BLOCK_KV // 8, 4, 2, head_dim)
    absmax = jnp.max(jnp.abs(grouped), axis=(-4, -2, -1))
    absmax = jnp.maximum(absmax, _f32(ABSMAX_FLOOR))
    inverse = (_f32(INT8_MAX) / absmax)[..., None, :, None, None]
    codes = jnp.round(grouped * inverse).astype(jnp.int8).reshape(padded.shape)
    return codes, absmax * _f32(1 / INT8_MAX)


def quantize_value(
    centered: jax.Array,  # float32 [*B, K, S, Hv], finite, v - v̄
    segments: Segments | None,
    recipe: Recipe,
    exact: bool | jax.Array = False,
) -> tuple[jax.Array, jax.Array]:
    """Codes [*B, K, Sp, Hv] with absolute maximum V_MAX, and scales [*B, K, U, Hv].

    ``exact``: float32 in place of codes, the same but for their rounding.
    """
    absmax = jnp.maximum(_absmax(centered, segments), _f32(ABSMAX_FLOOR))
    # V_MAX / absmax may be below the smallest normal number, which XLA flushes to 0: large channels
    # are first scaled down by a power of two.
    down = jnp.where(absmax > 1, _f32(DOWNSCALE), _f32(1))
    inverse = _f32(V_MAX) / (absmax * down)
    index = None if segments is None else segments.key_index
    scaled = _pad_tokens(centered * look_up(down, index) * look_up(inverse, index))
    if recipe.pv == "fp8":
        codes = round_e4m3(scaled).astype(jnp.float8_e4m3fn)
    else:
        codes = round_fp16(scaled).astype(jnp.float16)
    return choose(exact, scaled, codes), absmax * _f32(1 / V_MAX)


def quantize(
    query: jax.Array,  # [*B, T, N, H]
    key: jax.Array,  # [*B, S, K, H]
    value: jax.Array,  # [*B, S, K, Hv]
    *,
    scale_log2: float,  # softmax scale * log2(e)
    recipe: Recipe,
    seen: jax.Array | None = None,  # bool [*B, K, S] or with ones; None: all
    segments: Segments | None = None,
    switches: Switches = Switches(),  # noqa: B008 (immutable)
) -> Quantized:
    q, k, v = (jnp.swapaxes(x, -2, -3).astype(jnp.float32) for x in (query, key, value))
    *batch, kv_heads, length, head_dim = k.shape
    k, v = _finite_or_zero(k), _finite_or_zero(v)

    def one_over(counted: np.ndarray | jax.Array) -> jax.Array | np.float32:
        """1 / how many of the tokens, bool [*B, K, S] or with ones."""
        if isinstance(counted, np.ndarray) and segments is None:
            return _f32(1) / _f32(np.count_nonzero(counted))
        ones = jnp.broadcast_to(counted, (*batch, kv_heads, length))[..., None]
        return _f32(1) / jnp.maximum(_total(ones.astype(jnp.float32), segments), _f32(1))

    def only(counted: np.ndarray | jax.Array, x: jax.Array) -> jax.Array:
        if isinstance(counted, np.ndarray) and counted.all():
            return x
        return jnp.where(counted[..., None], x, _f32(0))

    counted = np.ones(length, bool) if seen is None else seen
    one_over_count = one_over(counted)
    if segments is None:
        samples = counted & is_sample(np.arange(length))
    elif seen is None:
        samples = is_sample(segments.number)[..., None, :]
    else:  # a segment might have no sample that is seen
        samples = counted

    key_index = query_index = None
    if segments is not None:
        key_index, query_index = segments.key_index, segments.query_index

    # The means are rounded to bfloat16: any constant is exact, and rounding hides the order of the
    # sum, on which a kernel and this code differ.
    q_dot_mean = jnp.zeros(q.shape[:-1], jnp.float32)
    v_average: jax.Array | None = None
    if recipe.smooth_k:
        k_mean = _round_bf16(_mean(_total(only(samples, k), segments), one_over(samples)))
        k_mean = choose(switches.rough_k, jnp.zeros_like(k_mean), k_mean)
        grouped_q = q.reshape(*batch, kv_heads, -1, *q.shape[-2:])
        means = look_up(k_mean, query_index)  # [*B, K, T or 1, H]
        form = "...kgth,...kh->...kgt" if segments is None else "...kgth,...kth->...kgt"
        q_dot_mean = jnp.einsum(
            form,
            grouped_q,
            means[..., 0, :] if segments is None else means,
            precision=lax.Precision.HIGHEST,
        ).reshape(q.shape[:-1])
        k = k - look_up(k_mean, key_index)
    if recipe.smooth_v:
        v_average = _mean(_total(only(counted, v), segments), one_over_count)
        v_average = choose(switches.rough_v, jnp.zeros_like(v_average), v_average)
        v = v - look_up(_round_bf16(v_average), key_index)
    k, v = only(counted, k), only(counted, v)

    q_codes, q_scale = quantize_query(q, scale_log2)
    # NaN marks a query that is not finite.
    exact_scale = jnp.where(jnp.isnan(q_scale), q_scale, _f32(scale_log2))
    q_scale = choose(switches.exact_qk, exact_scale, q_scale)
    if segments is not None:
        absmax = _absmax(only(samples, k), segments)
        size = _power_of_two(jnp.max(absmax, axis=-1, keepdims=True))
        k = k / look_up(size, key_index)
        of_query = jnp.swapaxes(look_up(size, query_index), -1, -2)  # [*B, K, 1, T]
        shape = (*batch, kv_heads, -1, q.shape[-2])
        q_scale = (q_scale.reshape(shape) * of_query).reshape(q_scale.shape)
    k_codes, k_scale = quantize_key(k)
    q_codes = choose(switches.exact_qk, q, q_codes)
    k_codes = choose(switches.exact_qk, _pad_tokens(k), k_codes)
    k_scale = choose(switches.exact_qk, jnp.ones_like(k_scale), k_scale)
    v_codes, v_scale = quantize_value(v, segments, recipe, switches.exact_v)

    # Restoring mean(V) - mean(dequantized V), not v̄, cancels the rounding errors of V as far as
    # the attention is uniform: -12 % error on normal inputs, for one integer sum per channel.
    # Where the average is 0 (or was too large to subtract), nothing was taken from V.
    v_offset = jnp.zeros_like(v_scale)
    if v_average is not None:
        codes = v_codes[..., :length, :].astype(jnp.float32)
        code_mean = _total(codes, segments) * one_over_count
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
    )


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two up to x, from ABSMAX_FLOOR on."""
    bits = lax.bitcast_convert_type(jnp.maximum(x, _f32(ABSMAX_FLOOR)), jnp.int32)
    return lax.bitcast_convert_type(bits & np.int32(0x7F800000), jnp.float32)


def _pad_tokens(x: jax.Array) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[-2] = (0, -x.shape[-2] % BLOCK_KV)
    return jnp.pad(x, padding)
