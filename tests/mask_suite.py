"""Tests of what a query sees, on every backend: bias, mask, lengths, windows, segments, alignment.

test_masks.py runs them on the CPU, test_gpu.py on a GPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from suite import NAMED, assert_equal_up_to_order, attention, check

import jax_sage

B, T, S, N, K, H = 2, 70, 150, 4, 2, 32
QUERY, KEY = (B, T, N, H), (B, S, K, H)
SCORES = (B, N, T, S)


def random_mask(shape, share=0.6, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def random_bias(shape, dtype="float32", seed=0):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def ids_of(*runs):
    """[(3, 2), (5, 1)] -> 3 3 5, as int32."""
    return np.repeat(*np.array(runs, np.int32).T)


FORMS = [
    (B, N, T, S),
    (1, 1, T, S),
    (B, 1, 1, S),
    (1, N, T, 1),
    (B, N, 1, 1),
    (1, 1, 1, 1),
    (N, T, S),
    (T, S),
    (S,),
]

COMBINATIONS = {
    "window and mask": {"local_window_size": (30, 5), "mask": random_mask((1, N, T, S))},
    "causal, bias and lengths": {
        "is_causal": True,
        "bias": random_bias((1, N, T, S)),
        "key_value_seq_lengths": np.array([33, 150]),
    },
    "everything": {
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "bias": random_bias((B, 1, 1, S)),
        "mask": random_mask((B, 1, T, S)),
        "query_seq_lengths": np.array([70, 51]),
        "key_value_seq_lengths": np.array([140, 77]),
        "local_window_size": 60,
        "query_segment_ids": np.stack([ids_of((1, 40), (2, 30)), ids_of((5, 70))]),
        "key_value_segment_ids": np.stack([ids_of((1, 75), (2, 75)), ids_of((4, 9), (5, 141))]),
    },
}


class MaskSuite:
    # Each argument alone.

    @pytest.mark.parametrize("shape", FORMS, ids=str)
    def test_mask(self, shape):
        check(*reference.inputs("normal", QUERY, KEY), mask=random_mask(shape))

    @pytest.mark.parametrize("shape", FORMS[::2], ids=str)
    def test_bias(self, shape):
        check(*reference.inputs("normal", QUERY, KEY), bias=random_bias(shape))

    @pytest.mark.parametrize(
        ("dtype", "recipe"), [("float16", "8+8"), ("bfloat16", "8+16"), ("float32", "8+8")]
    )
    def test_bias_of_any_dtype(self, dtype, recipe):
        """Whatever the dtype of query."""
        q, k, v = reference.inputs("normal", QUERY, KEY, "bfloat16")
        check(q, k, v, bias=random_bias((1, N, T, S), dtype), recipe=recipe)

    def test_without_a_batch_dimension(self):
        q, k, v = reference.inputs("normal", QUERY[1:], KEY[1:])
        mask, bias = random_mask((1, N, T, S)), random_bias((N, T, S))  # rank 4 as in jax.nn, and 3
        out, lse = attention(q, k, v, mask=mask, bias=bias, key_value_seq_lengths=np.array([90]))
        expected = reference.analyse(
            q, k, v, mask=mask[0], bias=bias, key_value_seq_lengths=np.array(90)
        )
        reference.assert_accurate(out, lse, expected)

    @pytest.mark.parametrize("lengths", [(33, 64), (1, 1), (70, 65)], ids=str)
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_lengths(self, lengths, is_causal):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        queries, keys = np.array([lengths[0], 70]), np.array([149, lengths[1]])
        options = {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
        check(q, k, v, is_causal=is_causal, **options)

    def test_length_zero(self):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        lengths = {"query_seq_lengths": np.array([0, 70])}
        out, lse = attention(q, k, v, **lengths)
        assert not out[0].any()
        assert np.isneginf(lse[0]).all()
        check(q, k, v, **lengths)
        check(q, k, v, key_value_seq_lengths=np.array([150, 0]))

    @pytest.mark.parametrize("window", [0, (0, 9), (64, 63), (200, 0), (0, 200)])
    def test_window(self, window):
        check(*reference.inputs("normal", QUERY, KEY), local_window_size=window)

    @pytest.mark.parametrize("lengths", [(70, 150), (150, 70), (1, 150)], ids=str)
    @pytest.mark.parametrize(
        ("is_causal", "window"), [(True, None), (True, (20, 3)), (False, (20, 3))]
    )
    def test_bottom_right(self, lengths, window, is_causal):
        shapes = (B, lengths[0], N, H), (B, lengths[1], K, H)
        check(
            *reference.inputs("normal", *shapes),
            is_causal=is_causal,
            local_window_size=window,
            causal_alignment="bottom_right",
        )

    def test_decoding_with_a_cache(self):
        """A step of decoding: the query is the last of each entry's tokens, the cache is longer."""
        q, k, v = reference.inputs("normal", (3, 1, N, H), (3, 200, K, H))
        lengths = np.array([200, 1, 67])
        k[1, 1:], v[2, 67:] = np.nan, np.nan  # not written yet
        out, lse = attention(
            q, k, v, is_causal=True, causal_alignment="bottom_right", key_value_seq_lengths=lengths
        )
        for entry, length in enumerate(lengths):
            one = np.s_[entry : entry + 1]
            expected = reference.analyse(q[one], k[one, :length], v[one, :length])
            reference.assert_accurate(out[one], lse[one], expected)

    def test_several_queries_with_a_cache(self):
        """Queries of a chunk see the cache and those of the chunk before them."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        options = {"is_causal": True, "causal_alignment": "bottom_right"}
        lengths = {"query_seq_lengths": [70, 9], "key_value_seq_lengths": [150, 60]}
        out, lse = attention(q, k, v, **options, **{n: np.array(x) for n, x in lengths.items()})
        expected = reference.analyse(q[1:, :9], k[1:, :60], v[1:, :60], **options)
        reference.assert_accurate(out[1:, :9], lse[1:, :9], expected)
        assert not out[1, 9:].any()
        assert np.isneginf(lse[1, 9:]).all()

    @pytest.mark.parametrize("recipe", NAMED)
    def test_segments(self, recipe):
        """In runs, in any order, and some that the other side does not have."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        queries = np.stack([ids_of((0, 20), (1, 33), (7, 17)), ids_of((3, 70))])
        keys = np.random.default_rng(0).choice([0, 1, 3, -8], (B, S)).astype(np.int32)
        ids = {"query_segment_ids": queries, "key_value_segment_ids": keys}
        out, lse = attention(q, k, v, recipe=recipe, **ids)
        assert not out[0, 53:].any()
        assert np.isneginf(lse[0, 53:]).all()
        check(q, k, v, recipe=recipe, **ids)

    @pytest.mark.parametrize("recipe", NAMED)
    def test_segments_of_different_magnitudes(self, recipe):
        """As accurate as each would be alone, though they share blocks of keys with others."""
        runs = [(1, 45), (2, 70), (3, 35)]
        lengths = [length for _, length in runs]
        factors = np.repeat([1.0, 1e-4, 1e3], lengths)[:, None, None]
        ids = ids_of(*runs)
        q, k, v = reference.inputs("outlier", (S, N, H), (S, K, H))
        k, v = (x * np.float32(1) * factors.astype(np.float32) for x in (k, v))
        q = (q / np.repeat([1, 1e-4, 1e3], lengths)[:, None, None]).astype(np.float32)
        out, lse = attention(
            q, k, v, recipe=recipe, query_segment_ids=ids, key_value_segment_ids=ids
        )
        for segment, _ in runs:
            own = ids == segment
            alone = attention(q[own], k[own], v[own], recipe=recipe)
            exact, exact_lse = reference.attention(q[own], k[own], v[own])
            error = reference.relative_l1(out[own], exact)
            # Scales of K may be twice as coarse: see reference.analyse.
            assert error <= 1.5 * reference.relative_l1(alone[0], exact) + 1e-3
            assert np.abs(lse[own] - exact_lse).mean() <= 2 * np.abs(alone[1] - exact_lse).mean()

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_packed_sequences_are_as_if_alone(self, is_causal):
        """Causal by position in the packed sequence, which is causal in each."""
        q, k, v = reference.inputs("normal", (S, N, H), (S, K, H))
        ids = ids_of((1, 45), (2, 70), (3, 35))
        segments = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        out, lse = attention(q, k, v, is_causal=is_causal, **segments)
        for segment in (1, 2, 3):
            own = ids == segment
            expected = reference.analyse(q[own], k[own], v[own], is_causal=is_causal)
            # K's scales: as above.
            in_scores = 1.5 * expected.worst_out + 2.0**-6
            assert np.all(np.abs(out[own] - expected.out) <= in_scores)
            np.testing.assert_allclose(lse[own], expected.lse, atol=0.15)

    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": (9, 0)},
                                         {"key_value_seq_lengths": np.array([77, 150], np.int32)}],
                             ids=str)  # fmt: skip
    def test_queries_and_keys_may_have_the_same_array_of_ids(self, options):
        """Then it is known that each key is seen, and segments may run by intervals."""
        q, k, v = (jnp.asarray(x) for x in reference.inputs("normal", (2, S, N, H), (2, S, K, H)))
        ids = jnp.stack([ids_of((1, 45), (2, 70), (3, 35)), ids_of((7, 100), (2, 50))])
        run = functools.partial(jax_sage.attention, q, k, v, return_residual=True, **options)
        out, lse = run(query_segment_ids=ids, key_value_segment_ids=ids)
        other, other_lse = run(query_segment_ids=ids, key_value_segment_ids=ids.copy())
        # Where all keys are known to be seen K's means are of half of them, else of all: the errors
        # of scores differ, by some 1 %, and where P is E4M3 a small move is now and then of 2^-3.
        assert np.abs(out - other).mean() <= 0.04 * np.abs(other).mean()
        lse, other_lse = (np.asarray(x, np.float64) for x in (lse, other_lse))
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(other_lse))
        np.testing.assert_allclose(lse, other_lse, atol=0.05)  # 5 sigma of the 1 % of a score

    @pytest.mark.parametrize("recipe", NAMED)
    def test_a_segment_may_begin_with_a_sink(self, recipe):
        """Its first key, 10 powers of two above 2047 others, is alone in its tile of keys.

        P of the others is a subnormal number of E4M3 if the row's maximum has room for 3 powers
        more, and is represented; with room for 6 it would be 0.
        """
        begin, others = 63, 2047
        length = begin + 1 + others
        q = np.full((length, 1, 64), 1 / 8, np.float32)
        k = np.zeros((length, 1, 64), np.float32)
        k[begin] = 10 * math.log(2)  # times 64 / 8 / sqrt(64)
        v = np.full(k.shape, 1.0, np.float32)
        v[begin] = -1
        ids = jnp.asarray(ids_of((1, begin), (2, 1 + others)))
        out, _ = attention(q, k, v, recipe=recipe, query_segment_ids=ids, key_value_segment_ids=ids)
        share = others / (others + 2**10)
        # INT8 moves the sink's score by 10 / 254 powers at most, and the share by 0.01; without the
        # others it would move by 0.67.
        assert np.abs((1 + out[begin:]) / 2 - share).max() < 0.05

    # Together.

    @pytest.mark.parametrize("recipe", NAMED)
    @pytest.mark.parametrize("name", COMBINATIONS)
    def test_combination(self, name, recipe):
        check(*reference.inputs("normal", QUERY, KEY), recipe=recipe, **COMBINATIONS[name])

    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1)])
    def test_a_mask_for_each_query_head(self, heads, kv_heads):
        q, k, v = reference.inputs("normal", (B, T, heads, H), (B, S, kv_heads, H))
        check(q, k, v, mask=random_mask((1, heads, T, S), 0.3))

    @pytest.mark.parametrize(
        "head_dims", [(129, 129), (192, 192), (256, 256), (192, 128), (40, 72)]
    )
    @pytest.mark.parametrize("recipe", NAMED)
    def test_head_dims(self, head_dims, recipe):
        """Above 128, and another one of value."""
        head_dim, value_dim = head_dims
        q, k, v = reference.inputs("normal", (1, 90, 2, head_dim), (1, 100, 1, head_dim))
        v = np.resize(v, (*v.shape[:-1], value_dim))
        check(q, k, v, recipe=recipe, is_causal=True)

    @pytest.mark.parametrize("kind", ["plain", "mask", "bias", "segments"])
    @pytest.mark.parametrize("head_dim", [192, 256])
    @pytest.mark.parametrize("recipe", NAMED)
    def test_large_heads(self, recipe, head_dim, kind):
        """Of more than 512 keys, after which FP16 sums are promoted; rows of two items."""
        q, k, v = reference.inputs("outlier", (1, 130, 2, head_dim), (1, 600, 1, head_dim))
        ids = (np.arange(600) >= 50)[None].astype(np.int32)
        options = {
            "plain": {},
            "mask": {"mask": random_mask((1, 1, 130, 600), 0.7)},
            "bias": {
                "bias": np.random.default_rng(0).standard_normal((1, 1, 130, 600), np.float32)
            },
            "segments": {"query_segment_ids": ids[:, 20:150], "key_value_segment_ids": ids},
        }[kind]
        check(q, k, v, recipe=recipe, kind="outlier", **options)

    # Queries that see nothing.

    @pytest.mark.parametrize("recipe", NAMED)
    def test_rows_that_see_nothing(self, recipe):
        """By each argument that can do that: 0 and -inf, and the other rows are as they should."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        mask = np.ones((B, 1, T, S), bool)
        mask[1, :, 5:9] = False
        bias = np.zeros((1, N, T, 1), np.float32)
        bias[:, 2, 20] = -np.inf
        bias[:, 1, 21] = np.finfo(np.float32).min
        bias[:, 1, 22] = -1e9
        lengths = np.array([70, 60])
        options = {"mask": mask, "bias": bias, "query_seq_lengths": lengths}
        out, lse = attention(q, k, v, recipe=recipe, **options)
        blind = np.zeros(lse.shape, bool)
        blind[1, 5:9] = blind[:, 20, 2] = blind[:, 21:23, 1] = blind[1, 60:] = True
        np.testing.assert_array_equal(np.isneginf(lse), blind)
        np.testing.assert_array_equal((out == 0).all(-1), blind)
        check(q, k, v, recipe=recipe, **options)

    def test_nobody_sees_anything(self):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        k[0, 0, 0, 0], v[1, 3, 1, 2], q[0, 1] = np.nan, np.inf, np.nan
        for options in (
            {"mask": np.zeros((1, 1, 1, 1), bool)},
            {"key_value_seq_lengths": np.array([0, 0])},
            {"query_segment_ids": np.zeros((B, T), np.int32),
             "key_value_segment_ids": np.ones((B, S), np.int32)},
        ):  # fmt: skip
            out, lse = attention(q, k, v, **options)
            np.testing.assert_array_equal(out, np.zeros_like(q))
            np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))

    @pytest.mark.parametrize("lowest", [-1e4, -1e6, -1e9, -1e30, float(np.finfo("float32").min)])
    def test_masks_that_are_added(self, lowest):
        """As many models make them. Keys of -1e4 are seen, with a weight of zero."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        mask = random_mask((B, 1, 1, S))
        bias = np.where(mask, np.float32(0), np.float32(lowest))
        out, lse = attention(q, k, v, bias=bias)
        expected = reference.analyse(q, k, v, mask=mask)
        # The hidden keys count in means and scales if their bias is not low enough to hide them.
        assert reference.relative_l1(out, expected.out) < 0.045
        np.testing.assert_allclose(lse, expected.lse, atol=0.05)

    # Values that are not finite.

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("recipe", NAMED)
    def test_not_finite_reaches_those_that_see_it(self, bad, recipe):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        mask = random_mask((B, 2 * K, T, S), 0.02)  # 2 query heads of each key head see others
        k[1, 67, 1, 5] = k[0, 3, 0, 0] = v[1, 80, 0, 7] = v[0, 149, 1, 30] = 0
        expected = [np.array(x) for x in attention(q, k, v, recipe=recipe, mask=mask)]
        k[1, 67, 1, 5] = k[0, 3, 0, 0] = v[1, 80, 0, 7] = v[0, 149, 1, 30] = bad
        actual = attention(q, k, v, recipe=recipe, mask=mask)
        sees = np.moveaxis(mask, 1, 2)  # [B, T, N, S]
        bad_rows = np.zeros((B, T, N), bool)
        bad_rows[1, :, 2:] = sees[1, :, 2:, 67]
        bad_rows[0, :, :2] |= sees[0, :, :2, 3]
        assert 0 < bad_rows.sum() < 20
        expected[0][bad_rows] = expected[1][bad_rows] = np.nan
        expected[0][1, :, :2, 7][sees[1, :, :2, 80]] = np.nan
        expected[0][0, :, 2:, 30][sees[0, :, 2:, 149]] = np.nan
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_not_finite_query_that_sees_nothing(self):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        q[0, 5], q[0, 60] = np.nan, np.nan
        out, lse = attention(q, k, v, query_seq_lengths=np.array([60, 70]))
        assert np.isnan(out[0, 5]).all() and np.isnan(lse[0, 5]).all()
        assert not out[0, 60].any() and np.isneginf(lse[0, 60]).all()
        assert np.isnan(out).sum() == N * H

    @pytest.mark.parametrize("lowest", [-np.inf, -1e9])
    def test_not_finite_query_from_which_a_bias_hides_all(self, lowest):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        bias = random_bias((1, 1, T, S))
        q[:, 7], bias[..., 7, :], bias[..., 30, :] = np.nan, lowest, lowest
        out, lse = attention(q, k, v, bias=bias)
        for row in (7, 30):
            assert not out[:, row].any()
            assert np.isneginf(lse[:, row]).all()
        assert np.isfinite(out).all()

    def test_not_finite_bias(self):
        """NaN and inf reach their query if it sees that key; -inf hides it."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        mask = np.ones((1, 1, T, S), bool)
        mask[..., 8, 100] = mask[..., 9, 100] = False
        bias = np.zeros((1, N, T, S), np.float32)
        plain = [np.array(x) for x in attention(q, k, v, mask=mask, bias=bias)]
        bias[0, 1, 7, 100], bias[0, 2, 30, 3] = np.nan, np.inf
        bias[0, :, 8, 100], bias[0, :, 9, 100] = np.nan, np.inf  # not seen
        actual = attention(q, k, v, mask=mask, bias=bias)
        for x, y in zip(actual, plain, strict=True):
            y[:, 7, 1] = y[:, 30, 2] = np.nan
            np.testing.assert_array_equal(x, y)

    # What is not seen has no influence.

    @pytest.mark.parametrize("garbage", [3.0, 1e30, np.nan])
    @pytest.mark.parametrize(
        ("options", "hidden"),
        [
            ({"key_value_seq_lengths": np.array([100, 100])}, np.s_[100:]),
            ({"mask": np.arange(S) < 100}, np.s_[100:]),
            ({"bias": np.where(np.arange(S) < 100, 0, -np.inf).astype("f4")}, np.s_[100:]),
            ({"local_window_size": (5, 20)}, np.s_[90:]),  # T = 70
            ({"is_causal": True}, np.s_[70:]),
            ({"local_window_size": 10, "causal_alignment": "bottom_right"}, np.s_[:70]),
            (
                {
                    "query_segment_ids": np.full((B, T), 4, np.int32),
                    "key_value_segment_ids": np.tile(ids_of((4, 100), (5, 50)), (B, 1)),
                },
                np.s_[100:],
            ),
        ],
        ids=["lengths", "mask", "bias", "window", "causal", "bottom right", "segments"],
    )
    def test_hidden_keys_have_no_influence(self, options, hidden, garbage):
        """Not on a single bit, whatever they hold."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        expected = attention(q, k, v, **options)
        k[:, hidden], v[:, hidden] = garbage, -garbage
        for x, y in zip(attention(q, k, v, **options), expected, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_other_batch_entries_and_heads_have_no_influence(self):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        mask, bias = random_mask((B, N, T, S)), random_bias((B, N, T, S))
        out, lse = attention(q, k, v, mask=mask, bias=bias)
        for x in (q, k, v, bias):
            x[0] *= 100
        q[1, :, 2:], k[1, :, 1], v[1, :, 1] = np.nan, 1e30, np.inf
        mask[0], bias[1, 2:] = ~mask[0], np.nan
        other = attention(q, k, v, mask=mask, bias=bias)
        np.testing.assert_array_equal(other[0][1, :, :2], out[1, :, :2])
        np.testing.assert_array_equal(other[1][1, :, :2], lse[1, :, :2])

    @pytest.mark.parametrize("name", COMBINATIONS)
    def test_rerun_is_bitwise_equal(self, name):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        first = attention(q, k, v, **COMBINATIONS[name])
        for x, y in zip(attention(q, k, v, **COMBINATIONS[name]), first, strict=True):
            np.testing.assert_array_equal(x, y)

    # lse, transformations.

    @pytest.mark.parametrize("recipe", NAMED)
    @pytest.mark.parametrize("name", COMBINATIONS)
    def test_lse_costs_nothing_in_out(self, name, recipe):
        """Without it a kernel may be another."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        options = {**COMBINATIONS[name], "recipe": recipe}
        out, _ = attention(q, k, v, **options)
        np.testing.assert_array_equal(jax_sage.attention(q, k, v, **options), out)

    def test_bias_that_is_alike_for_all_keys(self):
        """It moves lse and nothing else."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        # Powers of two in P: it is rounded alike.
        bias = np.random.default_rng(0).integers(-4, 5, (1, N, T, 1)) * np.float32(math.log(2))
        plain, lse = attention(q, k, v)
        out, moved = attention(q, k, v, bias=bias)
        np.testing.assert_allclose(
            moved - lse, np.moveaxis(bias[..., 0], 1, 2) + 0 * lse, atol=1e-4
        )
        # The sum with the bias is rounded, and now and then moves a P over a boundary of E4M3.
        assert np.abs(out - plain).mean() < 1e-3 * np.abs(plain).mean()

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_bias_that_towers(self, dtype):
        """ALiBi-like slopes and a key that takes it all."""
        q, k, v = reference.inputs("normal", QUERY, KEY)
        bias = -np.abs(np.arange(T)[:, None] - np.arange(S)) * np.float32(0.5)
        bias[3, 77] = 1e4
        bias = bias.astype(dtype)
        out, lse = attention(q, k, v, bias=bias)
        np.testing.assert_allclose(lse[:, 3], 1e4, rtol=1e-3)
        expected = reference.analyse(q, k, v, bias=bias)
        reference.assert_accurate(out, lse, expected)

    @pytest.mark.parametrize(
        "axes",
        [
            {"q": 0, "k": 0, "v": 0, "mask": None, "bias": None, "lengths": None, "ids": None},
            {
                "q": None,
                "k": None,
                "v": None,
                "mask": 0,
                "bias": None,
                "lengths": None,
                "ids": None,
            },
            {"q": 0, "k": None, "v": None, "mask": None, "bias": 2, "lengths": 1, "ids": 0},
            {"q": 1, "k": 0, "v": None, "mask": 4, "bias": 0, "lengths": 0, "ids": 1},
        ],
        ids=["arrays", "mask", "q, bias, lengths", "mixed"],
    )
    def test_vmap(self, axes):
        size = 3
        q, k, v = reference.inputs("normal", (size, B, 20, N, 16), (size, B, 30, K, 16))
        given = {
            "q": q,
            "k": k,
            "v": v,
            "mask": random_mask((size, 1, N, 20, 30)),
            "bias": random_bias((size, B, 1, 1, 30)),
            "lengths": np.array([[30, 7], [1, 20], [29, 30]]),
            "ids": np.random.default_rng(0).integers(0, 2, (size, B, 30)).astype(np.int32),
        }
        arguments = {
            n: x[0] if axes[n] is None else np.moveaxis(x, 0, axes[n]) for n, x in given.items()
        }

        def both(q, k, v, mask, bias, lengths, ids):
            return jax_sage.attention(
                q,
                k,
                v,
                mask=mask,
                bias=bias,
                key_value_seq_lengths=lengths,
                query_segment_ids=ids[:, :20],
                key_value_segment_ids=ids,
                local_window_size=(10, 15),
                return_residual=True,
            )

        run = jax.vmap(both, in_axes=tuple(axes.values()))
        actual = [np.asarray(x) for x in run(*arguments.values())]
        for i in range(size):
            one = (x[0] if axes[n] is None else x[i] for n, x in given.items())
            expected = [np.asarray(x) for x in both(*one)]
            assert_equal_up_to_order([x[i] for x in actual], expected, v)

    def test_traced_masks_under_jit(self):
        q, k, v = map(jnp.asarray, reference.inputs("normal", QUERY, KEY))
        options = COMBINATIONS["everything"]
        arrays = {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
        static = {n: x for n, x in options.items() if n not in arrays}

        @jax.jit
        def run(q, k, v, arrays):
            return jax_sage.attention(q, k, v, **arrays, **static)

        out = jax_sage.attention(q, k, v, **options)
        np.testing.assert_array_equal(run(q, k, v, arrays), out)
        assert jax.eval_shape(run, q, k, v, arrays).shape == out.shape

    def test_lse_merges_what_masks_split(self):
        q, k, v = reference.inputs("normal", QUERY, KEY)
        mask = random_mask((B, N, T, S), 0.5)
        parts = [attention(q, k, v, mask=m) for m in (mask, ~mask)]
        whole = np.logaddexp(parts[0][1], parts[1][1])
        merged = sum(np.exp(lse - whole)[..., None] * out for out, lse in parts)
        reference.assert_accurate(merged, None, reference.analyse(q, k, v))
        np.testing.assert_allclose(whole, reference.attention(q, k, v)[1], atol=0.05)

    @pytest.mark.parametrize("length", [1, 2])
    def test_shortest(self, length):
        """One key: its value, if it is seen."""
        q, k, v = reference.inputs("normal", (1, length, 2, 8), (1, 1, 2, 8))
        for options in (
            {"local_window_size": 0, "causal_alignment": "bottom_right"},
            {"mask": np.ones((length, 1), bool)},
            {"key_value_seq_lengths": np.array([1])},
            {
                "query_segment_ids": np.full((1, length), 3, np.int32),
                "key_value_segment_ids": np.full((1, 1), 3, np.int32),
            },
        ):
            out, _ = attention(q, k, v, **options)
            np.testing.assert_allclose(out[:, -1], v[:, 0], rtol=2.0**-8)
        of_another = {
            "query_segment_ids": np.full((1, length), 3, np.int32),
            "key_value_segment_ids": np.full((1, 1), 4, np.int32),
        }
        out, lse = attention(q, k, v, **of_another)
        assert not out.any() and np.isneginf(lse).all()

    @pytest.mark.not_emulated
    def test_a_long_window(self):
        """2^17 keys: positions beyond 2^16, and the cost of the window, not of all of them."""
        q, k, v = reference.inputs("normal", (1, 1 << 17, 1, 8), (1, 1 << 17, 1, 8), "bfloat16")
        out = np.asarray(jax_sage.attention(q, k, v, local_window_size=(100, 20)))
        for row in (0, 50, 65536, (1 << 17) - 1):
            keys = slice(max(row - 100, 0), row + 21)
            expected, _ = reference.attention(q[:, row : row + 1], k[:, keys], v[:, keys])
            # Errors of one row of 8 channels: 3 sigma of the 4 % of a typical term.
            limit = 0.15 * np.abs(v[:, keys].astype(float)).max() / math.sqrt(20)
            assert np.abs(out[:, row].astype(float) - expected[:, 0]).max() < limit + 0.02
