"""What a query sees: bias, mask, lengths, segments, and the band of causal and local attention.

A query sees a key if everything that is given lets it: the key lies in its interval (lengths and
band), the mask is True there, both are of one segment, and the bias does not hide the key.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A bias (times log2(e)) from here down hides its key, as -inf does: masks are often added as the
# lowest finite number, or -1e9. Scores of such keys would all be equal in FP32.
HIDING_BIAS = -(2.0**23)

_f32 = np.float32
_LOG2_E = _f32(math.log2(math.e))
# Booleans of one step of the loop that finds the keys seen by any query.
_ELEMENTS_PER_STEP = 1 << 24


class Masks(NamedTuple):
    """Arrays that say what is seen; None if not given. Any dimension may be 1 for all alike."""

    bias: jax.Array | None = None  # [*B, N, T, S], floating point, added to the scaled scores
    mask: jax.Array | None = None  # [*B, N, T, S], bool, True: seen
    query_seq_lengths: jax.Array | None = None  # int32 [*B]
    key_value_seq_lengths: jax.Array | None = None  # int32 [*B]
    query_segment_ids: jax.Array | None = None  # int32 [*B, T]
    key_value_segment_ids: jax.Array | None = None  # int32 [*B, S]; None: those of the queries

    def key_segment_ids(self) -> jax.Array | None:
        if self.key_value_segment_ids is None:
            return self.query_segment_ids
        return self.key_value_segment_ids

    def given(self) -> tuple[str, ...]:
        return tuple(name for name, array in self._asdict().items() if array is not None)

    def arrays(self) -> tuple[jax.Array, ...]:
        return tuple(array for array in self if array is not None)


@dataclasses.dataclass(frozen=True)
class Band:
    """Query t sees the keys t + offset - left to t + offset + right. None: no limit.

    The offset is 0, or with ``bottom_right`` the number of keys less that of queries, so that the
    last query is aligned with the last key (by the lengths of the batch entry where these are
    given).
    """

    left: int | None = None
    right: int | None = None
    bottom_right: bool = False

    def simplified(self, length_q: int, length_kv: int, *, has_lengths: bool) -> "Band":
        """The same band without limits that these lengths never reach."""
        left, right = self.left, self.right
        if has_lengths:
            # Offsets are not known, but lie between -T and S.
            farthest_left, farthest_right = length_q + length_kv, length_q + length_kv
        else:
            offset = length_kv - length_q if self.bottom_right else 0
            farthest_left, farthest_right = length_q - 1 + offset, length_kv - 1 - offset
        if left is not None and left >= farthest_left:
            left = None
        if right is not None and right >= farthest_right:
            right = None
        aligned = length_q == length_kv and not has_lengths
        unlimited = left is None and right is None
        return Band(left, right, self.bottom_right and not (aligned or unlimited))

    def reach(self, length_q: int, length_kv: int) -> tuple[int, int]:
        """The keys [first, end) that lie in any query's band; without lengths."""
        offset = length_kv - length_q if self.bottom_right else 0
        first = 0 if self.left is None else offset - self.left
        end = length_kv if self.right is None else length_q + offset + self.right
        first = min(max(first, 0), length_kv)
        return first, min(max(end, first), length_kv)


class View:
    """What the queries of one call see, by blocks of queries and keys.

    ``first`` and ``end``, int32 [*B, padded_q] or with ones: query t sees keys of first[t] to
    end[t] - 1 only. Queries that see nothing have first = S and end = 0.
    """

    def __init__(
        self,
        masks: Masks,
        band: Band,
        *,
        batch_rank: int,
        kv_heads: int,
        length_q: int,
        length_kv: int,
        padded_q: int,  # queries beyond length_q see nothing
    ):
        self.band, self.length_q, self.length_kv, self.padded_q = (
            band,
            length_q,
            length_kv,
            padded_q,
        )
        self.bias = _by_group(masks.bias, kv_heads)  # [*B, K, G, T, S]
        self.mask = _by_group(masks.mask, kv_heads)
        self.query_segments = masks.query_segment_ids
        self.key_segments = masks.key_segment_ids()
        self.own_segments = masks.key_value_segment_ids is None
        self.has_lengths = not (
            masks.query_seq_lengths is None and masks.key_value_seq_lengths is None
        )

        def length(given: jax.Array | None, whole: int) -> jax.Array:  # [*B, 1]
            if given is None:
                return jnp.full((1,) * (batch_rank + 1), whole, jnp.int32)
            return jnp.clip(given, 0, whole)[..., None]

        q_len = length(masks.query_seq_lengths, length_q)
        kv_len = length(masks.key_value_seq_lengths, length_kv)
        self.q_len, self.kv_len = q_len, kv_len  # [*B, 1], or with ones
        self.first, self.end = self._intervals(jnp, q_len, kv_len)
        self.batch_rank = batch_rank

    def _intervals(self, xp: ModuleType, q_len: Any, kv_len: Any) -> tuple[Any, Any]:
        """first and end, in the arrays of a module."""
        rows = xp.arange(self.padded_q, dtype=np.int32)
        aligned = rows + (kv_len - q_len) if self.band.bottom_right else rows
        first, end = xp.zeros_like(kv_len + rows), xp.broadcast_to(kv_len, (kv_len + rows).shape)
        if self.band.left is not None:
            first = xp.maximum(first, aligned - np.int32(self.band.left))
        if self.band.right is not None:
            end = xp.minimum(end, aligned + np.int32(self.band.right + 1))
        some = (rows < q_len) & (first < end)
        return xp.where(some, first, np.int32(self.length_kv)), xp.where(some, end, np.int32(0))

    def known_intervals(self) -> tuple[np.ndarray, np.ndarray] | None:
        """first and end, [1, ..., padded_q] each, where no array decides them."""
        if self.has_lengths:
            return None
        shape = (1,) * (self.batch_rank + 1)
        q_len, kv_len = (np.full(shape, x, np.int32) for x in (self.length_q, self.length_kv))
        return self._intervals(np, q_len, kv_len)

    def rows(self, row: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """first and end of `count` queries from `row` on: [*B, count] each."""
        first = lax.dynamic_slice_in_dim(self.first, row, count, axis=-1)
        return first, lax.dynamic_slice_in_dim(self.end, row, count, axis=-1)

    def block(
        self, row: jax.Array, rows: int, column: jax.Array, columns: int
    ) -> tuple[jax.Array, jax.Array | None]:
        """Whether each of these queries sees each of these keys, and the bias times log2(e).

        Both are [*B, K, G, rows, columns], with ones where all are alike.
        """
        first, end = (x[..., None, None, :, None] for x in self.rows(row, rows))
        keys = column + jnp.arange(columns, dtype=jnp.int32)
        visible = (first <= keys) & (keys < end)
        if self.mask is not None:
            visible &= _part(_part(self.mask, row, rows, -2), column, columns, -1)
        if self.query_segments is not None and self.key_segments is not None:
            query = _part(self.query_segments, row, rows, -1)[..., None, None, :, None]
            key = _part(self.key_segments, column, columns, -1)[..., None, None, None, :]
            visible &= query == key
        if self.bias is None:
            return visible, None
        bias = _part(_part(self.bias, row, rows, -2), column, columns, -1)
        return visible & ~_hides(bias), bias.astype(jnp.float32) * _LOG2_E

    def sees_everything(self) -> bool:
        """Whether that is known without looking at any array."""
        arrays = (self.mask, self.bias, self.query_segments)
        return (
            all(x is None for x in arrays)
            and not self.has_lengths
            and self.band.reach(self.length_q, self.length_kv) == (0, self.length_kv)
        )

    def sees_all_keys(self) -> bool:
        """Whether each key is known to be seen by some query, without looking at any array."""
        if self.mask is not None or self.bias is not None or self.has_lengths:
            return False
        if self.query_segments is None:
            return self.sees_everything()
        # By its own query at least, which no band keeps from it.
        return self.own_segments

    def is_unlimited(self) -> bool:
        """Whether no query is kept from any key by its position."""
        return self.band == Band() and not self.has_lengths

    def seen_interval(self) -> tuple[jax.Array, jax.Array]:
        """The keys [first, end) that lie in any query's interval, [*B, 1] each: empty if none.

        Neighbouring queries have neighbouring intervals: together they are one interval.
        """
        return self.first.min(-1, keepdims=True), self.end.max(-1, keepdims=True)

    def seen_keys(self) -> jax.Array:
        """Whether a key is seen by any query of its key/value head: [*B, K, S] or with ones."""
        if self.mask is None and self.bias is None and self.query_segments is None:
            first, end = self.seen_interval()
            keys = jnp.arange(self.length_kv, dtype=jnp.int32)
            return ((first <= keys) & (keys < end))[..., None, :]
        if self.query_segments is None and self.is_unlimited():
            # One reduction, into which XLA fuses what it reads: nothing of size T·S is made.
            visible = jnp.ones((1,) * 5, bool) if self.mask is None else self.mask
            if self.bias is not None:
                visible = visible & ~_hides(self.bias)
            visible = visible.any((-3, -2))
            return jnp.broadcast_to(visible, (*visible.shape[:-1], self.length_kv))
        if self.mask is None and self.bias is None:
            if self.sees_all_keys():
                return jnp.ones((*(1 for _ in self.kv_len.shape), self.length_kv), bool)
            return self._seen_in_segments()[..., None, :]
        zero = jnp.int32(0)
        shape = jax.eval_shape(lambda: self.block(zero, 1, zero, self.length_kv)[0])
        rows = max(1, min(self.padded_q, _ELEMENTS_PER_STEP // max(1, math.prod(shape.shape))))
        steps = -(-self.padded_q // rows)

        def body(i: jax.Array, seen: jax.Array) -> jax.Array:
            # The last block may begin earlier: to see a query twice does not matter.
            row = jnp.minimum(i * np.int32(rows), np.int32(self.padded_q - rows))
            visible, _ = self.block(row, rows, zero, self.length_kv)
            return seen | visible.any((-3, -2))

        *batch, kv_heads, _, _, _ = shape.shape
        nothing = jnp.zeros((*batch, kv_heads, self.length_kv), bool)
        return lax.fori_loop(np.int32(0), np.int32(steps), body, nothing)

    def _seen_in_segments(self) -> jax.Array:
        """seen_keys of segments and intervals alone, [*B, S]: without a look at every pair.

        The queries whose interval holds a key are neighbours. Is one of them of its segment? By a
        binary search among the queries sorted by id and position.
        """
        assert self.query_segments is not None and self.key_segments is not None
        shape = (*(1 for _ in self.kv_len.shape[1:]), self.length_kv)
        keys = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        aligned = keys - (self.kv_len - self.q_len) if self.band.bottom_right else keys
        first, end = jnp.zeros_like(keys), self.q_len
        if self.band.right is not None:
            first = jnp.maximum(aligned - np.int32(self.band.right), 0)
        if self.band.left is not None:
            end = jnp.minimum(aligned + np.int32(self.band.left + 1), end)
        query_ids = self.query_segments
        query_ids = jnp.broadcast_to(query_ids, (*query_ids.shape[:-1], self.length_q))
        ids, positions = sort_ids(query_ids)
        wanted = self.key_segments
        batch = np.broadcast_shapes(*(x.shape[:-1] for x in (ids, wanted, first, end, self.kv_len)))
        ids, positions = (jnp.broadcast_to(x, (*batch, self.length_q)) for x in (ids, positions))
        wanted, first, end = (
            jnp.broadcast_to(x, (*batch, self.length_kv)) for x in (wanted, first, end)
        )
        # How many queries are before the first that would do.
        before = jnp.zeros_like(first)
        for bit in reversed(range(self.length_q.bit_length())):
            place = jnp.minimum(before + np.int32((1 << bit) - 1), np.int32(self.length_q - 1))
            id_there, position = (jnp.take_along_axis(x, place, axis=-1) for x in (ids, positions))
            less = (id_there < wanted) | ((id_there == wanted) & (position < first))
            fits = before <= np.int32(self.length_q - (1 << bit))
            before = jnp.where(less & fits, before + np.int32(1 << bit), before)
        place = jnp.minimum(before, np.int32(self.length_q - 1))
        id_there, position = (jnp.take_along_axis(x, place, axis=-1) for x in (ids, positions))
        # Where there is no such query, the last is before the first that would do.
        return (id_there == wanted) & (first <= position) & (position < end) & (keys < self.kv_len)


def _hides(bias: jax.Array) -> jax.Array:
    return bias.astype(jnp.float32) * _LOG2_E <= _f32(HIDING_BIAS)  # NaN is seen


def _by_group(array: jax.Array | None, kv_heads: int) -> jax.Array | None:
    """[*B, N, T, S] -> [*B, K, G, T, S]; heads may be 1."""
    if array is None:
        return None
    *batch, heads, rows, columns = array.shape
    split = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return array.reshape(*batch, *split, rows, columns)


def _part(array: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """`size` elements from `start` on; beyond the end anything; a dimension of 1 as it is."""
    length = array.shape[axis]
    if length == 1:
        return array
    if length < size:
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, size - length)
        return jnp.pad(array, padding)
    # dynamic_slice moves a slice that would leave the array; it is moved back.
    begin = jnp.minimum(start, np.int32(length - size))
    part = lax.dynamic_slice_in_dim(array, begin, size, axis)
    return part if length % size == 0 else jnp.roll(part, begin - start, axis)


def sort_ids(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ids of tokens [..., tokens], sorted; and which tokens they are, in order where equal."""
    tokens = lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    sorted_ids, order = lax.sort((ids, tokens), is_stable=True, num_keys=1)
    return sorted_ids, order


class Segments(NamedTuple):
    """Keys put together by segment id, for statistics of each segment.

    A table of a scan over the sorted keys has, at the last key of each segment, the result of that
    segment. The indices point there.
    """

    order: jax.Array  # int32 [*B, S], keys sorted by id
    ids: jax.Array  # int32 [*B, S], their ids
    number: jax.Array  # int32 [*B, S], of a key among those of its segment
    key_index: jax.Array  # int32 [*B, S], where in the table a key's segment is
    query_index: jax.Array  # int32 [*B, T], the same; anything if no key has the id

    @classmethod
    def find(cls, query_ids: jax.Array, key_ids: jax.Array) -> "Segments":
        """From ids [*B, T] and [*B, S], or with ones."""
        batch = np.broadcast_shapes(query_ids.shape[:-1], key_ids.shape[:-1])
        query_ids, key_ids = (
            jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (query_ids, key_ids)
        )
        ids, order = sort_ids(key_ids)

        def search(wanted: jax.Array, side: str) -> jax.Array:
            find = functools.partial(jnp.searchsorted, side=side)
            for _ in range(ids.ndim - 1):
                find = jax.vmap(find)
            return find(ids, wanted).astype(jnp.int32)

        def last(wanted: jax.Array) -> jax.Array:
            return jnp.maximum(search(wanted, "right") - 1, 0)

        number = jnp.argsort(order, axis=-1).astype(jnp.int32) - search(key_ids, "left")
        return cls(order, ids, number, last(key_ids), last(query_ids))

    def table(
        self, x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        """`combine` over the keys of each segment, of x [*B, K, S, C].

        Step i combines each sorted key with the one 2^i before it, which stands for the 2^i keys up
        to there. The order is always the same, unlike that of a scatter, and so are its sums.
        """
        x = jnp.take_along_axis(x, self.order[..., None, :, None], axis=-2)
        place = jnp.arange(self.ids.shape[-1], dtype=jnp.int32)

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            distance = jnp.left_shift(np.int32(1), i)
            same = (jnp.roll(self.ids, distance, -1) == self.ids) & (place >= distance)
            return jnp.where(same[..., None, :, None], combine(x, jnp.roll(x, distance, -2)), x)

        steps = (place.size - 1).bit_length()
        return lax.fori_loop(np.int32(0), np.int32(steps), step, x)
