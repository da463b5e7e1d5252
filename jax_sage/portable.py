"""Quantized attention in plain JAX: every platform without a kernel, and the oracle of the tests.

The same numbers as the kernels: exact INT8 products, P rounded to E4M3 (or FP16), sums of blocks of
64 keys (the Hopper kernel's: of 512) rounded to FP16 after each matrix instruction and then added
in FP32. Blocks of queries and keys are visited in loops: memory is proportional to the inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_sage.quantization import Quantized, quantize, round_e4m3, round_fp16
from jax_sage.recipe import BLOCK_KV, P_MAX, SCORE_MAX, Recipe

_f32 = np.float32
_LOG2_P_MAX = _f32(np.log2(P_MAX))
_LN_2 = _f32(np.log(2.0))
# Keys that one matrix instruction sums: mma.m16n8k32 for E4M3, m16n8k16 for FP16. The FP16
# accumulator is rounded after each.
_INSTRUCTION_KEYS = {"fp8": 32, "fp16": 16}
# Scores of one step of the inner loop, over all batch entries and heads: 16 MiB in float32.
_SCORES_PER_STEP = 1 << 22


def attention(
    query: jax.Array,  # [*B, T, N, H]
    key: jax.Array,  # [*B, S, K, H]
    value: jax.Array,  # [*B, S, K, H]
    *,
    scale_log2: float,  # softmax scale * log2(e)
    is_causal: bool,
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [*B, T, N, H] in the dtype of query, and lse [*B, T, N] in float32."""
    *batch, length_q, heads, head_dim = query.shape
    length_kv, kv_heads = key.shape[-3:-1]
    group = heads // kv_heads
    x = quantize(query, key, value, scale_log2=scale_log2, recipe=recipe)

    block_q = _block_q(int(np.prod(batch, initial=1)) * heads, length_q)
    padded_q = -(-length_q // block_q) * block_q

    def by_block(a: jax.Array) -> jax.Array:  # [*B, N, T, ...] -> [blocks, *B, K, G, block_q, ...]
        axis = len(batch) + 1
        padding = [(0, 0)] * a.ndim
        padding[axis] = (0, padded_q - length_q)
        a = jnp.pad(a, padding)
        shape = (*batch, kv_heads, group, -1, block_q, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(shape), len(batch) + 2, 0)

    def one_block(args: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _attend(*args, x, length_kv=length_kv, is_causal=is_causal, recipe=recipe)

    starts = jnp.arange(0, padded_q, block_q, dtype=jnp.int32)
    out, lse = lax.map(one_block, (starts, by_block(x.q), by_block(x.q_scale)))

    def to_tokens(a: jax.Array) -> jax.Array:  # [blocks, *B, K, G, block_q, ...] -> [*B, T, N, ...]
        a = jnp.moveaxis(a, 0, len(batch) + 2)
        a = a.reshape(*batch, heads, padded_q, *a.shape[len(batch) + 4 :])
        return jnp.moveaxis(a, len(batch), len(batch) + 1)[
            (slice(None),) * len(batch) + (slice(length_q),)
        ]

    out, lse = to_tokens(out), to_tokens(lse)
    lse = lse + _LN_2 * jnp.swapaxes(x.q_dot_mean, -1, -2)
    return out.astype(query.dtype), lse


def _attend(
    start: jax.Array,  # int32, position of the first query of this block
    q: jax.Array,  # int8 [*B, K, G, block_q, H]
    q_scale: jax.Array,  # float32 [*B, K, G, block_q]
    x: Quantized,
    *,
    length_kv: int,
    is_causal: bool,
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
    """One block of queries: out [*B, K, G, block_q, H] in float32 and lse without q·k̄."""
    block_q, head_dim = q.shape[-2:]
    rows = start + jnp.arange(block_q, dtype=jnp.int32)
    q_float = q.astype(jnp.float32)
    round_p = round_e4m3 if recipe.pv == "fp8" else round_fp16
    # E4M3 and INT8 values are exact in every format that a platform may use for a float32 dot;
    # FP16 values are not exact in bfloat16.
    precision = lax.Precision.HIGHEST if recipe.pv == "fp16" else lax.Precision.DEFAULT
    keys = _INSTRUCTION_KEYS[recipe.pv]

    def block(array: jax.Array, index: jax.Array, size: int, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, index * np.int32(size), size, axis)

    def body(
        j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        row_max, row_sum, acc = carry
        k = block(x.k, j, BLOCK_KV, -2).astype(jnp.float32)
        v = block(x.v, j, BLOCK_KV, -2).astype(jnp.float32)
        k_scale = jnp.squeeze(block(x.k_scale, j, 1, -2), -2)  # [*B, K, 4]
        # 127 * 127 * 128 < 2^24: integer products and sums are exact in float32.
        products = jnp.einsum("...kgth,...ksh->...kgts", q_float, k)
        scales = jnp.tile(jnp.repeat(k_scale, 2, axis=-1), BLOCK_KV // 8)  # [*B, K, 64]
        scores = products * (q_scale[..., None] * scales[..., None, None, :])

        columns = j * np.int32(BLOCK_KV) + jnp.arange(BLOCK_KV, dtype=jnp.int32)
        visible = columns < length_kv
        if is_causal:
            visible = visible & (columns <= rows[:, None])
        block_max = jnp.max(jnp.where(visible, scores, _f32(-np.inf)), axis=-1)
        # An integer maximum makes every rescaling a power of two: P is rounded alike whatever the
        # maximum was when its block was visited.
        new_max = jnp.maximum(row_max, jnp.ceil(block_max))
        shift = jnp.where(jnp.isneginf(new_max), _f32(0), new_max)
        p = jnp.where(visible, jnp.exp2(scores - (shift - _LOG2_P_MAX)[..., None]), _f32(0))
        rescale = jnp.exp2(row_max - shift)
        row_sum = row_sum * rescale + jnp.sum(p, axis=-1)

        # The sum of the rounded P is one more channel of V, constant one.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        p = round_p(p)
        partial = jnp.zeros_like(acc)
        for first in range(0, BLOCK_KV, keys):
            step = slice(first, first + keys)
            partial = partial + jnp.einsum(
                "...kgts,...ksh->...kgth", p[..., step], v[..., step, :], precision=precision
            )
            if recipe.pv_accumulator == "fp16":
                partial = round_fp16(partial)
        return new_max, row_sum, acc * rescale[..., None] + partial

    blocks = jnp.int32(x.k.shape[-2] // BLOCK_KV)
    if is_causal:  # blocks behind the last query of this block are not visited
        blocks = jnp.minimum(blocks, (start + np.int32(block_q + BLOCK_KV - 1)) // BLOCK_KV)
    row_max, row_sum, acc = lax.fori_loop(
        np.int32(0),
        blocks,
        body,
        (
            jnp.full_like(q_scale, -np.inf),
            jnp.zeros_like(q_scale),
            jnp.zeros((*q_scale.shape, head_dim + 1), jnp.float32),
        ),
    )

    norm = acc[..., -1:]
    scale, offset = x.v_scale[..., None, None, :], x.v_offset[..., None, None, :]
    out = jnp.where(norm == 0, _f32(0), acc[..., :-1] / norm * scale + offset)
    lse = _LN_2 * (row_max + jnp.log2(row_sum) - _LOG2_P_MAX)

    too_large = (jnp.abs(row_max) >= _f32(SCORE_MAX)) & ~jnp.isneginf(row_max)
    out = jnp.where(too_large[..., None], _f32(np.nan), out)
    lse = jnp.where(too_large, _f32(np.nan), lse)

    last = jnp.minimum(rows, np.int32(length_kv - 1)) if is_causal else np.int32(length_kv - 1)
    last = jnp.broadcast_to(last, rows.shape)
    out = jnp.where(x.first_bad[..., None, None, :] <= last[:, None], _f32(np.nan), out)
    lse = jnp.where(x.first_bad_k[..., None, None] <= last, _f32(np.nan), lse)
    return out, lse


def _block_q(batch_heads: int, length_q: int) -> int:
    block = max(16, min(1024, _SCORES_PER_STEP // (BLOCK_KV * max(batch_heads, 1))))
    return min(block, max(length_q, 1))
