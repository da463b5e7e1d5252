"""The CUDA lowering: two custom calls, quantization and attention, and how a kernel is chosen.

Intermediate buffers are results of the first call. Layouts (also checked by the C++ handlers):
head dimensions are padded to Hp = 64 or 128, queries to a multiple of 128, keys to a multiple of
64; padding is zero. FP8 V is stored transposed, and its keys permuted within each 16 so that a
C fragment of QKᵀ is an A fragment of PV without any exchange between threads: position
4t + 2h + e holds key 8h + 2t + e.
"""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from jax_sage import kernels, portable
from jax_sage.masking import Band, Masks
from jax_sage.recipe import BLOCK_KV, Recipe

BLOCK_Q = 128
MAX_HEAD_DIM = 128
CAUSAL = Band(right=0)
# The sequence is cut into parts of this many tokens for the channel statistics: enough of them to
# fill a GPU with one head, but no more than one CTA can put together in no time.
_STATISTICS_TOKENS = 512
_MAX_PARTS = 256


def attention(
    query: jax.Array,  # [*B, T, N, H]
    key: jax.Array,  # [*B, S, K, H]
    value: jax.Array,  # [*B, S, K, Hv]
    masks: Masks = Masks(),  # noqa: B008 (immutable)
    *,
    scale_log2: float,
    band: Band,
    exact_lse: bool,
    recipe: Recipe,
    mma_sync: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """out and lse, as of the primitive.

    ``mma_sync`` asks for the mma.sync kernel, which runs on every GPU that there are kernels for,
    where the device has a faster one of its own: so one machine can test both.
    """
    reason = why_portable(query, value, masks.given(), band, recipe)
    if reason is not None:
        # The stack is that of a compilation, which need not hold the call of jax_sage.attention.
        place = source_info_util.summarize(source_info_util.current())
        warnings.warn(
            f"jax_sage.attention, called at {place or 'an unknown place'}, is lowered for CUDA in "
            f"portable JAX, far slower than a kernel: {reason}",
            kernels.PortableWarning,
            stacklevel=1,
        )
        return portable.attention(
            query, key, value, masks, scale_log2=scale_log2, band=band, recipe=recipe
        )
    # Keys behind the last query are seen by none, and must not count in any statistics.
    _, length_kv = band.reach(query.shape[-3], key.shape[-3])
    if length_kv < key.shape[-3]:
        key, value = key[..., :length_kv, :, :], value[..., :length_kv, :, :]
    # One head dimension for all: zeros add nothing to scores, and what they give is cut off.
    value_dim, head_dim = value.shape[-1], max(query.shape[-1], value.shape[-1])
    query, key, value = (_pad_head_dim(x, head_dim) for x in (query, key, value))
    quantized = quantize(query, key, value, scale_log2=scale_log2, recipe=recipe)
    out, lse = jax.ffi.ffi_call(
        "jax_sage_attention",
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
        ),
    )(
        *quantized,
        length_kv=np.int64(length_kv),
        is_causal=np.int64(band == CAUSAL),
        exact_lse=np.int64(exact_lse),
        pv_accumulator=np.int64({"fp16": 16, "fp32": 32}[recipe.pv_accumulator]),
        mma_sync=np.int64(mma_sync),
    )
    return out if value_dim == head_dim else out[..., :value_dim], lse


# What no kernel takes yet, in the terms of the public call.
NOT_IN_KERNELS = (
    "bias, mask, lengths, segment ids, windows, causal_alignment='bottom_right' with T != S, and "
    f"head dimensions above {MAX_HEAD_DIM}"
)


def why_portable(
    query: jax.Array, value: jax.Array, given: tuple[str, ...], band: Band, recipe: Recipe
) -> str | None:
    """Why no kernel can run this call on the GPUs of this process, or None if one can."""
    reason = kernels.why_unavailable(recipe)
    if reason is not None:
        return reason
    parts = list(given)
    if band not in (Band(), CAUSAL):
        parts.append("a window" if band.left is not None else "this alignment")
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        parts.append(f"head dimension {head_dim}")
    return f"there is no kernel for {', '.join(parts)} yet" if parts else None


def _pad_head_dim(x: jax.Array, size: int) -> jax.Array:
    if x.shape[-1] == size:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def quantize(
    query: jax.Array,  # [*B, T, N, H]
    key: jax.Array,  # [*B, S, K, H]
    value: jax.Array,  # [*B, S, K, H]
    *,
    scale_log2: float,
    recipe: Recipe,
) -> tuple[jax.Array, ...]:
    """The operands of the attention call, in its order. B is the product of the batch dims."""
    batch = math.prod(query.shape[:-3])
    length_q, heads, head_dim = query.shape[-3:]
    length_kv, kv_heads = key.shape[-3:-1]
    hp = 64 if head_dim <= 64 else 128
    tp = -(-length_q // BLOCK_Q) * BLOCK_Q
    sp = -(-length_kv // BLOCK_KV) * BLOCK_KV
    parts = min(-(-length_kv // _STATISTICS_TOKENS), _MAX_PARTS)

    def array(dtype: object, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    results = (
        array(jnp.int8, batch, heads, tp, hp),  # q
        array(jnp.float32, batch, heads, tp),  # q_scale, times |scale_log2|
        array(jnp.float32, batch, heads, tp),  # q_dot_mean, times scale_log2
        array(jnp.int8, batch, kv_heads, sp, hp),  # k
        array(jnp.float32, batch, kv_heads, sp // BLOCK_KV, 4),  # k_scale
        array(jnp.float8_e4m3fn, batch, kv_heads, hp, sp)
        if recipe.pv == "fp8"
        else array(jnp.float16, batch, kv_heads, sp, hp),  # v
        # Mean of K; mean of V, the same in bfloat16; scale of V; how its codes are made (2 rows).
        array(jnp.float32, batch, kv_heads, 6, hp),  # channels
        array(jnp.int32, batch, kv_heads, 2, hp),  # first position not finite: of K, of V
        # 64-bit integers, which JAX has only with jax_enable_x64.
        array(jnp.uint32, batch, kv_heads, hp, 2),  # value_code_sum
        array(jnp.float32, batch, kv_heads, parts, 6, hp),  # scratch
        array(jnp.int32, batch, kv_heads, 2),  # scratch: counters of parts that are done
    )
    *quantized, _, _ = jax.ffi.ffi_call("jax_sage_quantize", results)(
        query,
        key,
        value,
        scale_log2=np.float32(scale_log2),
        smooth_k=np.int64(recipe.smooth_k),
        smooth_v=np.int64(recipe.smooth_v),
    )
    return tuple(quantized)
