"""Masks as the kernels take them: arrays of the custom call, made on the device.

Nothing here is of size T·S but a boolean mask, a bit an element, and the bias as it was given.
Layouts (also checked by the C++ handlers), with Tp the queries padded as in
lowering_cuda.py, Sp the keys padded to TILE, and a 1 for every dimension that is alike for all:

rows    int32 [B, Tp, 2]: the first key that a query may see, and the one behind the last
groups  int32 [B, Tp/64, 4], of 64 queries: least first, greatest end, greatest first, least end
words   uint32 [B, N, Sp/128, Tp, 4]: bit 8(2h + e) + 7 - i of element j: key 16i + 8h + 2j + e
views   uint8 [B, N, Tp/64, Sp/128]: whether 64 queries see none (0), all (1) or some (5) of 128
ids     int32 [B, Tp] and [B, Sp], and the least and greatest of 64 queries and of 128 keys
bias    as given; keys padded to Sp, or two columns that stand for all
and with segments, behind all others:
scattered  int32 [B]: 1 where the keys of some segment do not lie one behind the other
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_sage.masking import Masks, View, sort_ids

GROUP = 64  # queries that are planned together
TILE = 128  # keys that are planned together
# Queries whose intervals may be constants of a program, 8 bytes each: at more, what it takes to
# make them is no longer seen.
_MOST_CONSTANTS = 16384
# Ids of a batch entry that a kernel sorts, in shared memory. XLA sorts more; of a few thousand that
# would take 30 us.
MOST_SORTED = 8192


class MaskOperands(NamedTuple):
    arrays: tuple[jax.Array, ...]  # without those of the quantized operands
    attributes: dict[str, np.int64]
    # Where intervals say all that queries see and are no constants, else None: which keys are
    # seen, uint8 [B or 1, 1, S], and 1 / how many, [B, K].
    seen: tuple[jax.Array, jax.Array] | None
    segments: "Segments | None"


class Segments(NamedTuple):
    """Ids of the queries, [B, Tp]; of the keys, sorted, [B, S]; and whose they are.

    Equal ids are in the order of the keys, and so are the sums of a segment.
    """

    query_ids: jax.Array
    sorted_ids: jax.Array
    order: jax.Array
    key_slots: jax.Array  # [B, S, 2], where a key's segment begins and ends among the sorted keys
    scattered: jax.Array  # [B], 1 where the keys of some segment do not lie one behind the other


def make(
    view: View, masks: Masks, batch: Sequence[int], key: jax.Array, value: jax.Array
) -> MaskOperands:
    """`view` is of Tp queries; `key` and `value` are [*B, S, K, H]."""
    are_intervals = masks.mask is None and masks.bias is None and masks.query_segment_ids is None
    seen = None
    known = view.known_intervals() if view.padded_q <= _MOST_CONSTANTS else None
    if known is not None and (view.sees_everything() or not are_intervals):
        rows, groups = _constant_intervals(view, known)
    else:
        rows, groups, keys, per_key = _intervals(view, masks, batch, key.shape[-2])
        if are_intervals:
            seen = keys, per_key
    arrays = [rows, groups, key, value]
    if masks.mask is not None:
        arrays += _mask(flat_batch(masks.mask, batch), view.padded_q, key.shape[-3])
    segments = None
    if masks.query_segment_ids is not None:
        segments, of_segments = sort_segments(masks, batch, view.padded_q, key.shape[-3])
        arrays += of_segments
    if masks.bias is not None:
        arrays.append(_bias(flat_batch(masks.bias, batch), key.shape[-3]))
    return MaskOperands(
        tuple(arrays),
        {
            "masked": np.int64(1),
            "mask": np.int64(masks.mask is not None),
            "segments": np.int64(masks.query_segment_ids is not None),
            "bias": np.int64(masks.bias is not None),
        },
        seen,
        segments,
    )


def seen_keys(
    view: View, masks: Masks, rows: jax.Array, batch: Sequence[int], kv_heads: int
) -> jax.Array:
    """View.seen_keys as uint8 [B, K, S] or with ones. ``rows``: of the operands."""
    arrays = [flat_batch(x, batch) for x in (masks.mask, masks.bias) if x is not None]
    is_large = any(x.shape[2] > 1 and x.shape[3] > 1 for x in arrays)
    if masks.query_segment_ids is not None or not is_large:
        return flat_batch(view.seen_keys(), batch).astype(jnp.uint8)
    # Of a large array the kernel reads what it takes to find each key seen, mostly a few rows.
    per_head = any(x.shape[1] > 1 for x in arrays)
    seen = jax.ShapeDtypeStruct(
        (max(x.shape[0] for x in (rows, *arrays)), kv_heads if per_head else 1, view.length_kv),
        jnp.uint8,
    )
    return jax.ffi.ffi_call("jax_sage_seen_keys", seen)(
        rows,
        *arrays,
        length_q=np.int64(view.length_q),
        mask=np.int64(masks.mask is not None),
        bias=np.int64(masks.bias is not None),
    )


def sort_segments(
    masks: Masks, batch: Sequence[int], padded_q: int, length_kv: int
) -> tuple[Segments, list[jax.Array]]:
    """And the operands of the attention."""
    key_ids = masks.key_segment_ids()
    assert masks.query_segment_ids is not None and key_ids is not None
    query = _pad_by_last(flat_batch(masks.query_segment_ids, batch), padded_q)
    ids = flat_batch(key_ids, batch)
    ids = jnp.broadcast_to(ids, (ids.shape[0], length_kv))
    *in_order, query_ranges, key_ranges = sort_by_kernel(ids)
    if masks.key_value_segment_ids is not None:
        query_ranges = _ranges(query, GROUP)
    padded = _pad_by_last(ids, round_up(length_kv, TILE))
    return Segments(query, *in_order), [query, padded, query_ranges, key_ranges]


def sort_by_kernel(ids: jax.Array) -> Sequence[jax.Array]:
    """What Segments has of ids [B, S], by a kernel where they are not too many; and ranges.

    Ranges are the least and greatest of GROUP ids and of TILE, padded by the last.
    """
    size = round_up(ids.shape[1], TILE)
    if ids.shape[1] > MOST_SORTED:
        sorted_ids, order = sort_ids(ids)
        is_alike = sorted_ids[:, 1:] == sorted_ids[:, :-1]
        is_apart = order[:, 1:] != order[:, :-1] + np.int32(1)
        scattered = (is_alike & is_apart).any(-1).astype(jnp.int32)
        ends = [jax.vmap(functools.partial(jnp.searchsorted, side=s)) for s in ("left", "right")]
        slots = jnp.stack([find(sorted_ids, ids) for find in ends], -1).astype(jnp.int32)
        padded = _pad_by_last(ids, size)
        return sorted_ids, order, slots, scattered, _ranges(padded, GROUP), _ranges(padded, TILE)

    def result(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ids.shape[0], *shape), jnp.int32)

    of_ids = result(ids.shape[1])
    ranges = (result(size // GROUP, 2), result(size // TILE, 2))
    results = (of_ids, of_ids, result(ids.shape[1], 2), result(), *ranges)
    return jax.ffi.ffi_call("jax_sage_sort_ids", results)(ids)


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def flat_batch(x: jax.Array, batch: Sequence[int]) -> jax.Array:
    """[*B, ...] -> [B, ...], with ones for dimensions that are alike; all of them, or none."""
    lead, rest = x.shape[: len(batch)], x.shape[len(batch) :]
    if all(d == 1 for d in lead):
        return x.reshape(1, *rest)
    return jnp.broadcast_to(x, (*batch, *rest)).reshape(math.prod(batch), *rest)


def _constant_intervals(
    view: View, known: tuple[np.ndarray, np.ndarray]
) -> tuple[jax.Array, jax.Array]:
    """rows and groups that no array decides: constants of the program, which take no launch."""
    first, end = (x.reshape(1, -1) for x in known)
    by_group = (1, view.padded_q // GROUP, GROUP)
    firsts, ends = first.reshape(by_group), end.reshape(by_group)
    # Queries that are padding have no outputs, and do not keep others from seeing all of a tile.
    real = (np.arange(view.padded_q) < view.length_q).reshape(by_group[1:])
    latest = np.where(real, firsts, np.int32(0)).max(-1)
    earliest = np.where(real, ends, np.int32(view.length_kv)).min(-1)
    groups = np.stack([firsts.min(-1), ends.max(-1), latest, earliest], axis=-1)
    return jnp.asarray(np.stack([first, end], axis=-1)), jnp.asarray(groups)


def _intervals(
    view: View, masks: Masks, batch: Sequence[int], kv_heads: int
) -> Sequence[jax.Array]:
    """rows, groups, which keys are seen, and 1 / how many, by a kernel: six launches otherwise."""
    lengths = {
        "query_lengths": masks.query_seq_lengths,
        "key_lengths": masks.key_value_seq_lengths,
    }
    given = [flat_batch(x, batch) for x in lengths.values() if x is not None]
    size = max((x.shape[0] for x in given), default=1)
    band = view.band
    return jax.ffi.ffi_call(
        "jax_sage_intervals",
        (
            jax.ShapeDtypeStruct((size, view.padded_q, 2), jnp.int32),
            jax.ShapeDtypeStruct((size, view.padded_q // GROUP, 4), jnp.int32),
            jax.ShapeDtypeStruct((size, 1, view.length_kv), jnp.uint8),
            jax.ShapeDtypeStruct((math.prod(batch), kv_heads), jnp.float32),
        ),
    )(
        *(jnp.broadcast_to(x, size) for x in given),
        length_q=np.int64(view.length_q),
        left=np.int64(-1 if band.left is None else band.left),
        right=np.int64(-1 if band.right is None else band.right),
        bottom_right=np.int64(band.bottom_right),
        **{name: np.int64(x is not None) for name, x in lengths.items()},
    )


def _mask(mask: jax.Array, padded_q: int, length_kv: int) -> list[jax.Array]:
    """words and views of a mask [B, N, T, S], any of which may be 1."""
    if mask.shape[3] == 1 and length_kv > 1:  # one tile stands for all
        length_kv = TILE
        mask = jnp.broadcast_to(mask, (*mask.shape[:3], length_kv))
    tiles = round_up(length_kv, TILE) // TILE
    rows = 1 if mask.shape[2] == 1 else padded_q
    results = (
        jax.ShapeDtypeStruct((*mask.shape[:2], tiles, rows, 4), jnp.uint32),
        jax.ShapeDtypeStruct((*mask.shape[:2], -(-rows // GROUP), tiles), jnp.uint8),
    )
    return list(jax.ffi.ffi_call("jax_sage_pack_mask", results)(mask))


def _pad_by_last(ids: jax.Array, size: int) -> jax.Array:
    return jnp.pad(ids, [(0, 0), (0, size - ids.shape[-1])], mode="edge")


def _ranges(ids: jax.Array, size: int) -> jax.Array:
    """Least and greatest by one reduction: two are as many launches."""
    ids = ids.reshape(ids.shape[0], -1, size)
    return jnp.stack([ids, ~ids], axis=-1).min(-2) ^ np.array([0, -1], np.int32)


def _bias(bias: jax.Array, length_kv: int) -> jax.Array:
    if bias.shape[-1] == 1 and length_kv > 1:
        return jnp.broadcast_to(bias, (*bias.shape[:-1], 2))
    return jnp.pad(bias, [(0, 0)] * 3 + [(0, -length_kv % TILE)])
