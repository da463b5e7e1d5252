"""jax_sage.masking against definitions spelt out for every query and key."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jax_sage import lowering_cuda, mask_operands
from jax_sage.masking import Band, Masks, Segments, View


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def dense(band, length_q, length_kv, q_len=None, kv_len=None):
    """Whether query t is in the band of key s: bool [T, S], by a loop."""
    q_len = length_q if q_len is None else q_len
    kv_len = length_kv if kv_len is None else kv_len
    offset = kv_len - q_len if band.bottom_right else 0
    result = np.zeros((length_q, length_kv), bool)
    for t, s in np.ndindex(length_q, length_kv):
        left = band.left is None or s >= t + offset - band.left
        right = band.right is None or s <= t + offset + band.right
        result[t, s] = left and right and t < q_len and s < kv_len
    return result


LIMITS = [None, 0, 1, 3, 20]
BANDS = [Band(*limits) for limits in itertools.product(LIMITS, LIMITS, [False, True])]
LENGTHS = [(1, 1), (1, 6), (6, 1), (5, 5), (4, 7), (7, 4)]


@pytest.mark.parametrize(("length_q", "length_kv"), LENGTHS)
def test_simplified_bands_are_the_same(length_q, length_kv):
    simplified = 0
    for band in BANDS:
        simple = band.simplified(length_q, length_kv, has_lengths=False)
        expected = dense(band, length_q, length_kv)
        np.testing.assert_array_equal(dense(simple, length_q, length_kv), expected, err_msg=band)
        assert simple == simple.simplified(length_q, length_kv, has_lengths=False)
        if expected.all():  # nothing of it is left
            assert simple == Band()
        simplified += simple != band
        for q_len, kv_len in itertools.product(range(length_q + 1), range(length_kv + 1)):
            simple = band.simplified(length_q, length_kv, has_lengths=True)
            np.testing.assert_array_equal(
                dense(simple, length_q, length_kv, q_len, kv_len),
                dense(band, length_q, length_kv, q_len, kv_len),
            )
    assert simplified


@pytest.mark.parametrize(("length_q", "length_kv"), LENGTHS)
def test_reach_holds_every_key_that_is_seen_and_no_other(length_q, length_kv):
    for band in BANDS:
        first, end = band.reach(length_q, length_kv)
        assert 0 <= first <= end <= length_kv
        seen = dense(band, length_q, length_kv).any(0)
        expected = np.zeros(length_kv, bool)
        expected[first:end] = True
        # Between rows that see nothing there may be none at all.
        np.testing.assert_array_equal(seen & expected, seen, err_msg=band)
        assert not seen.any() or (first, end) == (seen.argmax(), length_kv - seen[::-1].argmax())


def view(masks, band, batch, heads, kv_heads, length_q, length_kv, padded_q):
    return View(
        masks,
        band,
        batch_rank=len(batch),
        kv_heads=kv_heads,
        length_q=length_q,
        length_kv=length_kv,
        padded_q=padded_q,
    )


RNG = np.random.default_rng(0)
SHAPE = {"batch": (2,), "heads": 4, "kv_heads": 2, "length_q": 11, "length_kv": 75, "padded_q": 15}
CASES = {
    "nothing": (Masks(), Band()),
    "causal": (Masks(), Band(right=0)),
    "window": (Masks(), Band(4, 2)),
    "bottom right": (Masks(), Band(30, 1, True)),
    "lengths": (Masks(query_seq_lengths=[11, 6], key_value_seq_lengths=[20, 75]), Band()),
    "no query": (Masks(query_seq_lengths=[0, 6]), Band(right=0)),
    "too long": (Masks(query_seq_lengths=[99, -1], key_value_seq_lengths=[99, 5]), Band()),
    "lengths at the bottom": (
        Masks(query_seq_lengths=[11, 6], key_value_seq_lengths=[20, 70]),
        Band(5, 0, True),
    ),
    "mask": (Masks(mask=RNG.random((2, 4, 11, 75)) < 0.1), Band()),
    "mask of keys": (Masks(mask=RNG.random((2, 1, 1, 75)) < 0.3), Band(right=3)),
    "mask of queries": (Masks(mask=RNG.random((1, 4, 11, 1)) < 0.3), Band()),
    "segments": (
        Masks(
            query_segment_ids=RNG.integers(0, 4, (2, 11)),
            key_value_segment_ids=RNG.integers(1, 5, (2, 75)),
        ),
        Band(20, 20),
    ),
    "segments alone": (
        Masks(
            query_segment_ids=RNG.integers(0, 4, (2, 11)),
            key_value_segment_ids=RNG.integers(1, 5, (1, 75)),
        ),
        Band(),
    ),
    "causal segments": (
        Masks(
            query_segment_ids=RNG.integers(0, 3, (1, 11)),
            key_value_segment_ids=RNG.integers(0, 3, (2, 75)),
        ),
        Band(right=0),
    ),
    "segments and lengths": (
        Masks(
            query_segment_ids=RNG.integers(0, 4, (2, 11)),
            key_value_segment_ids=RNG.integers(1, 5, (2, 75)),
            query_seq_lengths=[11, 6],
            key_value_seq_lengths=[20, 70],
        ),
        Band(7, 3, True),
    ),
    "segments in which nothing is seen": (
        Masks(
            query_segment_ids=RNG.integers(0, 4, (2, 11)),
            key_value_segment_ids=RNG.integers(1, 5, (2, 75)),
            query_seq_lengths=[0, 6],
            key_value_seq_lengths=[20, 0],
        ),
        Band(left=2),
    ),
    "bias": (
        Masks(bias=RNG.choice([0.0, -3.0, 5.0, -np.inf, -1e9, -1e6, np.inf], (1, 4, 11, 75))),
        Band(),
    ),
}


def expected_of(masks, band):
    q_len, kv_len = masks.query_seq_lengths, masks.key_value_seq_lengths
    dense_band = np.stack(
        [
            dense(
                band,
                11,
                75,
                None if q_len is None else min(max(q_len[b], 0), 11),
                None if kv_len is None else min(max(kv_len[b], 0), 75),
            )
            for b in range(2)
        ]
    )[:, None]
    others = {k: v for k, v in masks._asdict().items() if v is not None and "lengths" not in k}
    return dense_band & reference.what_is_seen((2,), 4, 11, 75, **others)


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_a_view(name):
    """Every block, of sizes that divide nothing; beyond the last query nothing is seen."""
    masks, band = CASES[name]
    expected = expected_of(masks, band)
    arrays = Masks(*(None if x is None else jnp.asarray(x) for x in masks))
    v = view(arrays, band, **SHAPE)
    whole = np.zeros((2, 4, 15, 128), bool)
    biases = np.zeros(whole.shape)
    for row, column in itertools.product(range(0, 15, 5), range(0, 128, 64)):
        visible, bias = v.block(jnp.int32(row), 5, jnp.int32(column), 64)
        place = np.s_[..., row : row + 5, column : column + 64]
        whole[place] = np.broadcast_to(visible, (2, 2, 2, 5, 64)).reshape(2, 4, 5, 64)
        if bias is not None:
            biases[place] = np.broadcast_to(bias, (2, 2, 2, 5, 64)).reshape(2, 4, 5, 64)
        # Blocks that are left out by first and end hold nothing.
        first, end = v.rows(jnp.int32(row), 5)
        if not int(first.min()) // 64 <= column // 64 < -(-int(end.max()) // 64):
            assert not whole[place].any()
    np.testing.assert_array_equal(whole[..., :11, :75], expected)
    assert not whole[..., 11:, :].any()
    assert not whole[..., 75:].any()
    if masks.bias is not None:
        bias = np.broadcast_to(masks.bias, (2, 4, 11, 75)) * np.log2(np.e)
        np.testing.assert_allclose(biases[..., :11, :75][expected], bias[expected], rtol=1e-6)
    assert v.sees_everything() == (name == "nothing")


@pytest.mark.parametrize("elements", [1, 1 << 24])
@pytest.mark.parametrize("name", CASES)
def test_seen_keys(name, elements, monkeypatch):
    """In one step, and query by query."""
    monkeypatch.setattr("jax_sage.masking._ELEMENTS_PER_STEP", elements)
    masks, band = CASES[name]
    expected = expected_of(masks, band).reshape(2, 2, 2, 11, 75).any((2, 3))
    arrays = Masks(*(None if x is None else jnp.asarray(x) for x in masks))
    seen = view(arrays, band, **SHAPE).seen_keys()
    np.testing.assert_array_equal(np.broadcast_to(seen, expected.shape), expected)


def test_segments_point_to_the_last_of_their_sorted_keys():
    key_ids = np.array([[5, -1, 5, 2, 2, 5], [9, 9, 9, 9, 9, 9]])
    query_ids = np.array([[2, 5, -1, 7], [9, 1, 10, 9]])
    x = Segments.find(jnp.asarray(query_ids), jnp.asarray(key_ids))
    np.testing.assert_array_equal(x.order[0], [1, 3, 4, 0, 2, 5])
    np.testing.assert_array_equal(x.ids[0], [-1, 2, 2, 5, 5, 5])
    np.testing.assert_array_equal(x.key_index, [[5, 0, 5, 2, 2, 5], [5] * 6])
    np.testing.assert_array_equal(x.query_index[0, :3], [2, 5, 0])  # no key has 7
    np.testing.assert_array_equal(x.query_index[1, [0, 3]], [5, 5])


@pytest.mark.parametrize("length", [1, 2, 3, 33, 64, 65])
def test_tables_of_segments(length):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (2, length)).astype(np.int32)
    values = rng.integers(-9, 9, (2, 3, length, 4)).astype(np.float32)
    x = Segments.find(jnp.asarray(ids[:, :1]), jnp.asarray(ids))
    total, largest = x.table(jnp.asarray(values), jnp.add), x.table(values, jnp.maximum)
    for b, s in np.ndindex(2, length):
        own = values[b][:, ids[b] == ids[b, s]]
        place = x.key_index[b, s]
        np.testing.assert_array_equal(total[b, :, place], own.sum(1))
        np.testing.assert_array_equal(largest[b, :, place], own.max(1))


# What the kernels rest on where queries see intervals of keys. Keys of a part are a multiple of the
# first, by head dimension (kTokens in cuda/quantize), tiles are of the others.
CHUNKS_AND_TILES = {64: (128, (64, 128)), 128: (64, (64,)), 256: (64, (64,))}


@pytest.mark.parametrize("seed", range(16))
def test_tiles_that_somebody_sees_lie_in_parts_that_have_codes(seed):
    """Parts that nobody sees get none: no item of queries may have a tile of one."""
    rng = np.random.default_rng(seed)
    length_q, length_kv = map(int, rng.integers(1, 1500, 2))
    limits = [None, 0, 5, 64, 300, 1000]
    band = Band(*(limits[i] for i in rng.integers(len(limits), size=2)), bool(rng.integers(2)))
    lengths = rng.integers(0, [length_q + 1, length_kv + 1], (2, 2)).astype(np.int32)
    masks = Masks(
        query_seq_lengths=lengths[:, 0] if rng.integers(2) else None,
        key_value_seq_lengths=lengths[:, 1] if rng.integers(2) else None,
    )
    padded_q = mask_operands.round_up(length_q, 128)
    view = View(
        masks,
        band,
        batch_rank=1,
        kv_heads=1,
        length_q=length_q,
        length_kv=length_kv,
        padded_q=padded_q,
    )
    visible, _ = view.block(jnp.int32(0), padded_q, jnp.int32(0), length_kv)
    seen = np.broadcast_to(visible, (2, *visible.shape[1:])).any((1, 2, 3))  # [B, S]
    first, end = view.seen_interval()
    np.testing.assert_array_equal(np.maximum(end - first, 0).ravel(), seen.sum(-1)[: len(first)])

    # The least first key and the greatest end of 64 queries.
    firsts, ends = (
        np.asarray(x).reshape(-1, padded_q // mask_operands.GROUP, mask_operands.GROUP)
        for x in (view.first, view.end)
    )
    groups = np.stack([firsts.min(-1), ends.max(-1)], axis=-1)
    looked_at = 0
    for head_dim, (chunk, tiles) in CHUNKS_AND_TILES.items():
        parts = lowering_cuda._parts(length_kv, head_dim, 4)
        keys_of_part = mask_operands.round_up(math.ceil(length_kv / parts), chunk)
        for tile, size, batch in itertools.product(tiles, (1, 2, 3, 4), range(len(groups))):
            assert keys_of_part % tile == 0
            of_batch = groups[batch][: math.ceil(length_q / 64)]
            for i in range(0, len(of_batch), size):  # an item
                item = of_batch[i : i + size]
                begin, until = item[:, 0].min(), item[:, 1].max()
                if begin >= until:
                    continue
                for start in range(begin // tile * tile, until, tile):
                    part = start // keys_of_part * keys_of_part
                    assert seen[batch, part : part + keys_of_part].any()
                    looked_at += 1
    assert looked_at or not seen.any()
