"""Quantized attention in plain JAX: every platform without a kernel, and the oracle of the tests.

The same numbers as the kernels: exact INT8 products, P rounded to E4M3 (or FP16), sums of blocks of
64 keys (the Hopper kernel's: of 512) rounded to FP16 after each matrix instruction and then added
in FP32. Blocks of queries and keys are visited in loops: memory is proportional to the inputs, and
blocks of keys that no query of a block can see (causal, windows, lengths) are not visited.

Steps can be left out, to see what each costs (:func:`jax_sage.compare`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_sage.masking import Band, Masks, Segments, View
from jax_sage.quantization import (
    Quantized,
    Switches,
    choose,
    look_up,
    quantize,
    round_e4m3,
    round_fp16,
)
from jax_sage.recipe import BLOCK_KV, P_MAX, SCORE_MAX, Recipe

_f32 = np.float32
_LOG2_P_MAX = _f32(np.log2(P_MAX))
_LN_2 = _f32(np.log(2.0))
# Keys that one matrix instruction sums: mma.m16n8k32 for E4M3, m16n8k16 for FP16. The FP16
# accumulator is rounded after each.
_INSTRUCTION_KEYS = {"fp8": 32, "fp16": 16}
# Scores of one step of the inner loop, over all batch entries and heads: 16 MiB in float32.
_SCORES_PER_STEP = 1 << 22


class _NotFinite(NamedTuple):
    """Where K and V are NaN or infinite. S is padded as in Quantized."""

    key: jax.Array  # bool [*B, K, Sp]
    value: jax.Array  # bool [*B, K, Sp, Hv]: a value, or the key
    anywhere: jax.Array  # bool


def attention(
    query: jax.Array,  # [*B, T, N, H]
    key: jax.Array,  # [*B, S, K, H]
    value: jax.Array,  # [*B, S, K, Hv]
    masks: Masks = Masks(),  # noqa: B008 (immutable)
    *,
    scale_log2: float,  # softmax scale * log2(e)
    band: Band,
    recipe: Recipe,
    switches: Switches = Switches(),  # noqa: B008 (immutable)
    rows: tuple[int, ...] | None = None,
    block_q: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [*B, T, N, Hv] in the dtype of query, and lse [*B, T, N] in float32.

    ``rows``: compute only the blocks of ``block_q`` queries that begin there, in place of all T.
    """
    *batch, length_q, heads, _ = query.shape
    length_kv, kv_heads = key.shape[-3:-1]
    group = heads // kv_heads
    if block_q is None:
        block_q = _block_q(int(np.prod(batch, initial=1)) * heads, length_q)
    padded_q = -(-length_q // block_q) * block_q

    view = View(
        masks,
        band,
        batch_rank=len(batch),
        kv_heads=kv_heads,
        length_q=length_q,
        length_kv=length_kv,
        padded_q=padded_q,
    )
    segments = None
    key_ids = masks.key_segment_ids()
    if masks.query_segment_ids is not None and key_ids is not None:
        segments = Segments.find(
            jnp.broadcast_to(masks.query_segment_ids, (*batch, length_q)),
            jnp.broadcast_to(key_ids, (*batch, length_kv)),
        )
    x = quantize(
        query,
        key,
        value,
        scale_log2=scale_log2,
        recipe=recipe,
        seen=None if view.sees_all_keys() else view.seen_keys(),
        segments=segments,
        switches=switches,
    )
    bad = _find_bad(key, value)

    def by_group(a: jax.Array) -> jax.Array:  # [*B, N, T, ...] -> [*B, K, G, padded_q, ...]
        a = _pad(a, len(batch) + 1, padded_q)
        return a.reshape(*batch, kv_heads, group, *a.shape[len(batch) + 1 :])

    q, q_scale = by_group(x.q), by_group(x.q_scale)
    query_index = None if segments is None else _pad(segments.query_index, len(batch), padded_q)

    def one_block(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = None
        if query_index is not None:
            index = lax.dynamic_slice_in_dim(query_index, row, block_q, axis=-1)
        out, lse = _attend(
            row,
            lax.dynamic_slice_in_dim(q, row, block_q, axis=-2),
            lax.dynamic_slice_in_dim(q_scale, row, block_q, axis=-1),
            index,
            x,
            view,
            recipe,
            switches,
        )
        bad_out, bad_lse = _who_sees(row, bad, view, out.shape)
        return jnp.where(bad_out, _f32(np.nan), out), jnp.where(bad_lse, _f32(np.nan), lse)

    starts = np.arange(0, padded_q, block_q) if rows is None else np.asarray(rows)
    out, lse = lax.map(one_block, jnp.asarray(starts, jnp.int32))
    count = length_q if rows is None else starts.size * block_q

    def to_tokens(a: jax.Array) -> jax.Array:  # [blocks, *B, K, G, block_q, ...] -> [*B, T, N, ...]
        a = jnp.moveaxis(a, 0, len(batch) + 2)
        a = a.reshape(*batch, heads, starts.size * block_q, *a.shape[len(batch) + 4 :])
        return jnp.moveaxis(a, len(batch), len(batch) + 1)[
            (slice(None),) * len(batch) + (slice(count),)
        ]

    out, lse = to_tokens(out), to_tokens(lse)
    # A query that sees nothing has lse -inf, whatever q·k̄ is.
    q_dot_mean = x.q_dot_mean
    if rows is not None:
        places = (starts[:, None] + np.arange(block_q)).ravel()
        q_dot_mean = jnp.take(q_dot_mean, jnp.asarray(places), axis=-1)
    q_dot_mean = jnp.swapaxes(q_dot_mean, -1, -2)
    lse = jnp.where(jnp.isneginf(lse), lse, lse + _LN_2 * q_dot_mean)
    return out.astype(query.dtype), lse


def _attend(
    row: jax.Array,  # int32, position of the first query of this block
    q: jax.Array,  # int8 [*B, K, G, block_q, H]
    q_scale: jax.Array,  # float32 [*B, K, G, block_q]
    query_index: jax.Array | None,  # int32 [*B, block_q], of segments
    x: Quantized,
    view: View,
    recipe: Recipe,
    switches: Switches,
) -> tuple[jax.Array, jax.Array]:
    """One block of queries: out [*B, K, G, block_q, Hv] in float32, and lse without q·k̄."""
    block_q = q.shape[-2]
    q_float = q.astype(jnp.float32)
    round_p = round_e4m3 if recipe.pv == "fp8" else round_fp16
    # E4M3 and INT8 values are exact in every format that a platform may use for a float32 dot;
    # FP16 values are not exact in bfloat16.
    plain = all(switch is False for switch in switches)
    integers = lax.Precision.DEFAULT if plain else lax.Precision.HIGHEST
    is_fp8 = recipe.pv == "fp8" and plain
    precision = lax.Precision.DEFAULT if is_fp8 else lax.Precision.HIGHEST
    keys = _INSTRUCTION_KEYS[recipe.pv]

    def body(
        j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        row_max, row_sum, acc = carry
        k = _block(x.k, j, BLOCK_KV).astype(jnp.float32)
        v = _block(x.v, j, BLOCK_KV).astype(jnp.float32)
        k_scale = jnp.squeeze(_block(x.k_scale, j, 1), -2)  # [*B, K, 4]
        # 127 * 127 * 256 < 2^24: integer products and sums are exact in float32.
        products = jnp.einsum("...kgth,...ksh->...kgts", q_float, k, precision=integers)
        scales = jnp.tile(jnp.repeat(k_scale, 2, axis=-1), BLOCK_KV // 8)  # [*B, K, 64]
        scores = products * (q_scale[..., None] * scales[..., None, None, :])
        visible, bias = view.block(row, block_q, j * np.int32(BLOCK_KV), BLOCK_KV)
        if bias is not None:
            scores = scores + bias
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
        p = choose(switches.exact_p, p, round_p(p))
        partial = jnp.zeros_like(acc)
        for first in range(0, BLOCK_KV, keys):
            step = slice(first, first + keys)
            partial = partial + jnp.einsum(
                "...kgts,...ksh->...kgth", p[..., step], v[..., step, :], precision=precision
            )
            if recipe.pv_accumulator == "fp16":
                partial = choose(switches.exact_sums, partial, round_fp16(partial))
        return new_max, row_sum, acc * rescale[..., None] + partial

    first, end = _block_range(view, row, block_q)
    row_max, row_sum, acc = lax.fori_loop(
        first,
        end,
        body,
        (
            jnp.full_like(q_scale, -np.inf),
            jnp.zeros_like(q_scale),
            jnp.zeros((*q_scale.shape, x.v.shape[-1] + 1), jnp.float32),
        ),
    )

    norm = acc[..., -1:]
    # [*B, K, 1, block_q or 1, Hv]
    scale, offset = (look_up(a, query_index)[..., None, :, :] for a in (x.v_scale, x.v_offset))
    out = jnp.where(norm == 0, _f32(0), acc[..., :-1] / norm * scale + offset)
    lse = _LN_2 * (row_max + jnp.log2(row_sum) - _LOG2_P_MAX)

    too_large = (jnp.abs(row_max) >= _f32(SCORE_MAX)) & ~jnp.isneginf(row_max)
    out = jnp.where(too_large[..., None], _f32(np.nan), out)
    lse = jnp.where(too_large, _f32(np.nan), lse)
    return out, lse


def _find_bad(key: jax.Array, value: jax.Array) -> _NotFinite:
    bad_key = ~jnp.isfinite(jnp.swapaxes(key, -2, -3)).all(-1)
    bad_value = ~jnp.isfinite(jnp.swapaxes(value, -2, -3)) | bad_key[..., None]
    padded = -(-bad_key.shape[-1] // BLOCK_KV) * BLOCK_KV
    axis = bad_key.ndim - 1
    return _NotFinite(
        _pad(bad_key, axis, padded), _pad(bad_value, axis, padded), jnp.any(bad_value)
    )


def _who_sees(
    row: jax.Array, bad: _NotFinite, view: View, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Which outputs [*B, K, G, block_q, Hv] and lse [*B, K, G, block_q] see what is not finite."""
    block_q = shape[-2]

    def body(j: jax.Array, hits: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        visible, _ = view.block(row, block_q, j * np.int32(BLOCK_KV), BLOCK_KV)
        key = lax.dynamic_slice_in_dim(bad.key, j * np.int32(BLOCK_KV), BLOCK_KV, axis=-1)
        visible = visible.astype(jnp.float32)
        value = _block(bad.value, j, BLOCK_KV)[..., None, :, :].astype(jnp.float32)
        return hits[0] + jnp.matmul(visible, value), hits[1] + jnp.matmul(
            visible, key[..., None, :, None].astype(jnp.float32)
        )

    def search() -> tuple[jax.Array, jax.Array]:
        nothing = jnp.zeros(shape, jnp.float32), jnp.zeros((*shape[:-1], 1), jnp.float32)
        out, lse = lax.fori_loop(*_block_range(view, row, block_q), body, nothing)
        return out > 0, lse[..., 0] > 0

    def none() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(shape, bool), jnp.zeros(shape[:-1], bool)

    return lax.cond(bad.anywhere, search, none)


def _block_range(view: View, row: jax.Array, block_q: int) -> tuple[jax.Array, jax.Array]:
    """The blocks of keys that any of these queries may see."""
    first, end = view.rows(row, block_q)
    return jnp.min(first) // np.int32(BLOCK_KV), -(-jnp.max(end) // np.int32(BLOCK_KV))


def _block(array: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, index * np.int32(size), size, axis=array.ndim - 2)


def _pad(array: jax.Array, axis: int, size: int) -> jax.Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, padding)


def _block_q(batch_heads: int, length_q: int) -> int:
    block = max(16, min(1024, _SCORES_PER_STEP // (BLOCK_KV * max(batch_heads, 1))))
    return min(block, max(length_q, 1))
