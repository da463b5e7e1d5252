"""The CUDA lowering: two custom calls, quantization and attention, and how a kernel is chosen.

What masks need besides, with calls of its own, makes mask_operands.py.

Intermediate buffers are results of the first call. Layouts (also checked by the C++ handlers):
head dimensions are padded to Hp = 64, 128, 192 or 256, queries to a multiple of 128, keys to a
multiple of 64; padding is zero. FP8 V is stored transposed, and its keys permuted within each 16 so
that a C fragment of QKᵀ is an A fragment of PV without any exchange between threads: position
4t + 2h + e holds key 8h + 2t + e.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from jax_sage import kernels, mask_operands, portable
from jax_sage.masking import Band, Masks, View
from jax_sage.recipe import BLOCK_KV, Recipe

BLOCK_Q = 128
CAUSAL = Band(right=0)
# For the channel statistics K and V of each head are cut into parts of so many numbers (a few CTAs
# on each SM), unless there are more than one CTA puts together in no time; with few heads there
# may be, to fill a GPU.
_NUMBERS_OF_PART = 32768
_FEW_PARTS, _MANY_PARTS, _ENOUGH_PARTS = 64, 256, 1024


def attention(
    query: jax.Array,  # [*B, T, N, H]
    key: jax.Array,  # [*B, S, K, H]
    value: jax.Array,  # [*B, S, K, Hv]
    masks: Masks = Masks(),  # noqa: B008 (immutable)
    *,
    scale_log2: float,
    band: Band,
    with_lse: bool,
    recipe: Recipe,
    mma_sync: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """out and lse, as of the primitive; without ``with_lse`` lse may be anything.

    ``mma_sync`` asks for the mma.sync kernel, which runs on every GPU that there are kernels for,
    where the device has a faster one of its own: so one machine can test both.
    """
    reason = why_portable(query, value, recipe, mma_sync)
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
    # Keys that no query sees must not count in any statistics.
    _, end_kv = band.reach(query.shape[-3], key.shape[-3])
    plain = not masks.given() and band in (Band(), CAUSAL)
    if plain and end_kv < key.shape[-3]:
        key, value = key[..., :end_kv, :, :], value[..., :end_kv, :, :]
    # One head dimension for all: zeros add nothing to scores, and what they give is cut off.
    value_dim, head_dim = value.shape[-1], max(query.shape[-1], value.shape[-1])
    query, key, value = (_pad_head_dim(x, head_dim) for x in (query, key, value))
    run = functools.partial(
        _call_attention,
        length_kv=np.int64(key.shape[-3]),
        is_causal=np.int64(plain and band == CAUSAL),
        alike=np.int64(_alike(band, key.shape[-3])),
        with_lse=np.int64(with_lse),
        pv_accumulator=np.int64({"fp16": 16, "fp32": 32}[recipe.pv_accumulator]),
        mma_sync=np.int64(mma_sync),
    )
    if plain:
        quantized = quantize(query, key, value, scale_log2=scale_log2, recipe=recipe)
        out, lse = run(query, quantized, **dict.fromkeys(_MASK_KINDS, np.int64(0)))
    else:
        out, lse = _masked(
            run, query, key, value, masks, scale_log2=scale_log2, band=band, recipe=recipe
        )
    return out if value_dim == head_dim else out[..., :value_dim], lse


def _alike(band: Band, length_kv: int) -> bool:
    """By its position alone, does each query see about as many keys?

    A limit on one side makes a ramp of them, and so does a wide window that is cut off at one end.
    """
    if band.left is None and band.right is None:
        return True
    if band.left is None or band.right is None:
        return False
    return 8 * (band.left + band.right + 1) <= length_kv


_MASK_KINDS = ("masked", "mask", "segments", "bias", "counted", "by_intervals")


def _call_attention(
    query: jax.Array, operands: Sequence[jax.Array], **attributes: np.int64
) -> tuple[jax.Array, jax.Array]:
    """The custom call: out in the shape and dtype of query, and lse."""
    results = (
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
    )
    out, lse = jax.ffi.ffi_call("jax_sage_attention", results)(*operands, **attributes)
    return out, lse


def _masked(
    run: Callable[..., tuple[jax.Array, jax.Array]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: Masks,
    *,
    scale_log2: float,
    band: Band,
    recipe: Recipe,
) -> tuple[jax.Array, jax.Array]:
    *batch, length_q, _, _ = query.shape
    length_kv, kv_heads = key.shape[-3:-1]
    view = View(
        masks,
        band,
        batch_rank=len(batch),
        kv_heads=kv_heads,
        length_q=length_q,
        length_kv=length_kv,
        padded_q=_padded(query.shape[-1], length_q, length_kv)[1],
    )
    operands = mask_operands.make(view, masks, batch, key, value)
    codes = functools.partial(quantize, query, key, value, scale_log2=scale_log2, recipe=recipe)
    attributes = operands.attributes | dict.fromkeys(("counted", "by_intervals"), np.int64(0))
    if view.sees_everything():
        return run(query, (*codes(), *operands.arrays), **attributes)
    if operands.seen is not None:
        # Kernels load no tile that lies outside of all intervals.
        quantized = codes(seen=operands.seen, skip_unseen=True)
        attributes["counted"] = np.int64(1)
        return run(query, (*quantized, operands.seen[1], *operands.arrays), **attributes)
    seen = None
    if not view.sees_all_keys():
        seen = mask_operands.seen_keys(view, masks, operands.arrays[0], batch, kv_heads)
    if operands.segments is not None:
        # Means and scales of V are those of each segment, and so are the counts of its keys.
        *segments, scattered = operands.segments
        own = masks.key_value_segment_ids is None
        quantized = codes(
            seen=() if seen is None else (seen,),
            segments=(*segments, operands.arrays[0]),
            own_segments=own,
        )
        # Where queries and keys share their ids, neighbouring queries see neighbouring intervals.
        # Of others, in another order, intervals may be far apart, and plans leave out what is
        # between them.
        are_intervals = masks.mask is None and masks.bias is None
        attributes["by_intervals"] = np.int64(own and are_intervals)
        return run(query, (*quantized, *operands.arrays, scattered), **attributes)
    assert seen is not None  # a mask or a bias: nothing is known
    count = jnp.maximum(seen.sum(-1, dtype=jnp.float32), np.float32(1))
    per_key = jnp.broadcast_to(np.float32(1) / count, (math.prod(batch), kv_heads))
    attributes["counted"] = np.int64(1)
    return run(query, (*codes(seen=(seen, per_key)), per_key, *operands.arrays), **attributes)


def why_portable(
    query: jax.Array, value: jax.Array, recipe: Recipe, mma_sync: bool = False
) -> str | None:
    """Why no kernel can run this call on the GPUs of this process, or None if one can."""
    reason = kernels.why_unavailable(recipe)
    if reason is not None:
        return reason
    head_dim = max(query.shape[-1], value.shape[-1])
    limit = kernels.max_head_dim(recipe, mma_sync)
    if head_dim > limit:
        return f"its kernels have head dimensions up to {limit}, here it is {head_dim}"
    return None


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
    seen: tuple[jax.Array, ...] = (),
    skip_unseen: bool = False,
    segments: tuple[jax.Array, ...] = (),
    own_segments: bool = False,
) -> tuple[jax.Array, ...]:
    """The operands of the attention call, in its order. B is the product of the batch dims.

    ``seen``: whether a key counts, uint8 [B, K, S] or with ones, and without segments 1 / how many
    do, float32 [B, K]. ``skip_unseen``: parts of keys that nobody sees get no codes; otherwise
    zeros. ``segments``: what mask_operands.Segments has of ids and keys, and the rows of the mask
    operands; ``own_segments``: the queries have the ids of the keys. A segment's slot is the place
    of its first key in their order; tables by slot are as long as the keys: 18 bytes for each of
    their channels (a power of two), 8 of them until the attention is done.
    """
    batch = math.prod(query.shape[:-3])
    length_q, heads, head_dim = query.shape[-3:]
    length_kv, kv_heads = key.shape[-3:-1]
    hp, tp, sp = _padded(head_dim, length_q, length_kv)
    hc = 256 if hp == 192 else hp  # of tables by channel: a power of two
    parts = _parts(length_kv, hc, 2 * batch * kv_heads)

    def array(dtype: object, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    quantized: tuple[jax.ShapeDtypeStruct, ...] = (
        array(jnp.int8, batch, heads, tp, hp),  # q
        array(jnp.float32, batch, heads, tp),  # q_scale, times |scale_log2|
        array(jnp.float32, batch, heads, tp),  # q_dot_mean, times scale_log2
        array(jnp.int8, batch, kv_heads, sp, hp),  # k
        array(jnp.float32, batch, kv_heads, sp // BLOCK_KV, 4),  # k_scale
        array(jnp.float8_e4m3fn, batch, kv_heads, hp, sp)
        if recipe.pv == "fp8"
        else array(jnp.float16, batch, kv_heads, sp, hp),  # v
    )
    # First position not finite: of K, of V.
    first_bad = array(jnp.int32, batch, kv_heads, 2, hc)
    # 64-bit integers, which JAX has only with jax_enable_x64.
    code_sum = functools.partial(array, jnp.uint32, batch, kv_heads)
    scratch: tuple[jax.ShapeDtypeStruct, ...]
    if segments:
        by_slot = (batch, kv_heads, length_kv)
        quantized += (
            # channels: scale of V, what is added to the output
            array(jnp.float32, *by_slot, 2, hc),
            first_bad,
            array(jnp.int32, batch, tp),  # query_slots; -1: no key has the id
            # What queries see where the keys of a segment lie one behind the other.
            array(jnp.int32, batch, tp, 2),  # rows
            array(jnp.int32, batch, tp // mask_operands.GROUP, 4),  # groups
        )
        scratch = (
            # Of segments that lie in several parts: two pieces in each part.
            array(jnp.float32, batch, kv_heads, 2, parts, 6, hc),
            array(jnp.int32, batch, kv_heads, 2, 2, parts),  # keys that count, of K and of V
            array(jnp.bfloat16, *by_slot, hc),  # mean of K
            array(jnp.float32, *by_slot, 2),  # size of K; 1 / keys that count
            code_sum(length_kv, hc, 2),
            array(jnp.int32, batch, kv_heads, 2, parts),  # counters of pieces that are done
            array(jnp.int32, batch, kv_heads, 2),  # and of parts
            array(jnp.int32, batch, length_kv, 4),  # runs of a segment's keys in a part
            array(jnp.int32, batch, parts),  # slots of parts of the keys, where all have one
            array(jnp.int32, batch, -(-tp // 256)),  # and of so many queries
        )
    else:
        quantized += (
            # Mean of K; mean of V, the same in bfloat16; scale of V; its inverse.
            array(jnp.float32, batch, kv_heads, 5, hc),  # channels
            first_bad,
            code_sum(hc, 2),  # value_code_sum
        )
        scratch = (
            array(jnp.float32, batch, kv_heads, parts, 6, hc),
            array(jnp.int32, batch, kv_heads, 2),  # counters of parts that are done
        )
    results = jax.ffi.ffi_call("jax_sage_quantize", (*quantized, *scratch))(
        query,
        key,
        value,
        *seen,
        *segments,
        scale_log2=np.float32(scale_log2),
        smooth_k=np.int64(recipe.smooth_k),
        smooth_v=np.int64(recipe.smooth_v),
        some_seen=np.int64(len(seen) > 0),
        skip_unseen=np.int64(skip_unseen),
        segments=np.int64(len(segments) > 0),
        own_segments=np.int64(own_segments),
    )
    return tuple(results[: len(quantized)])


def _parts(length_kv: int, channels: int, units: int) -> int:
    """Of each unit: K or V of a head."""
    most = min(max(_FEW_PARTS, _ENOUGH_PARTS // units), _MANY_PARTS)
    return min(-(-length_kv * channels // _NUMBERS_OF_PART), most)


def _padded(head_dim: int, length_q: int, length_kv: int) -> tuple[int, int, int]:
    """Hp, Tp and Sp."""
    hp = -(-head_dim // 64) * 64
    return hp, -(-length_q // BLOCK_Q) * BLOCK_Q, -(-length_kv // BLOCK_KV) * BLOCK_KV
