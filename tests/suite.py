"""Tests that hold on every backend. test_portable.py and test_gpu.py each run them on theirs."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

import jax_sage
from jax_sage import RECIPES, Recipe

# Beside the named ones, each field changed alone.
MORE_RECIPES = {
    "8+8 fp32": Recipe(pv_accumulator="fp32"),
    "8+16 fp16": Recipe(pv="fp16", pv_accumulator="fp16"),
    "rough k": Recipe(smooth_k=False),
    "rough v": Recipe(smooth_v=False),
}
NAMED = list(RECIPES)
BOTH_MASKS = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def pv_of(recipe) -> str:
    return (RECIPES[recipe] if isinstance(recipe, str) else recipe).pv


def attention(q, k, v, **options):
    """out and lse as numpy arrays; options as for jax_sage.attention."""
    out, lse = jax_sage.attention(q, k, v, return_residual=True, **options)
    assert out.dtype == np.asarray(q).dtype
    return np.asarray(out), np.asarray(lse)


def check(q, k, v, *, recipe="8+8", kind="normal", **options):
    """Runs the attention on q, k, v and holds it to float64."""
    out, lse = attention(q, k, v, recipe=recipe, **options)
    expected = reference.analyse(q, k, v, pv=pv_of(recipe), **options)
    reference.assert_accurate(out, lse, expected, pv=pv_of(recipe), kind=kind)


def assert_equal_up_to_order(actual, expected, v):
    """Equal but for the order of sums.

    Batched otherwise, the FP32 sums of one matrix product may come in another order, and the FP16
    partial sums then round otherwise now and then: 4 roundings of 2^-11, each of both results and
    of their row sums, of a value not above the largest |v - v̄| <= 2 max|v|; and the output's own
    rounding.
    """
    largest = np.abs(np.asarray(v, np.float64)).max()
    for x, y in zip(actual, expected, strict=True):
        bound = 4 * 4 * 2.0**-11 * 2 * largest + 2 * reference.half_ulp(y.astype(float), y.dtype)
        x, y = x.astype(np.float64), y.astype(np.float64)
        with np.errstate(invalid="ignore"):  # -inf - -inf
            assert np.all((np.abs(x - y) <= bound) | (x == y))


class AttentionSuite:
    # Accuracy.

    @pytest.mark.parametrize("kind", reference.DISTRIBUTIONS)
    @pytest.mark.parametrize("recipe", NAMED)
    def test_distribution(self, recipe, kind):
        shape = (1, 320, 4, 64)
        check(*reference.inputs(kind, shape, shape), recipe=recipe, kind=kind)

    @pytest.mark.parametrize("recipe", MORE_RECIPES.values(), ids=MORE_RECIPES)
    def test_every_field_of_the_recipe(self, recipe):
        shape = (1, 320, 4, 64)
        check(*reference.inputs("normal", shape, shape), recipe=recipe)

    def test_smoothing_is_worth_it(self):
        """Fields that did nothing would not be noticed by their accuracy."""
        shape = (1, 320, 4, 64)
        q, k, v = reference.inputs("outlier", shape, shape)
        exact, _ = reference.attention(q, k, v)
        rough_k, rough_v, smooth = (
            reference.relative_l1(attention(q, k, v, recipe=recipe)[0], exact)
            for recipe in (MORE_RECIPES["rough k"], MORE_RECIPES["rough v"], "8+8")
        )
        # Channel means of 15 beside a standard deviation of 1: INT8 steps become 5 times as
        # large, and E4M3 errors of V those of 15, not of 1, in 4 of 64 channels.
        assert rough_k > 1.3 * smooth
        assert rough_v > 1.3 * smooth

    @pytest.mark.parametrize("recipe", NAMED)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_dtype(self, dtype, recipe):
        shape = (1, 128, 2, 64)
        check(*reference.inputs("normal", shape, shape, dtype, rounded=False), recipe=recipe)

    # Shapes.

    @pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)], ids=["rank3", "rank4", "rank6"])
    def test_rank(self, batch):
        check(*reference.inputs("normal", (*batch, 96, 4, 32), (*batch, 80, 2, 32)))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (5, 1), (3, 3)])
    def test_grouped_heads(self, heads, kv_heads):
        """Every head of K and V differs from the others, so a wrong mapping is a wrong output."""
        q, k, v = reference.inputs("normal", (2, 70, heads, 32), (2, 70, kv_heads, 32))
        v = v + 10 * np.arange(kv_heads, dtype=np.float32)[:, None]
        check(q, k, v)
        out, _ = attention(q, k, v)
        for head in range(heads):
            mean = 10 * (head // (heads // kv_heads))
            assert abs(out[:, :, head].mean() - mean) < 1  # means of V are 10 apart

    @pytest.mark.parametrize(
        ("length_q", "length_kv"),
        [
            (1, 1),
            (1, 129),
            (2, 1),
            (63, 65),
            (65, 63),
            (64, 64),
            (127, 128),
            (200, 321),
            (321, 200),
        ],
    )
    @BOTH_MASKS
    def test_length(self, length_q, length_kv, is_causal):
        """No length is a multiple of anything; causal is aligned at the first token."""
        shapes = (1, length_q, 2, 32), (1, length_kv, 2, 32)
        check(*reference.inputs("normal", *shapes), is_causal=is_causal)

    @pytest.mark.parametrize("head_dim", [1, 3, 64, 80, 127])
    def test_head_dim(self, head_dim):
        shape = (2, 96, 2, head_dim)
        check(*reference.inputs("normal", shape, shape, "bfloat16"))

    @pytest.mark.parametrize("head_dim", [40, 128])
    def test_fp16_head_dim_and_length(self, head_dim):
        q, k, v = reference.inputs("normal", (1, 131, 2, head_dim), (1, 77, 1, head_dim), "float16")
        check(q, k, v, recipe="8+16", is_causal=True)

    def test_causal_sees_the_first_keys(self):
        """Top-left: query t sees keys 0..t, whatever T and S. Bottom-right would fail this."""
        q, k, v = reference.inputs("normal", (1, 5, 2, 32), (1, 9, 2, 32))
        out, lse = attention(q, k, v, is_causal=True)
        # Query 0 sees one key: P is rounded alike in output and row sum. What is left is the
        # rounding of V's code and of the mean code.
        bound = (1 / 17 + 1 / 17) * 2 * np.abs(v).max()
        assert np.abs(out[:, 0] - v[:, 0]).max() <= bound
        first = (q[:, 0] * k[:, 0]).sum(-1) / math.sqrt(32)
        assert np.abs(lse[:, 0] - first).max() < 0.1  # two scores of normal data differ by 1

    @BOTH_MASKS
    def test_nothing_to_see(self, is_causal):
        q = np.ones((2, 3, 4, 8), np.float16)
        k = np.ones((2, 0, 2, 8), np.float16)
        out, lse = attention(q, k, k, is_causal=is_causal)
        np.testing.assert_array_equal(out, np.zeros_like(q))
        np.testing.assert_array_equal(lse, np.full((2, 3, 4), -np.inf, np.float32))

    @pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)])
    def test_no_query(self, shape):
        k = np.ones((shape[0], 5, 2, 8), np.float32)
        out, lse = attention(np.ones(shape, np.float32), k, k)
        assert out.shape == shape
        assert lse.shape == shape[:-1]

    # lse.

    @BOTH_MASKS
    def test_lse_has_the_mean_of_k(self, is_causal):
        """With K far from zero q·k̄ is most of lse: without it, it would be off by tens."""
        shape = (2, 96, 2, 64)
        q, k, v = reference.inputs("normal", shape, shape)
        q, k = q + np.float32(1), k + np.float32(5)
        _, lse = attention(q, k, v, is_causal=is_causal)
        _, expected = reference.attention(q, k, v, is_causal=is_causal)
        assert np.abs(expected).mean() > 20
        # Scores have an error of 1 % for normal Q and K, here times |q| = sqrt(2): 5 sigma.
        assert np.abs(lse - expected).max() < 0.07

    def test_lse_merges_two_halves(self):
        """What ring attention does: attentions to two sets of keys, put together by lse."""
        q, k, v = reference.inputs("outlier", (1, 96, 2, 64), (1, 192, 2, 64))
        parts = [attention(q, k[:, half], v[:, half]) for half in (slice(96), slice(96, None))]
        weights = np.exp([lse - np.logaddexp(parts[0][1], parts[1][1]) for _, lse in parts])
        merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
        expected = reference.analyse(q, k, v)
        reference.assert_accurate(merged, None, expected)

    @pytest.mark.parametrize("recipe", NAMED)
    def test_asking_for_lse_does_not_change_the_output(self, recipe):
        q, k, v = reference.inputs("normal", (2, 96, 4, 64), (2, 200, 2, 64))
        out, _ = attention(q, k, v, recipe=recipe)
        np.testing.assert_array_equal(jax_sage.attention(q, k, v, recipe=recipe), out)

    # Scale.

    @pytest.mark.parametrize("scale", [0.0, -0.2, 0.5, 1e-6])
    def test_scale(self, scale):
        shape = (1, 96, 2, 64)
        q, k, v = reference.inputs("normal", shape, shape)
        out, lse = attention(q, k, v, scale=scale)
        expected = reference.analyse(q, k, v, scale=scale)
        reference.assert_accurate(out, lse, expected, kind="heavy" if scale == 0.5 else "normal")

    def test_scale_zero_is_the_mean(self):
        """All P are equal and exact; the rounding errors of V cancel against those of its mean."""
        shape = (1, 96, 2, 64)
        q, k, v = reference.inputs("normal", shape, shape)
        out, lse = attention(q, k, v, scale=0)
        # FP16 sums of 64 codes: 4 roundings of 2^-11 of at most 1.5 blocks of mean |v - v̄|.
        bound = 4 * 2.0**-11 * 2 * np.abs(v).max()
        assert np.abs(out - v.mean(1, keepdims=True)).max() <= bound
        np.testing.assert_allclose(lse, np.log(96), rtol=1e-6)

    @pytest.mark.parametrize(
        ("of_q", "of_k", "of_v"),
        [(1, 1, 1e30), (1, 1, 1e-30), (1e30, 1e-30, 1), (1e-30, 1e30, 1), (1e-30, 1e-30, 1e-30)],
    )
    @pytest.mark.parametrize("recipe", NAMED)
    def test_magnitude(self, of_q, of_k, of_v, recipe):
        shape = (1, 96, 2, 64)
        q, k, v = reference.inputs("normal", shape, shape)
        q, k, v = q * np.float32(of_q), k * np.float32(of_k), v * np.float32(of_v)
        check(q, k, v, recipe=recipe)

    # Transformations.

    @pytest.mark.parametrize(
        "axes",
        [(0, 0, 0), (0, None, None), (None, 1, None), (None, None, -1), (2, 0, 4)],
        ids=str,
    )
    @BOTH_MASKS
    def test_vmap(self, axes, is_causal):
        shapes = (3, 2, 20, 4, 16), (3, 2, 30, 2, 16)
        arrays = reference.inputs("normal", *shapes, "bfloat16")
        given = [
            x[0] if a is None else np.moveaxis(x, 0, a) for x, a in zip(arrays, axes, strict=True)
        ]

        def both(q, k, v):
            return jax_sage.attention(q, k, v, return_residual=True, is_causal=is_causal)

        actual = [np.asarray(x) for x in jax.vmap(both, in_axes=axes)(*given)]
        single = [
            both(*(x[0] if a is None else x[i] for x, a in zip(arrays, axes, strict=True)))
            for i in range(3)
        ]
        expected = [
            np.stack([np.asarray(x) for x in result]) for result in zip(*single, strict=True)
        ]
        assert_equal_up_to_order(actual, expected, arrays[2])

    def test_vmap_twice(self):
        shape = (2, 3, 2, 20, 2, 16)
        q, k, v = reference.inputs("normal", shape, shape)
        f = jax.vmap(jax.vmap(jax_sage.attention, (0, None, 0)), (1, 0, None), 1)
        out = np.asarray(f(q, k[0], v[:, 0]))
        for i in range(2):
            for j in range(3):
                expected, _ = attention(q[i, j], k[0, j], v[i, 0])
                assert_equal_up_to_order([out[i, j]], [expected], v)

    def test_same_eager_jit_and_ahead_of_time(self):
        shape = (1, 100, 2, 32)
        q, k, v = map(jnp.asarray, reference.inputs("normal", shape, shape, "bfloat16"))

        def both(q, k, v):
            return jax_sage.attention(q, k, v, return_residual=True)

        eager = both(q, k, v)
        abstract = jax.eval_shape(both, q, k, v)
        for run in (jax.jit(both), jax.jit(both).lower(q, k, v).compile()):
            for x, y, z in zip(run(q, k, v), eager, abstract, strict=True):
                np.testing.assert_array_equal(x, y)
                assert (x.shape, x.dtype) == (z.shape, z.dtype)
                assert not z.weak_type

    @pytest.mark.parametrize("recipe", NAMED)
    def test_rerun_is_bitwise_equal(self, recipe):
        q, k, v = reference.inputs("normal", (2, 300, 4, 64), (2, 700, 2, 64), "bfloat16")
        first = attention(q, k, v, recipe=recipe)
        for _ in range(3):
            for x, y in zip(attention(q, k, v, recipe=recipe), first, strict=True):
                np.testing.assert_array_equal(x, y)

    def test_inside_a_larger_program(self):
        """Fused with what comes before and after, and called in a loop."""
        shape = (1, 100, 2, 32)
        q, k, v = reference.inputs("normal", shape, shape)

        @jax.jit
        def twice(q, k, v):
            def step(x, _):
                return jax_sage.attention(x * 2, k + 1, v) - 3, None

            return jax.lax.scan(step, q, None, length=2)[0]

        once = reference.attention(q * 2, k + 1, v)[0] - 3
        expected = reference.analyse(once * 2, k + 1, v)
        out = np.asarray(twice(q, k, v)) + 3
        # The errors of the first call are in the scores of the second: those of heavy tails cover
        # them (once is -3 in most channels, so that a score is a sum of 32 similar errors).
        assert reference.relative_l1(out - v.mean(1), expected.out - v.mean(1)) < 0.1

    def test_arguments_are_left_alone(self):
        """Smoothing in place changed the caller's K elsewhere."""
        q, k, v = map(
            jnp.asarray, reference.inputs("outlier", (1, 64, 2, 32), (1, 64, 2, 32), "bfloat16")
        )
        before = [np.array(x) for x in (q, k, v)]
        jax.block_until_ready(jax_sage.attention(q, k, v))
        for x, y in zip((q, k, v), before, strict=True):
            np.testing.assert_array_equal(x, y)

    # Values that broke other implementations.

    @pytest.mark.parametrize("recipe", NAMED)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_constant_channels_are_exact(self, dtype, recipe):
        """A channel of V of zeros, or of one value, comes out as it is: no 0 · inf, no 0 / 0."""
        shape = (1, 96, 2, 16)
        q, k, v = (np.array(x) for x in reference.inputs("normal", shape, shape, dtype))
        constants = np.array([0, 1, -3.5, 192, 2.0**-60, -(2.0**60)])
        v[..., : constants.size] = constants
        k[..., :2] = 0, 7
        out, _ = attention(q, k, v, recipe=recipe)
        # One rounding each of the sum of V, of 1/S, of their product: exact in bfloat16.
        rtol = 0 if dtype == "bfloat16" else 2.0**-22 * math.log2(96)
        np.testing.assert_allclose(
            out[..., : constants.size].astype(np.float64),
            np.broadcast_to(constants, out[..., : constants.size].shape),
            rtol=rtol,
        )
        check(q, k, v, recipe=recipe)

    @pytest.mark.parametrize("recipe", NAMED)
    def test_constant_that_bfloat16_does_not_hold(self, recipe):
        """The mean subtracted is rounded, what it leaves is a constant too."""
        shape = (1, 96, 2, 16)
        q, k, v = reference.inputs("normal", shape, shape)
        v = np.full_like(v, 1 + 2**-10 + 2**-20)
        out, _ = attention(q, k, v, recipe=recipe)
        # The remainder is below 2^-9; it meets a few FP16 roundings of 2^-11.
        np.testing.assert_allclose(out, v, rtol=8 * 2.0**-20)

    def test_all_zero(self):
        zero = np.zeros((1, 96, 2, 16), np.float32)
        out, lse = attention(zero, zero, zero)
        np.testing.assert_array_equal(out, zero)
        np.testing.assert_allclose(lse, np.log(96), rtol=1e-6)

    @pytest.mark.parametrize("recipe", NAMED)
    @pytest.mark.parametrize("largest", [6e4, 1e20, 1e32, 3e38, 3.3895e38])
    def test_large_v_does_not_overflow(self, largest, recipe):
        """bfloat16 V up to its largest number; cast to FP16, or summed there, it overflows."""
        shape = (1, 96, 2, 64)
        q, k, v = reference.inputs("normal", shape, shape)
        v = np.clip(v / np.abs(v).max(), -1, 1).astype(np.float64) * largest
        v = v.astype(ml_dtypes.bfloat16)
        v[:, 3:80, :, 0] = largest  # 3e38 times 77 is beyond float32
        assert np.isfinite(v.astype(np.float64)).all()
        q, k = (x.astype(v.dtype) for x in (q, k))
        check(q, k, v, recipe=recipe)

    @pytest.mark.parametrize("recipe", NAMED)
    def test_fp16_sums_do_not_overflow(self, recipe):
        """V at either end of its range."""
        shape = (1, 256, 1, 64)
        q, k, v = np.ones(shape, np.float16), np.ones(shape, np.float16), np.ones(shape, np.float16)
        v[:, 0] = -1
        check(q, k, v * np.float16(6e4), recipe=recipe)

    @pytest.mark.parametrize("pv", ["fp8", "fp16"])
    def test_largest_fp16_sums(self, pv):
        """P and V at their largest over 1100 keys: 64 · 1.875 · 512 is the most that FP16 holds.

        One key in 128 has a score so low that the average is far below the maximum: no kernel
        leaves room above P then.
        """
        q = np.full((1, 70, 1, 64), 50, np.float16)
        k = np.ones((1, 1100, 1, 64), np.float16)
        k[:, ::128] = -1
        v = np.ones(k.shape, np.float16)
        v[..., ::2] = -1
        recipe = jax_sage.Recipe(pv=pv, smooth_k=False, smooth_v=False)
        out, _ = attention(q, k, v, recipe=recipe)
        np.testing.assert_array_equal(out, np.broadcast_to(v[:, :1], out.shape))

    @pytest.mark.parametrize("recipe", NAMED)
    def test_attention_sink(self, recipe):
        """One key 9 nats above 8K others: they hold half of the weight, each of it too little.

        P of the others is e^-9 = 2^-13 of the largest. With 64 to 256 for that, they are 0.008 to
        0.03: E4M3 has them to 2^-10, up to 12 % of them, in the same direction for all. That share
        of their weight of 0.5 may go over to or from the sink.
        """
        length = 8103
        q = np.full((1, 64, 2, 64), 1 / 8, np.float32)
        k = np.zeros((1, length, 2, 64), np.float32)
        k[:, 5] = 9.0  # 64 * 9 / 8 / sqrt(64) = 9
        v = np.full(k.shape, 1.0, np.float32)
        v[:, 5] = -1
        out, _ = attention(q, k, v, recipe=recipe)
        share = (length - 1) / (length - 1 + math.exp(9))
        assert np.abs((1 + out) / 2 - share).max() < 0.25 * 0.12 + 0.01

    @pytest.mark.parametrize("recipe", NAMED)
    @BOTH_MASKS
    def test_rising_maximum(self, recipe, is_causal):
        """Scores that grow along the keys: every block has a new maximum."""
        q, k, v = reference.inputs("normal", (1, 200, 2, 64), (1, 1000, 2, 64))
        q = np.abs(q)
        k = (k + np.linspace(0, 6, 1000, dtype=np.float32)[:, None, None]).astype(np.float32)
        # The trend is as large as the values: INT8 codes are as coarse as for heavy tails.
        check(q, k, v, recipe=recipe, is_causal=is_causal, kind="heavy")

    @pytest.mark.parametrize(("dtype", "is_causal"), [("bfloat16", False), ("float32", True)])
    def test_neighbours_are_not_read(self, dtype, is_causal):
        """Lengths and heads cut out of larger arrays, in which everything else is NaN."""
        q, k, v = reference.inputs("normal", (2, 70, 2, 40), (2, 101, 2, 40), dtype)

        def surround(x):
            big = np.full((4, x.shape[1] + 60, 4, 64), np.nan, x.dtype)
            big[1:3, 7 : 7 + x.shape[1], 1:3, 8:48] = x
            return big

        @jax.jit
        def cut(q, k, v):
            parts = (
                x[1:3, 7 : 7 + length, 1:3, 8:48] for x, length in ((q, 70), (k, 101), (v, 101))
            )
            return jax_sage.attention(*parts, is_causal=is_causal, return_residual=True)

        actual = [np.asarray(x) for x in cut(*map(surround, (q, k, v)))]
        expected = attention(q, k, v, is_causal=is_causal)
        assert_equal_up_to_order(actual, expected, v)
        check(q, k, v, is_causal=is_causal)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("recipe", NAMED)
    @BOTH_MASKS
    def test_not_finite_query(self, bad, recipe, is_causal):
        """Reaches its own token and head alone. Each token has its own scale: the rest is equal."""
        shapes = (2, 130, 4, 16), (2, 130, 2, 16)
        q, k, v = reference.inputs("normal", *shapes)
        expected = [np.array(x) for x in attention(q, k, v, recipe=recipe, is_causal=is_causal)]
        q[1, 67, 2, 5] = bad
        out, lse = attention(q, k, v, recipe=recipe, is_causal=is_causal)
        for x, y in zip((out, lse), expected, strict=True):
            y[1, 67, 2] = np.nan
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("recipe", NAMED)
    @BOTH_MASKS
    def test_not_finite_key(self, bad, recipe, is_causal):
        """Reaches the queries that see it, and otherwise counts as zero: so it is bitwise."""
        shapes = (2, 130, 4, 16), (2, 130, 2, 16)
        q, k, v = reference.inputs("normal", *shapes)
        k[1, 67, 1, 5] = 0
        expected = [np.array(x) for x in attention(q, k, v, recipe=recipe, is_causal=is_causal)]
        k[1, 67, 1, 5] = bad
        out, lse = attention(q, k, v, recipe=recipe, is_causal=is_causal)
        for x, y in zip((out, lse), expected, strict=True):
            y[1, 67 if is_causal else 0 :, 2:] = np.nan  # query heads 2 and 3 share key head 1
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("recipe", NAMED)
    @BOTH_MASKS
    def test_not_finite_value(self, bad, recipe, is_causal):
        """Reaches its channel in the queries that see it; lse does not depend on V."""
        shapes = (2, 130, 4, 16), (2, 130, 2, 16)
        q, k, v = reference.inputs("normal", *shapes)
        v[1, 67, 1, 5] = 0
        out, lse = (np.array(x) for x in attention(q, k, v, recipe=recipe, is_causal=is_causal))
        v[1, 67, 1, 5] = bad
        actual = attention(q, k, v, recipe=recipe, is_causal=is_causal)
        out[1, 67 if is_causal else 0 :, 2:, 5] = np.nan
        np.testing.assert_array_equal(actual[0], out)
        np.testing.assert_array_equal(actual[1], lse)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("recipe", NAMED)
    @BOTH_MASKS
    def test_scores_that_fp32_does_not_resolve(self, recipe, is_causal, sign):
        """NaN, for want of a right result, to their query alone; up to there all is finite."""
        shape = (2, 130, 2, 16)
        q, k, v = reference.inputs("normal", shape, shape)
        k[:, ::2, :, 0] += 50  # k - k̄ is 25 or -25 there, and every query sees both
        expected = [np.array(x) for x in attention(q, k, v, recipe=recipe, is_causal=is_causal)]
        q[1, 67, 1] = sign * 1e7  # scores of 25 log2(e) / 4 = 9 times this; the limit is 1.7e7
        q[1, 68, 1] = sign * 1e6
        out, lse = attention(q, k, v, recipe=recipe, is_causal=is_causal)
        assert np.isfinite(out[1, 68, 1]).all() and np.isfinite(lse[1, 68, 1])
        for x, y in zip((out, lse), expected, strict=True):
            y[1, 67, 1] = np.nan
            y[1, 68, 1] = x[1, 68, 1]
            np.testing.assert_array_equal(x, y)

    def test_nothing_is_finite(self):
        nan = np.full((1, 70, 2, 16), np.nan, np.float32)
        out, lse = attention(nan, nan, nan)
        assert np.isnan(out).all()
        assert np.isnan(lse).all()

    def test_one_score_towers(self):
        """One key's score is 100 times the others': P of one key is 1, all others underflow."""
        shape = (1, 130, 1, 32)
        q, k, v = reference.inputs("normal", shape, shape)
        k[:, 77] = 100
        q = np.abs(q) + np.float32(1)
        out, lse = attention(q, k, v)
        bound = 2 / 17 * 2 * np.abs(v).max() + 2.0**-6
        assert np.abs(out - v[:, 77:78]).max() <= bound  # code of V and mean code: as above
        _, expected = reference.attention(q, k, v)
        np.testing.assert_allclose(lse, expected, rtol=0.01)  # INT8: 2^-8 of the largest channel
