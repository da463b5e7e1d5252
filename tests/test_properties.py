"""Properties that hold for any input (hypothesis).

Each new shape is compiled, which takes longer than to run it: shapes come from short lists, the
data from seeds.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import reference
from suite import attention, pv_of

from jax_sage import RECIPES

hypothesis.settings.register_profile(
    "jax_sage", deadline=None, max_examples=15, derandomize=True, database=None
)
hypothesis.settings.load_profile("jax_sage")

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


seeds = st.integers(0, 2**32 - 1)
recipes = st.sampled_from(sorted(RECIPES))
kinds = st.sampled_from(reference.DISTRIBUTIONS)
# One shape for the properties of the data: 3 blocks of keys, the last one not full.
QUERY, KEY = (1, 70, 4, 32), (1, 150, 2, 32)


@hypothesis.given(
    batch=st.sampled_from([(), (2,), (1, 2)]),
    lengths=st.tuples(*[st.sampled_from([1, 7, 64, 100, 129])] * 2),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([1, 5, 16, 72, 128]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    is_causal=st.booleans(),
    recipe=recipes,
    kind=st.sampled_from(["normal", "outlier", "constant"]),
    seed=seeds,
)
def test_any_shape_is_accurate(
    batch, lengths, kv_heads, group, head_dim, dtype, is_causal, recipe, kind, seed
):
    shapes = [
        (*batch, length, heads, head_dim)
        for length, heads in zip(lengths, (kv_heads * group, kv_heads), strict=True)
    ]
    q, k, v = reference.inputs(kind, *shapes, dtype, seed)
    out, lse = attention(q, k, v, recipe=recipe, is_causal=is_causal)
    expected = reference.analyse(q, k, v, is_causal=is_causal, pv=pv_of(recipe))
    reference.assert_accurate(out, lse, expected, pv=pv_of(recipe))


def maybe(strategy):
    return st.one_of(st.none(), strategy)


BATCH, HEADS = 2, 4
QUERIES, KEYS = 20, 90


@st.composite
def what_is_seen(draw):
    """Any combination of the arguments that say what a query sees."""
    rng = np.random.default_rng(draw(seeds))
    forms = st.tuples(*(st.sampled_from([1, n]) for n in (BATCH, HEADS, QUERIES, KEYS)))
    options = {"is_causal": draw(st.booleans())}
    if shape := draw(maybe(forms)):
        options["mask"] = rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if shape := draw(maybe(forms)):
        options["bias"] = 3 * rng.standard_normal(shape).astype(np.float32)
    if draw(st.booleans()):
        options["query_seq_lengths"] = rng.integers(0, QUERIES + 1, BATCH).astype(np.int32)
    if draw(st.booleans()):
        options["key_value_seq_lengths"] = rng.integers(0, KEYS + 1, BATCH).astype(np.int32)
    options["local_window_size"] = draw(maybe(st.tuples(*[st.sampled_from([0, 5, 70])] * 2)))
    return options


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    seen=what_is_seen(),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
    segments=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    recipe=recipes,
    seed=seeds,
)
def test_any_combination_of_masks(seen, alignment, segments, kv_heads, recipe, seed):
    """Against float64; and that, which is ours, against jax.nn as far as it goes."""
    shapes = (BATCH, QUERIES, HEADS, 32), (BATCH, KEYS, kv_heads, 32)
    q, k, v = reference.inputs("normal", *shapes, seed=seed)
    expected, expected_lse = reference.attention(q, k, v, **seen)
    with jax.default_matmul_precision("highest"):
        theirs = jax.nn.dot_product_attention(q, k, v, implementation="xla", **seen)
    sees = ~np.isneginf(expected_lse)
    # Two float32 computations of scores up to 20, and of exponentials of them.
    np.testing.assert_allclose(np.asarray(theirs)[sees], expected[sees], atol=1e-4)

    seen = {**seen, "causal_alignment": alignment}
    if segments:
        rng = np.random.default_rng(seed)
        for name, length in (("query_segment_ids", QUERIES), ("key_value_segment_ids", KEYS)):
            seen[name] = rng.integers(0, 3, (BATCH, length)).astype(np.int32)
    out, lse = attention(q, k, v, recipe=recipe, **seen)
    analysis = reference.analyse(q, k, v, pv=pv_of(recipe), **seen)
    reference.assert_accurate(out, lse, analysis, pv=pv_of(recipe))


@hypothesis.given(seed=seeds, recipe=recipes, kind=kinds, is_causal=st.booleans())
def test_any_data_is_accurate(seed, recipe, kind, is_causal):
    q, k, v = reference.inputs(kind, QUERY, KEY, seed=seed, rounded=False)
    out, lse = attention(q, k, v, recipe=recipe, is_causal=is_causal)
    expected = reference.analyse(q, k, v, is_causal=is_causal, pv=pv_of(recipe))
    reference.assert_accurate(out, lse, expected, pv=pv_of(recipe), kind=kind)


@hypothesis.given(seed=seeds, recipe=recipes)
def test_order_of_keys_does_not_matter(seed, recipe):
    """A permutation puts keys into other groups of INT8 scales, and others into K's mean."""
    q, k, v = reference.inputs("normal", QUERY, KEY, seed=seed)
    order = np.random.default_rng(seed).permutation(KEY[1])
    out, lse = attention(q, k, v, recipe=recipe)
    other, other_lse = attention(q, k[:, order], v[:, order], recipe=recipe)
    expected = reference.analyse(q, k, v, pv=pv_of(recipe))
    # P and V round alike unless a score moved: the error of scores alone, which is that of 8+16,
    # twice; where P is E4M3, a small move of the score now and then becomes one of 2^-3. The most
    # of 30 seeds was 3.1 %, with FP16 0.9 %.
    reference.assert_accurate(other, other_lse, expected, pv=pv_of(recipe))
    difference = np.abs(out - other).mean() / expected.typical.mean()
    assert difference <= {"fp8": 0.035, "fp16": 0.015}[pv_of(recipe)]
    assert np.abs(lse - other_lse).max() <= 0.05  # 5 sigma of the 1 % of a score


@hypothesis.given(seed=seeds, recipe=recipes, size=st.sampled_from([1.0, 30.0]))
def test_a_constant_added_to_all_keys(seed, recipe, size):
    """leaves the output as it was (smoothing takes it off again) and moves lse by q·c."""
    q, k, v = reference.inputs("normal", QUERY, KEY, seed=seed)
    c = size * np.random.default_rng(seed).standard_normal(KEY[-1]).astype(np.float32)
    _, lse = attention(q, k, v, recipe=recipe)
    moved, moved_lse = attention(q, k + c, v, recipe=recipe)
    expected = reference.analyse(q, k, v, pv=pv_of(recipe))
    # The mean that is taken off is a bfloat16: what remains of c is up to 2^-9 |c| = 0.2 at 3
    # sigma, which makes the INT8 steps a little larger.
    reference.assert_accurate(moved, None, expected, pv=pv_of(recipe))
    shift = (q.astype(np.float64) @ c) / np.sqrt(KEY[-1])
    assert np.abs(moved_lse - lse - shift).max() <= 0.05  # as above


@hypothesis.given(seed=seeds, recipe=recipes, exponent=st.integers(-40, 40))
def test_power_of_two_times_v(seed, recipe, exponent):
    """is a power of two times the output, to the bit: codes do not change."""
    q, k, v = reference.inputs("outlier", QUERY, KEY, seed=seed)
    out, lse = attention(q, k, v, recipe=recipe)
    scaled, scaled_lse = attention(q, k, v * np.float32(2.0**exponent), recipe=recipe)
    np.testing.assert_array_equal(scaled, out * np.float32(2.0**exponent))
    np.testing.assert_array_equal(scaled_lse, lse)


@hypothesis.given(seed=seeds, recipe=recipes, exponent=st.integers(-20, 20))
def test_powers_of_two_between_q_and_k(seed, recipe, exponent):
    """A factor moved from K to Q leaves scores and codes as they were."""
    q, k, v = reference.inputs("outlier", QUERY, KEY, seed=seed)
    factor = np.float32(2.0**exponent)
    expected = attention(q, k, v, recipe=recipe)
    for x, y in zip(attention(q * factor, k / factor, v, recipe=recipe), expected, strict=True):
        np.testing.assert_array_equal(x, y)


@hypothesis.given(seed=seeds, recipe=recipes, is_causal=st.booleans())
def test_output_is_an_average(seed, recipe, is_causal):
    """It lies between the smallest and the largest V of its channel, but for their rounding."""
    q, k, v = reference.inputs("heavy", QUERY, KEY, seed=seed)
    out, _ = attention(q, k, v, recipe=recipe, is_causal=is_causal)
    v = np.repeat(v, 2, -2)
    low, high = v.min(1, keepdims=True), v.max(1, keepdims=True)
    # A code and the mean code are off by 1/17 of at most the range; FP16 sums by 2^-8.
    slack = (2 / 17 + 2.0**-8) * (high - low)
    assert np.all(out >= low - slack)
    assert np.all(out <= high + slack)


@hypothesis.given(seed=seeds, recipe=recipes)
def test_causal_does_not_see_later_values(seed, recipe):
    """Queries before a changed token of V with the same mean and extrema are bitwise the same."""
    q, k, v = reference.inputs("normal", QUERY, KEY, seed=seed)
    other = v.copy()
    other[:, 100:] = v[:, :99:-1]  # the same values in another order: the same statistics
    rows = slice(None, 70)  # T = 70: all of them lie before token 100
    out, lse = attention(q, k, v, recipe=recipe, is_causal=True)
    changed, changed_lse = attention(q, k, other, recipe=recipe, is_causal=True)
    # The FP32 sum of V in another order moves the mean by an ulp; its bfloat16 does not move.
    np.testing.assert_allclose(changed[:, rows], out[:, rows], rtol=0, atol=2.0**-20)
    np.testing.assert_array_equal(changed_lse, lse)


@hypothesis.given(seed=seeds, recipe=recipes)
def test_queries_are_independent(seed, recipe):
    q, k, v = reference.inputs("normal", QUERY, KEY, seed=seed)
    order = np.random.default_rng(seed).permutation(QUERY[1])
    out, lse = attention(q, k, v, recipe=recipe)
    other, other_lse = attention(q[:, order], k, v, recipe=recipe)
    # The same sums at another place of a matrix product: FP32 order at most, which an FP16 partial
    # sum of up to 4 blocks of |v| <= 5 may turn into 2^-11 of it; the FP16 accumulators apart,
    # nothing.
    np.testing.assert_allclose(other, out[:, order], rtol=0, atol=2.0**-11 * np.abs(v).max())
    np.testing.assert_allclose(other_lse, lse[:, order], rtol=0, atol=2.0**-18 * 8)


@hypothesis.given(seed=seeds, recipe=recipes)
def test_repeated_heads_equal_grouped_heads(seed, recipe):
    q, k, v = reference.inputs("normal", QUERY, KEY, seed=seed)
    out, lse = attention(q, k, v, recipe=recipe)
    repeated = (np.repeat(x, 2, -2) for x in (k, v))
    other, other_lse = attention(q, *repeated, recipe=recipe)
    np.testing.assert_allclose(other, out, rtol=0, atol=2.0**-11 * np.abs(v).max())  # as above
    np.testing.assert_allclose(other_lse, lse, rtol=0, atol=2.0**-18 * 8)
