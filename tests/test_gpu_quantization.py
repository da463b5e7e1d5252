"""Quantization on an NVIDIA GPU: codes and scales are those of portable JAX, to the bit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu_support import (
    EACH_RECIPE,
    EMULATED,
    inputs,
    jitted,
    on_cpu,
    scale_log2,
    skip_without_kernel,
)
from suite import NAMED

from jax_sage import lowering_cuda, mask_operands, portable, quantization
from jax_sage.mask_operands import MOST_SORTED
from jax_sage.masking import Band, Masks, Segments, View
from jax_sage.recipe import BLOCK_KV, RECIPES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]


def permuted(key: int) -> int:
    """Where FP8 V has this key: position 4t + 2h + e of 16 holds key 8h + 2t + e."""
    h, t, e = key % 16 // 8, key % 8 // 2, key % 2
    return key // 16 * 16 + 4 * t + 2 * h + e


def kernel_codes(q, k, v, recipe, seen=None):
    """The quantized operands in the layout of quantization.Quantized, plus the channel means."""
    length_q, head_dim = q.shape[-3], q.shape[-1]
    batch, length_kv, kv_heads, _ = k.shape
    operands = ()
    if seen is not None:
        count = np.broadcast_to(seen, (batch, kv_heads, length_kv)).sum(-1, dtype=np.float32)
        operands = seen.astype(np.uint8), np.float32(1) / np.maximum(count, np.float32(1))
    run = jax.jit(
        functools.partial(lowering_cuda.quantize, scale_log2=scale_log2(q), recipe=recipe)
    )
    names = "q q_scale q_dot_mean k k_scale v channels first_bad value_code_sum".split()
    raw = dict(zip(names, map(np.asarray, run(q, k, v, seen=operands)), strict=True))
    values = raw["v"].astype(np.float32)
    if recipe.pv == "fp8":
        positions = [permuted(key) for key in range(values.shape[-1])]
        values = np.swapaxes(values[..., positions], -1, -2)
    # Padding is zero.
    for codes, length in ((raw["q"], length_q), (raw["k"], length_kv), (values, length_kv)):
        assert not codes[..., length:, :].any()
        assert not codes[..., head_dim:].any()
    padded_kv = -(-length_kv // BLOCK_KV) * BLOCK_KV
    assert raw["k"].shape[-2] == values.shape[-2] == padded_kv
    k_mean, v_average, v_mean, v_scale, _ = np.moveaxis(raw["channels"][..., :head_dim], -2, 0)
    low, high = np.moveaxis(raw["value_code_sum"][..., :head_dim, :].astype(np.uint64), -1, 0)
    return {
        "q": raw["q"][..., :length_q, :head_dim],
        "q_scale": raw["q_scale"][..., :length_q],
        "q_dot_mean": raw["q_dot_mean"][..., :length_q],
        "k": raw["k"][..., :head_dim],
        "k_scale": raw["k_scale"],
        "v": values[..., :head_dim],
        "v_scale": v_scale,
        "k_mean": k_mean,
        "v_average": v_average,
        "v_mean": v_mean,
        "first_bad_k": raw["first_bad"][..., 0, 0],
        "first_bad": raw["first_bad"][..., 1, :head_dim],
        "code_sum": (low | high << np.uint64(32)).astype(np.int64) * 2.0**-24,
    }


def portable_codes(q, k, v, recipe, seen=None):
    def codes(q, k, v, seen):
        return quantization.quantize(q, k, v, scale_log2=scale_log2(q), recipe=recipe, seen=seen)

    batch, length_kv, kv_heads, _ = k.shape
    counted = np.broadcast_to(True if seen is None else seen, (batch, kv_heads, length_kv))
    expected = on_cpu(jax.jit(codes), q, k, v, None if seen is None else counted)
    result = {name: np.asarray(x) for name, x in expected._asdict().items()}
    result["v"] = result["v"].astype(np.float32)
    result["v_scale"], result["v_offset"] = (result[n][..., 0, :] for n in ("v_scale", "v_offset"))
    # Of the first key, by head, that is not finite; and of the first value, by channel.
    bad_k, bad_v = (np.moveaxis(~np.isfinite(x), -3, -2) & counted[..., None] for x in (k, v))
    bad_k = bad_k.any(-1, keepdims=True)
    for name, bad in (("first_bad_k", bad_k), ("first_bad", bad_v)):
        first = np.where(bad.any(-2), bad.argmax(-2), np.iinfo(np.int32).max)
        result[name] = first[..., 0] if name == "first_bad_k" else first
    return result


def assert_codes_are_as_in_portable(q, k, v, recipe, seen=None):
    actual = kernel_codes(q, k, v, recipe, seen)
    expected = portable_codes(q, k, v, recipe, seen)
    for name in ("first_bad", "first_bad_k", "q_scale", "k_scale", "v_scale"):
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    for name in ("q", "k", "v"):  # as numbers: a code of V that is zero may have a sign
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    # Both products of V's code sum are exact integers; portable sums of codes are FP32.
    np.testing.assert_array_equal(
        actual["code_sum"],
        expected["v"].astype(np.float64).sum(-2) if recipe.smooth_v else 0,
    )
    count = k.shape[-3] if seen is None else np.maximum(seen.sum(-1, keepdims=True), 1)
    average = actual["v_average"].astype(np.float64)
    offset = average - actual["v_scale"].astype(np.float64) * actual["code_sum"] / count
    offset = np.where(average == 0, 0, offset)  # nothing was taken
    # FP32 sums of 1100 codes up to 1.875, times the scale: max|v| times 2^-24 log2(1100) and more.
    np.testing.assert_allclose(
        offset, expected["v_offset"], rtol=0, atol=2.0**-20 * np.nanmax(np.abs(v[np.isfinite(v)]))
    )
    # A query that is not finite is marked in its scale; its q·k̄ does not matter.
    finite = np.isfinite(expected["q_scale"])
    assert np.isfinite(actual["q_dot_mean"][finite]).all()
    # 128 products in another order.
    k_max = np.abs(actual["k_mean"]).max()
    np.testing.assert_allclose(
        actual["q_dot_mean"][finite],
        expected["q_dot_mean"][finite],
        rtol=2.0**-18,
        atol=2.0**-20 * q.shape[-1] * k_max * np.abs(q[np.isfinite(q)]).max(),
    )


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [
        ("normal", 3),
        ("normal", 64),
        ("normal", 128),
        ("outlier", 80),
        ("heavy", 128),
        ("normal", 256),
        ("heavy", 200),
        ("outlier", 192),
        ("normal", 150),
    ],
)
@EACH_RECIPE
def test_codes_are_bitwise_equal(recipe, kind, head_dim):
    skip_without_kernel(head_dim)
    q, k, v = inputs(kind, (2, 200, 4, head_dim), (2, 1100, 2, head_dim))
    k[0, 70, 1, 0], v[1, 900, 0, 2] = np.nan, np.inf
    q[1, 3, 2, 1] = np.nan
    assert_codes_are_as_in_portable(q, k, v, recipe)


# Which of 1100 keys count, [B, K, 1100] or with ones. Chunks are of 64 keys or 128, parts of 512.
_TOKENS = np.arange(1100)
SEEN = {
    "random": np.random.default_rng(1).random((2, 2, 1100)) < 0.7,
    "lengths": np.stack([_TOKENS < 550, _TOKENS < 1010])[:, None],
    "the last": (_TOKENS >= 900)[None, None],
    "by blocks": np.stack([_TOKENS // 64 % 3 == 1, _TOKENS // 128 % 2 == 1])[None],
    "one key": (_TOKENS == 553)[None, None],
    "none in a head": np.stack([_TOKENS >= 0, _TOKENS < 0])[None],
    "none": (_TOKENS < 0)[None, None],
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (3, "bfloat16"),
        (64, "float16"),
        (128, "bfloat16"),
        (128, "float32"),
        (192, "float16"),
        (200, "bfloat16"),
    ],
)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_codes_where_some_keys_do_not_count(recipe, head_dim, dtype, name):
    """Chunks without keys that count are not computed, but are zero all the same."""
    skip_without_kernel(head_dim)
    q, k, v = inputs("normal", (2, 150, 4, head_dim), (2, 1100, 2, head_dim), dtype)
    k[0, 70, 1, 0], k[1, 1099, 0, 2], v[1, 900, 0, 2] = np.nan, -np.inf, np.inf
    assert_codes_are_as_in_portable(q, k, v, recipe, SEEN[name])


def seen_by_few(rng, shape):
    """Of each head a third of the keys is seen by no query, the others by three or so."""
    if shape[-1] == 1:  # of queries that see all keys
        return rng.random(shape) < 0.5
    return (rng.random(shape) < 3 / shape[-2]) & (np.arange(shape[-1]) % 3 > 0)


def view_of(masks, band, kv_heads, length_q, length_kv):
    """As the lowering makes it, of one batch dimension."""
    return View(
        masks,
        band,
        batch_rank=1,
        kv_heads=kv_heads,
        length_q=length_q,
        length_kv=length_kv,
        padded_q=mask_operands.round_up(length_q, lowering_cuda.BLOCK_Q),
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    ("mask_shape", "bias_shape", "dtype", "limits"),
    [
        ((1, 1, 700, 300), None, None, {}),
        ((2, 4, 700, 300), None, None, {}),
        (None, (1, 1, 700, 300), "float32", {}),
        (None, (1, 4, 700, 300), "bfloat16", {"left": 30}),
        ((2, 1, 700, 300), (1, 4, 1, 300), "float16", {"lengths": True}),
        ((1, 4, 700, 1), (2, 1, 700, 300), "float32", {"left": 9, "right": 5, "lengths": True}),
        ((1, 1, 3, 5), None, None, {}),
    ],
)
def test_seen_keys_are_as_in_portable(mask_shape, bias_shape, dtype, limits, kv_heads):
    rng = np.random.default_rng(3)
    length_q, length_kv = np.broadcast_shapes(*(x for x in (mask_shape, bias_shape) if x))[2:]
    bias = None
    if bias_shape is not None:
        bias = np.where(seen_by_few(rng, bias_shape), 0, -np.inf).astype(jnp.dtype(dtype))
        bias.flat[7::5000] = np.nan  # is seen
    lengths = np.array([length_kv - 9, length_kv // 2]) if "lengths" in limits else None
    masks = Masks(
        mask=None if mask_shape is None else seen_by_few(rng, mask_shape),
        bias=bias,
        key_value_seq_lengths=lengths,
    )

    def views(masks, function):
        band = Band(limits.get("left"), limits.get("right"))
        view = view_of(masks, band, kv_heads, length_q, length_kv)
        return jnp.broadcast_to(function(view, masks), (2, kv_heads, length_kv))

    def by_kernel(view, masks):
        arrays = mask_operands.make(
            view, masks, (2,), *2 * [jnp.zeros((2, length_kv, kv_heads, 64))]
        )
        return mask_operands.seen_keys(view, masks, arrays.arrays[0], (2,), kv_heads)

    expected = on_cpu(jax.jit(lambda masks: views(masks, lambda view, _: view.seen_keys())), masks)
    seen = jax.jit(lambda masks: views(masks, by_kernel))(masks)
    assert 0 < np.asarray(expected).mean() < 1
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_means_hide_the_order_of_their_sum(dtype):
    """On data whose sums are not exact, the means round to the same bfloat16 nearly always."""
    shape = (4, 4000, 8, 128)
    q, k, v = reference.inputs("normal", shape, shape, dtype, rounded=False)
    actual = kernel_codes(q[:, :10], k, v, RECIPES["8+8"])
    expected = portable_codes(q[:, :10], k, v, RECIPES["8+8"])
    # The portable k̄ is not a result; where it and the kernel's agree, so do the codes.
    same = (actual["k"] == expected["k"]).all(-2)
    # Orders differ by 2^-22 of sum|x| / S = 0.8, the means are 1/sqrt(4000) = 0.016 and the
    # spacing of bfloat16 there 2^-14: a boundary in between in one of 300 channels. A mean that
    # does differ moves its channel's codes only, unless that one sets a scale.
    print(f"{dtype}: codes of K equal in {same.mean():.4%} of the channels")
    assert same.mean() > 0.98
    np.testing.assert_array_equal(actual["q"], expected["q"])
    np.testing.assert_array_equal(actual["q_scale"], expected["q_scale"])


@pytest.mark.parametrize("seed", range(12))
def test_intervals_are_those_of_the_view(seed):
    """Of queries, of 64 of them, and of all together; of lengths beyond what there is too."""
    rng = np.random.default_rng(seed)
    batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    length_q, length_kv = map(int, rng.integers(1, 900, 2))
    limits = [None, 0, 5, 64, 300, 1000]
    band = Band(*(limits[i] for i in rng.integers(len(limits), size=2)), bool(rng.integers(2)))
    lengths = rng.integers(-3, [length_q + 9, length_kv + 9], (batch, 2)).astype(np.int32)
    given = [True, bool(rng.integers(2))][:: 1 if seed % 2 else -1]
    masks = Masks(
        query_seq_lengths=lengths[:, 0] if given[0] else None,
        key_value_seq_lengths=lengths[: 1 if seed == 3 else None, 1] if given[1] else None,
    )
    if seed == 0:  # no array at all
        masks, band = Masks(), Band(7, 0, True)
    padded_q = mask_operands.round_up(length_q, lowering_cuda.BLOCK_Q)

    def views(masks):
        return view_of(masks, band, kv_heads, length_q, length_kv)

    rows, groups, seen, per_key = jax.jit(
        lambda masks: mask_operands._intervals(views(masks), masks, (batch,), kv_heads)
    )(masks)
    first, end, expected_seen = on_cpu(
        jax.jit(lambda masks: (views(masks).first, views(masks).end, views(masks).seen_keys())),
        masks,
    )
    first, end = (np.broadcast_to(x, (len(rows), padded_q)) for x in (first, end))
    np.testing.assert_array_equal(rows, np.stack([first, end], -1))
    np.testing.assert_array_equal(seen, np.broadcast_to(expected_seen, seen.shape))
    # Padding sees nothing, and keeps nobody from seeing all.
    real = np.arange(padded_q) < length_q
    by_group = [
        x.reshape(len(rows), -1, mask_operands.GROUP)
        for x in (first, end, np.where(real, first, 0), np.where(real, end, length_kv))
    ]
    reduced = [f(x, -1) for f, x in zip((np.min, np.max, np.max, np.min), by_group, strict=True)]
    np.testing.assert_array_equal(groups, np.stack(reduced, -1))
    counts = np.asarray(seen).sum((1, 2), dtype=np.float32)[:, None]
    np.testing.assert_array_equal(
        per_key,
        np.broadcast_to(np.float32(1) / np.maximum(counts, np.float32(1)), (batch, kv_heads)),
    )


# The last are sorted by XLA.
@pytest.mark.parametrize("length", [1, 2, 3, 1000, 1025, MOST_SORTED, MOST_SORTED + 1])
def test_ids_are_sorted(length):
    """Of equal ids the first token comes first; what is in order stays."""
    rng = np.random.default_rng(length)
    extremes = np.array([2**31 - 1, -(2**31), 0, -1, 1])
    ids = np.stack(
        [
            rng.choice(extremes, length),
            rng.integers(-(2**31), 2**31, length),
            np.arange(length) // 7 - 5,
            -np.arange(length),
            np.full(length, 2**31 - 1),
            np.where(np.arange(length) == length - 1, -3, 2),
        ]
    ).astype(np.int32)
    sorted_ids, order, slots, scattered, *ranges = jax.jit(mask_operands.sort_by_kernel)(ids)
    expected = np.argsort(ids, axis=-1, kind="stable")
    np.testing.assert_array_equal(order, expected)
    expected_ids = np.take_along_axis(ids, expected, -1)
    np.testing.assert_array_equal(sorted_ids, expected_ids)
    for i, side in enumerate(("left", "right")):
        ends = [np.searchsorted(*x, side=side) for x in zip(expected_ids, ids, strict=True)]
        np.testing.assert_array_equal(slots[..., i], ends)
    together = [(np.diff(np.flatnonzero(x == i)) == 1).all() for x in ids for i in np.unique(x)]
    counts = [len(np.unique(x)) for x in ids]
    by_entry = np.split(np.array(together), np.cumsum(counts)[:-1])
    np.testing.assert_array_equal(scattered, [not x.all() for x in by_entry])
    padded = np.pad(ids, [(0, 0), (0, -length % mask_operands.TILE)], mode="edge")
    for range_, size in zip(ranges, (mask_operands.GROUP, mask_operands.TILE), strict=True):
        of_range = padded.reshape(len(ids), -1, size)
        expected = np.stack([of_range.min(-1), of_range.max(-1)], -1)
        np.testing.assert_array_equal(range_, expected)


def segments_by_kernels(q, k, v, recipe, query_ids, key_ids, seen):
    """The eleven results of the quantization with segments, [B, ...]; queries see all keys."""

    def run(q, k, v, query_ids, key_ids, seen, own=False):
        masks = Masks(query_segment_ids=query_ids, key_value_segment_ids=key_ids)
        padded_q = mask_operands.round_up(q.shape[-3], lowering_cuda.BLOCK_Q)
        rows = jnp.broadcast_to(np.array([0, k.shape[-3]], np.int32), (1, padded_q, 2))
        of_masks = (masks, q.shape[:-3], padded_q, k.shape[-3])
        *segments, _ = mask_operands.sort_segments(*of_masks)[0]
        return lowering_cuda.quantize(
            q,
            k,
            v,
            scale_log2=scale_log2(q),
            recipe=recipe,
            seen=() if seen is None else (seen.astype(jnp.uint8),),
            segments=(*segments, rows),
            own_segments=own,
        )

    call = jax.jit(run, static_argnames="own")
    results = [np.asarray(x) for x in call(q, k, v, query_ids, key_ids, seen)]
    if np.array_equal(query_ids, key_ids):
        # If it is known that these are alike, queries are not searched for among the keys.
        same = call(q, k, v, query_ids, key_ids, seen, own=True)
        for i, (x, y) in enumerate(zip(results, same, strict=True)):
            if i != 6:  # channels, which hold anything where no segment has its slot
                np.testing.assert_array_equal(x, y)
    return results


def assert_segments_are_as_in_portable(raw, q, k, v, recipe, query_ids, key_ids, seen):
    """Codes and scales to the bit; ids and `seen` may be of one batch entry for all, or None."""
    batch, length_q, heads, head_dim = q.shape
    length_kv, kv_heads = k.shape[-3:-1]
    query_ids, key_ids = (np.broadcast_to(x, (batch, x.shape[-1])) for x in (query_ids, key_ids))
    shape = (batch, kv_heads, length_kv)
    given = None if seen is None else np.broadcast_to(seen, shape)
    seen = np.ones(shape, bool) if given is None else given

    def portable_codes(q, k, v, query_ids, key_ids, seen):
        segments = Segments.find(query_ids, key_ids)
        params = {"scale_log2": scale_log2(q), "recipe": recipe}
        return quantization.quantize(q, k, v, **params, seen=seen, segments=segments), segments

    expected, segments = on_cpu(jax.jit(portable_codes), q, k, v, query_ids, key_ids, given)
    expected = {name: np.asarray(x) for name, x in expected._asdict().items()}
    *raw, segment_rows, segment_groups = raw
    q_codes, q_scale, q_dot_mean, k_codes, k_scale, v_codes, channels, first_bad, slots = raw
    v_codes = v_codes.astype(np.float32)
    if recipe.pv == "fp8":
        positions = [permuted(key) for key in range(v_codes.shape[-1])]
        v_codes = np.swapaxes(v_codes[..., positions], -1, -2)
    for codes, length in ((q_codes, length_q), (k_codes, length_kv), (v_codes, length_kv)):
        assert not codes[..., length:, :].any()
        assert not codes[..., head_dim:].any()
    np.testing.assert_array_equal(q_codes[..., :length_q, :head_dim], expected["q"])
    np.testing.assert_array_equal(k_scale, expected["k_scale"])
    np.testing.assert_array_equal(k_codes[..., :head_dim], expected["k"])
    np.testing.assert_array_equal(v_codes[..., :head_dim], expected["v"].astype(np.float32))

    # Slots: the first of each id among the sorted keys.
    firsts = (key_ids[:, None] < query_ids[:, :, None]).sum(-1)
    has_keys = (key_ids[:, None] == query_ids[:, :, None]).any(-1)
    np.testing.assert_array_equal(slots[:, :length_q], np.where(has_keys, firsts, -1))
    # The keys of a query's segment, where these lie one behind the other.
    of_segment = key_ids[:, None] == query_ids[:, :, None]
    begin, count = of_segment.argmax(-1), of_segment.sum(-1)
    end = np.where(has_keys, begin + count, 0)
    begin = np.where(has_keys, begin, length_kv)
    position = np.arange(length_kv)
    inside = (position >= begin[..., None]) & (position < end[..., None])
    together = (of_segment == inside).all(-1)
    rows = segment_rows[:, :length_q]
    np.testing.assert_array_equal(rows[together], np.stack([begin, end], -1)[together])
    assert (rows >= 0).all() and (rows <= length_kv).all()  # of the others something in range
    # Padding sees nothing or anything, and keeps nobody from seeing all.
    real = (np.arange(segment_rows.shape[1]) < length_q)[:, None]
    latest, earliest = np.where(real, segment_rows, [0, length_kv]).T
    reduced = [
        f(x.T.reshape(batch, -1, mask_operands.GROUP), -1)
        for f, x in [
            (np.min, segment_rows[..., 0].T),
            (np.max, segment_rows[..., 1].T),
            (np.max, latest),
            (np.min, earliest),
        ]
    ]
    np.testing.assert_array_equal(segment_groups, np.stack(reduced, -1))
    largest = np.abs(v[np.isfinite(v)]).max()
    for b in range(batch):
        _, where = np.unique(key_ids[b], return_index=True)
        own = channels[b][:, (key_ids[b] < key_ids[b, where][:, None]).sum(-1), :, :head_dim]
        entries = np.asarray(segments.key_index)[b, where]
        np.testing.assert_array_equal(own[..., 0, :], expected["v_scale"][b][:, entries])
        # As in test_codes_are_bitwise_equal.
        np.testing.assert_allclose(
            own[..., 1, :], expected["v_offset"][b][:, entries], rtol=0, atol=2.0**-20 * largest
        )
    rows = np.broadcast_to(has_keys[:, None], (batch, heads, length_q))
    np.testing.assert_array_equal(q_scale[..., :length_q][rows], expected["q_scale"][rows])
    rows = rows & np.isfinite(expected["q_scale"])
    # 128 products in another order, with means up to the largest key.
    k_max = np.abs(k[np.isfinite(k)]).max()
    np.testing.assert_allclose(
        q_dot_mean[..., :length_q][rows],
        expected["q_dot_mean"][rows],
        rtol=2.0**-18,
        atol=2.0**-20 * head_dim * k_max * np.abs(q[np.isfinite(q)]).max(),
    )
    counted = np.moveaxis(seen, 1, 2)[..., None]
    bad = (~(np.isfinite(k) & np.isfinite(v)) & counted).any(-1)  # [B, S, K]
    first = np.where(bad.any(1), bad.argmax(1), np.iinfo(np.int32).max)
    np.testing.assert_array_equal(first_bad.min((-1, -2)), first)


SEGMENTS = {
    # Ids of `length` tokens: of keys, and of queries some more.
    "one": lambda rng, length: np.full(length, 7),
    "sorted": lambda rng, length: np.arange(length) * 5 // length,
    "falling": lambda rng, length: -(np.arange(length) * 3 // length),
    "by turns": lambda rng, length: np.arange(length) % 3,
    "random": lambda rng, length: rng.choice([5, -(2**31), 2**31 - 1, 0], length),
    "small": lambda rng, length: rng.permutation(length) // 3,
    "each alone": lambda rng, length: rng.permutation(length),
}


def segments_case(name, lengths, *, alike=False):
    """Ids of queries and keys, [B, ...] or [1, ...], and which keys are seen."""
    rng = np.random.default_rng(0)
    batch = 1 if alike else 2
    query_ids, key_ids = (
        np.stack([SEGMENTS[name](rng, n) for _ in range(batch)]).astype(np.int32) for n in lengths
    )
    query_ids[:, ::7] += 1
    return query_ids, key_ids


@pytest.mark.parametrize("name", SEGMENTS)
@EACH_RECIPE
def test_segments_are_bitwise_equal(recipe, name):
    q, k, v = inputs("outlier", (2, 200, 4, 80), (2, 1300, 2, 80))
    seen = np.random.default_rng(1).random((2, 2, 1300)) < 0.9
    ids = segments_case(name, (200, 1300))
    raw = segments_by_kernels(q, k, v, recipe, *ids, seen)
    assert_segments_are_as_in_portable(raw, q, k, v, recipe, *ids, seen)


@pytest.mark.parametrize("head_dim", [64, 128, 200])
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_of_which_all_keys_are_seen(name, head_dim):
    """K's means are of samples then, numbered within each segment."""
    skip_without_kernel(head_dim)
    q, k, v = inputs("outlier", (2, 900, 2, head_dim), (2, 900, 2, head_dim), "bfloat16")
    k[0, 40, 1, 0], k[1, 899, 0, 2], v[1, 700, 0, 2] = np.nan, -np.inf, np.inf
    ids = segments_case(name, (200, 900))[1]
    raw = segments_by_kernels(q, k, v, RECIPES["8+8"], ids, ids, None)
    assert_segments_are_as_in_portable(raw, q, k, v, RECIPES["8+8"], ids, ids, None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [3, 64, 127, 128, 192, 200])
@pytest.mark.parametrize("name", ["sorted", "random"])
def test_segments_of_any_dtype_and_head_dim(name, head_dim, dtype):
    """With values that are not finite, and ids that are alike for all batch entries."""
    skip_without_kernel(head_dim)
    q, k, v = inputs("normal", (2, 150, 2, head_dim), (2, 1100, 2, head_dim), dtype)
    k[0, 70, 1, 0], k[1, 1099, 0, 2], v[1, 900, 0, 2] = np.nan, -np.inf, np.inf
    q[1, 3, 1, 1] = np.nan
    seen = np.ones((1, 1, 1100), bool)
    seen[..., 300:333] = False
    ids = segments_case(name, (150, 1100), alike=True)
    recipe = RECIPES["8+8"]
    raw = segments_by_kernels(q, k, v, recipe, *ids, seen)
    assert_segments_are_as_in_portable(raw, q, k, v, recipe, *ids, seen)


@pytest.mark.parametrize("name", ["one", "sorted"])
def test_segments_of_many_parts(name):
    """40 parts of 512 keys: more pieces of a segment than are put together at once."""
    q, k, v = inputs("normal", (1, 100, 1, 128), (1, 20000, 1, 128))
    k, v = k / 4, v / 4  # exact_sums is of 16K tokens
    seen = np.random.default_rng(1).random((1, 1, 20000)) < 0.9
    ids = segments_case(name, (100, 20000), alike=True)
    raw = segments_by_kernels(q, k, v, RECIPES["8+8"], *ids, seen)
    assert_segments_are_as_in_portable(raw, q, k, v, RECIPES["8+8"], *ids, seen)


def test_segments_with_keys_that_are_constant_and_large():
    """Their size is the smallest: what does not count in them is still nothing."""
    q, k, v = inputs("normal", (1, 10, 1, 64), (1, 700, 1, 64))
    k[:, :350] = v[:, :350] = 2.0**40
    seen = np.ones((1, 1, 700), bool)
    seen[..., 100:120] = seen[..., 340:360] = False
    ids = np.zeros((1, 10), np.int32), (np.arange(700)[None] // 350).astype(np.int32)
    raw = segments_by_kernels(q, k, v, RECIPES["8+8"], *ids, seen)
    assert_segments_are_as_in_portable(raw, q, k, v, RECIPES["8+8"], *ids, seen)


@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("recipe", NAMED)
def test_what_other_entries_ids_are_does_not_show(recipe, head_dim):
    """On Hopper those with scattered keys are another kernel's; which that is, each says itself."""
    skip_without_kernel(head_dim)
    q, k, v = inputs("normal", (3, 500, 4, head_dim), (3, 500, 2, head_dim), "bfloat16")
    together, scattered = np.arange(500) // 90, np.arange(500) % 3
    params = {"scale_log2": scale_log2(q), "band": Band(), "recipe": RECIPES[recipe]}
    run = jitted(lowering_cuda.attention, **params, with_lse=True)
    portable_run = jitted(portable.attention, **params)
    results = {}
    for order in itertools.product((together, scattered), repeat=3):
        masks = Masks(query_segment_ids=np.stack(order).astype(np.int32))
        out, lse = (np.asarray(x) for x in run(q, k, v, masks))
        other, _ = on_cpu(portable_run, q, k, v, masks)
        difference = np.abs(out.astype(np.float64) - np.asarray(other, np.float64))
        # As in test_segments_in_the_outputs: out is rounded to bfloat16.
        assert difference.mean() <= 2.0**-8 * np.abs(np.asarray(other, np.float64)).mean()
        for entry, ids in enumerate(order):
            first = results.setdefault((entry, ids is together), (out[entry], lse[entry]))
            np.testing.assert_array_equal(out[entry], first[0])
            np.testing.assert_array_equal(lse[entry], first[1])


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("recipe", NAMED)
def test_segments_in_the_outputs(recipe, name, mma_sync):
    """Rows of several segments in a tile, queries without keys, more tiles than SMs."""
    heads, kv_heads = (3, 1) if EMULATED else (24, 8)
    q, k, v = inputs("normal", (2, 700, heads, 64), (2, 700, kv_heads, 64), "bfloat16")
    ids = segments_case(name, (700, 700))
    v += 2 * (ids[1] % 3)[:, :, None, None].astype(v.dtype)  # offsets that differ
    masks = Masks(query_segment_ids=ids[0], key_value_segment_ids=ids[1])
    params = {"scale_log2": scale_log2(q), "band": Band(), "recipe": RECIPES[recipe]}
    run = jitted(lowering_cuda.attention, **params, with_lse=True, mma_sync=mma_sync)
    out, lse = (np.asarray(x) for x in run(q, k, v, masks))
    other, other_lse = (
        np.asarray(x) for x in on_cpu(jitted(portable.attention, **params), q, k, v, masks)
    )
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(other_lse))
    blind = np.isneginf(lse)
    assert not out[blind].any()
    np.testing.assert_allclose(lse[~blind], other_lse[~blind], rtol=2.0**-14, atol=2.0**-14)
    # As assert_near_portable has it, but for bfloat16, in which out is rounded.
    difference = np.abs(out.astype(np.float64) - other.astype(np.float64))
    assert difference.mean() <= 2.0**-8 * np.abs(other.astype(np.float64)).mean()
    # A flip of E4M3 in a row of two keys moves it by 2^-5 |v - v̄| of one, with another segment's
    # offset it would move by 2.
    assert difference.mean(-1).max() <= 2.0**-2
    again = run(q, k, v, masks)
    for x, y in zip(again, (out, lse), strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)
