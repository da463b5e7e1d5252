"""jax_sage.quantization against numpy and ml_dtypes, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from jax_sage import quantization
from jax_sage.masking import Segments
from jax_sage.recipe import P_MAX, RECIPES, V_MAX, Recipe

SCALE_LOG2 = 0.18
f32 = np.float32


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def every_interesting_value(dtype, largest):
    """All numbers of a narrow type, the points half-way between neighbours, and float32's
    neighbours of both; and some random ones."""
    bits = np.arange(1 << (8 * np.dtype(dtype).itemsize), dtype=np.uint32)
    bits = bits.astype(f"uint{8 * np.dtype(dtype).itemsize}")
    numbers = bits.view(dtype).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers) & (np.abs(numbers) <= largest)])
    halves = (numbers[1:] + numbers[:-1]) / 2  # exact in float32
    points = np.concatenate([numbers, halves]).astype(f32)
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(10000) * 2.0 ** rng.integers(-30, 8, 10000)
    drawn = drawn[np.abs(drawn) <= largest].astype(f32)
    up, down = np.nextafter(points, f32(np.inf)), np.nextafter(points, f32(-np.inf))
    values = np.concatenate([points, up, down, drawn])
    # The smallest float32 numbers may count as zero: they are flushed on some devices.
    return values[(np.abs(values) <= largest) & ((np.abs(values) >= 2.0**-126) | (values == 0))]


@pytest.mark.parametrize(
    ("function", "dtype", "largest"),
    [
        (quantization.round_e4m3, ml_dtypes.float8_e4m3fn, 448),
        (quantization.round_fp16, np.float16, 65504),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_rounding_is_that_of_the_type(function, dtype, largest, jitted):
    x = every_interesting_value(dtype, largest)
    assert x.size > 1000
    rounded = np.asarray((jax.jit(function) if jitted else function)(x))
    np.testing.assert_array_equal(rounded, x.astype(dtype).astype(f32))
    # The convert that stores a code therefore changes nothing.
    np.testing.assert_array_equal(rounded, rounded.astype(dtype).astype(f32))


def test_limits_cannot_overflow_fp16():
    assert P_MAX * V_MAX * 512 <= 65504  # keys, as recipe.py promises
    assert np.log2(P_MAX) % 1 == 0
    for dtype in (ml_dtypes.float8_e4m3fn, np.float16):
        assert f32(V_MAX).astype(dtype) == V_MAX
        assert f32(P_MAX).astype(dtype) == P_MAX


# The same definition, spelt with numpy: loops over tokens and groups, float32 throughout.


def numpy_query(q, scale_log2):
    codes, scales = np.zeros(q.shape, np.int8), np.zeros(q.shape[:-1], f32)
    for at in np.ndindex(q.shape[:-1]):
        x = np.where(np.isfinite(q[at]), q[at], f32(0))
        absmax = max(np.abs(x).max(), f32(2.0**-100))
        inverse = np.copysign(f32(127), f32(scale_log2)) / absmax
        codes[at] = np.rint(x * inverse)
        scales[at] = absmax * f32(abs(float(f32(scale_log2))) / 127)
        if not np.isfinite(q[at]).all():
            scales[at] = np.nan
    return codes, scales


def numpy_key(k, mean):
    """[S, H] of one head."""
    padded = np.zeros((-(-len(k) // 64) * 64, k.shape[1]), f32)
    padded[: len(k)] = k - mean
    codes, scales = np.zeros(padded.shape, np.int8), np.zeros((len(padded) // 64, 4), f32)
    for block in range(len(scales)):
        for j in range(4):
            keys = [64 * block + r for r in range(64) if r % 8 in (2 * j, 2 * j + 1)]
            absmax = max(np.abs(padded[keys]).max(), f32(2.0**-100))
            codes[keys] = np.rint(padded[keys] * (f32(127) / absmax))
            scales[block, j] = absmax * f32(1 / 127)
    return codes, scales


def numpy_value(v, mean, dtype):
    """[S, H] of one head."""
    centered = v - mean
    absmax = np.maximum(np.abs(centered).max(0), f32(2.0**-100))
    padded = np.zeros((-(-len(v) // 64) * 64, v.shape[1]), f32)
    down = np.where(absmax > 1, f32(2.0**-16), f32(1))
    padded[: len(v)] = centered * down * (f32(1.875) / (absmax * down))
    return padded.astype(dtype), absmax * f32(1 / 1.875)


def arrays(kind, length=150, head_dim=24, dtype="bfloat16"):
    return reference.inputs(kind, (2, 20, 4, head_dim), (2, length, 2, head_dim), dtype)


def quantize(q, k, v, recipe=RECIPES["8+8"], scale_log2=SCALE_LOG2, **options):
    run = jax.jit(quantization.quantize, static_argnames=("scale_log2", "recipe"))
    result = run(q, k, v, scale_log2=scale_log2, recipe=recipe, **options)
    return quantization.Quantized(*map(np.asarray, result))


def heads_first(x):
    return np.moveaxis(np.asarray(x).astype(f32), -3, -2)


@pytest.mark.parametrize("scale_log2", [SCALE_LOG2, -SCALE_LOG2, 0.0])
@pytest.mark.parametrize("kind", reference.DISTRIBUTIONS)
def test_query(kind, scale_log2):
    q, k, v = arrays(kind)
    x = quantize(q, k, v, scale_log2=scale_log2)
    codes, scales = numpy_query(heads_first(q), scale_log2)
    np.testing.assert_array_equal(x.q, codes)
    np.testing.assert_array_equal(x.q_scale, scales)
    assert np.abs(x.q).max() == 127


@pytest.mark.parametrize("length", [1, 8, 63, 64, 65, 150])
@pytest.mark.parametrize("smooth_k", [False, True])
def test_key(length, smooth_k):
    q, k, v = arrays("outlier", length)
    x = quantize(q, k, v, Recipe(smooth_k=smooth_k))
    k = heads_first(k)
    # bfloat16 values have 8 bits: float32 sums of 150 of them are exact, up to bits that the
    # rounding to bfloat16 hides.
    samples = k[..., quantization.is_sample(np.arange(length)), :].astype(np.float64)
    mean = (samples.mean(-2) * smooth_k).astype(ml_dtypes.bfloat16).astype(f32)
    for at in np.ndindex(k.shape[:2]):
        codes, scales = numpy_key(k[at], mean[at])
        np.testing.assert_array_equal(x.k[at], codes)
        np.testing.assert_array_equal(x.k_scale[at], scales)
        assert not x.k[at][length:].any()
    dot = np.einsum("bkgth,bkh->bkgt", heads_first(q).reshape(2, 2, 2, 20, -1), mean)
    np.testing.assert_allclose(
        x.q_dot_mean, dot.reshape(2, 4, 20) * SCALE_LOG2, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", reference.DISTRIBUTIONS)
@pytest.mark.parametrize("recipe", [*RECIPES.values(), Recipe(smooth_v=False)], ids=str)
def test_value(recipe, kind):
    q, k, v = arrays(kind)
    x = quantize(q, k, v, recipe)
    v = heads_first(v)
    mean = v.astype(np.float64).mean(-2) * recipe.smooth_v
    mean = mean.astype(f32).astype(ml_dtypes.bfloat16).astype(f32)
    dtype = ml_dtypes.float8_e4m3fn if recipe.pv == "fp8" else np.float16
    assert x.v.dtype == dtype
    for at in np.ndindex(v.shape[:2]):
        codes, scales = numpy_value(v[at], mean[at], dtype)
        np.testing.assert_array_equal(x.v[at].astype(f32), codes.astype(f32))
        np.testing.assert_array_equal(x.v_scale[at][0], scales)
    assert np.abs(x.v.astype(f32)).max() <= V_MAX


@pytest.mark.parametrize("kind", reference.DISTRIBUTIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_offset_restores_the_mean(recipe, kind):
    """Mean of dequantized V plus v_offset is the mean of V."""
    q, k, v = arrays(kind)
    x = quantize(q, k, v, RECIPES[recipe])
    v = heads_first(v).astype(np.float64)
    codes = x.v[..., : v.shape[-2], :].astype(np.float64)
    restored = (codes * x.v_scale + x.v_offset).mean(-2)
    # A few FP32 roundings: of the sum, of the code sum, of their difference.
    np.testing.assert_allclose(restored, v.mean(-2), rtol=0, atol=2.0**-20 * np.abs(v).max())


def test_no_offset_without_smoothing():
    x = quantize(*arrays("outlier"), Recipe(smooth_v=False))
    np.testing.assert_array_equal(x.v_offset, np.zeros_like(x.v_offset))


def test_no_mean_without_smoothing():
    x = quantize(*arrays("outlier"), Recipe(smooth_k=False))
    np.testing.assert_array_equal(x.q_dot_mean, np.zeros_like(x.q_dot_mean))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_as_zero(bad):
    q, k, v = (np.array(x) for x in arrays("normal", dtype="float32"))
    q[0, 3, 2, 5] = bad
    k[1, [70, 90], 0, 7] = bad
    v[0, [5, 149], 1, 3] = bad
    x = quantize(q, k, v)
    np.testing.assert_array_equal(np.argwhere(np.isnan(x.q_scale)), [[0, 2, 3]])
    zeros = quantize(*(np.where(np.isfinite(y), y, f32(0)) for y in (q, k, v)))
    for name in ("q", "k", "k_scale", "v", "v_scale", "v_offset"):
        np.testing.assert_array_equal(getattr(x, name), getattr(zeros, name), err_msg=name)


def test_means_of_k_are_of_half_the_keys():
    """Of each 64 the first or the last 32, and of no image are columns left out."""
    is_sample = quantization.is_sample(np.arange(65536))
    blocks = is_sample.reshape(-1, 2, 32)
    assert (blocks.all(-1) == ~blocks.any(-1)[:, ::-1]).all()  # one half as a whole
    np.testing.assert_array_equal(blocks[:4, 0, 0], [True, False, False, True])
    np.testing.assert_array_equal(jax.jit(quantization.is_sample)(np.arange(65536)), is_sample)
    for width in range(1, 400):
        share = is_sample[: 65536 // width * width].reshape(-1, width).mean(0)
        # Blocks of three have mostly the same parities at their ends, hence 0.26 with 192 columns.
        assert 0.25 < share.min() and share.max() < 0.75, width
    for width in (8, 16, 32, 64, 128, 256, 512):
        share = is_sample[:4096].reshape(-1, width).mean(0)
        assert (share == 0.5).all(), width

    q, k, v = arrays("outlier", dtype="float32")
    x = quantize(q, k, v)
    mean = k[:, is_sample[:150]].mean(1, dtype=np.float64)  # [B, K, H]
    mean = np.asarray(jnp.asarray(mean, jnp.bfloat16), np.float64).repeat(2, 1)
    expected = np.einsum("btnh,bnh->bnt", q.astype(np.float64), mean) * SCALE_LOG2
    # Sums in FP32; with the mean of all keys 95 % of these would be further off.
    np.testing.assert_allclose(x.q_dot_mean, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_that_are_not_seen_do_not_count(recipe):
    """As if they were not there, but for codes of zero at their place; whatever they hold."""
    q, k, v = arrays("outlier", dtype="float32")
    seen = np.zeros((2, 2, 150), bool)
    seen[..., 5:81] = True
    k[:, 100:], v[:, 3] = np.nan, 1e30
    x = quantize(q, k, v, RECIPES[recipe], seen=seen)
    # Moved to the place that they have in their block of 64 keys, so that they share scales alike.
    cut_k, cut_v = (np.where(seen[0, 0, :81, None, None], y[:, :81], f32(0)) for y in (k, v))
    some = quantize(q, cut_k, cut_v, RECIPES[recipe], seen=seen[..., :81])
    for name in ("q_dot_mean", "v_scale", "v_offset"):
        np.testing.assert_allclose(getattr(x, name), getattr(some, name), rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(x.k[..., :128, :], some.k)
    np.testing.assert_array_equal(x.v[..., :128, :].astype(f32), some.v.astype(f32))
    for codes in (x.k, x.v.astype(f32)):
        assert not codes[..., :5, :].any()
        assert not codes[..., 81:, :].any()
    alone = quantize(q, k[:, 5:81], v[:, 5:81], RECIPES[recipe])
    np.testing.assert_allclose(x.v_scale, alone.v_scale, rtol=1e-6)
    np.testing.assert_array_equal(x.v[..., 5:81, :], alone.v[..., :76, :])


@pytest.mark.parametrize("recipe", RECIPES)
def test_segments_are_quantized_each_for_itself(recipe):
    """Ids in any order; codes of V are those of the segment alone, whatever the others hold."""
    q, k, v = arrays("outlier", dtype="float32")
    key_ids = np.random.default_rng(0).choice(np.array([7, -3, 100], np.int32), (2, 150))
    query_ids = np.resize(np.array([100, 7, 5], np.int32), (2, 20))  # no key has 5
    size = {7: f32(1e-6), -3: f32(1), 100: f32(1e6)}
    factor = np.vectorize(size.get)(key_ids).astype(f32)[..., None, None]
    k, v = k * factor, v * factor
    segments = jax.jit(Segments.find)(query_ids, key_ids)
    x = quantize(q, k, v, RECIPES[recipe], segments=segments)
    key_index, query_index = np.asarray(segments.key_index), np.asarray(segments.query_index)

    def centered_keys(batch, segment):
        """[K, keys, H], and the absolute maximum of the samples."""
        own = heads_first(k[batch, key_ids[batch] == segment]).astype(np.float64)
        samples = quantization.is_sample(np.arange(own.shape[-2]))
        own -= reference.bf16(own[:, samples].mean(-2, keepdims=True))
        return own, np.abs(own[:, samples]).max((-1, -2), keepdims=True)

    for batch in range(2):
        for segment in (7, 100):
            keys, rows = key_ids[batch] == segment, query_ids[batch] == segment
            alone = quantize(q[batch, rows], k[batch, keys], v[batch, keys], RECIPES[recipe])
            entry = key_index[batch, keys][0]
            assert (key_index[batch, keys] == entry).all()
            assert (query_index[batch, rows] == entry).all()
            np.testing.assert_allclose(
                x.q_dot_mean[batch][:, rows], alone.q_dot_mean, rtol=1e-4, atol=1e-3 * size[segment]
            )
            np.testing.assert_allclose(x.v_scale[batch][:, entry], alone.v_scale[:, 0], rtol=1e-6)
            np.testing.assert_array_equal(
                x.v[batch][:, np.flatnonzero(keys)], alone.v[:, : keys.sum()]
            )
            # K: dequantized by its own scale and the factor that went to the queries.
            scale = np.repeat(x.k_scale[batch], 2, -1)  # [K, blocks, 8]
            scale = np.tile(scale, (1, 1, 8)).reshape(2, -1)[:, :150]
            centered = x.k[batch][:, :150].astype(np.float64) * scale[..., None]
            ratio = x.q_scale[batch][:, rows] / alone.q_scale  # of query heads
            assert (ratio == ratio[::2, :1].repeat(2, 0)).all()
            restored = centered[:, keys] * ratio[::2, :1, None]
            # A segment's size is the power of two of its samples' largest. Another's keys may be
            # twice its size, and as much more as they are larger than its samples.
            own, sampled_absmax = centered_keys(batch, segment)
            larger = [
                np.abs(x).max((-1, -2), keepdims=True) / most
                for x, most in (centered_keys(batch, other) for other in size)
            ]
            step = sampled_absmax * 2 * np.maximum.reduce(larger) / 127
            assert np.all(np.abs(restored - own) <= step * 0.501)


def test_zeros_have_scales_that_are_not():
    zero = np.zeros((1, 70, 2, 8), f32)
    x = quantize(zero, zero, zero)
    for codes in (x.q, x.k, x.v):
        assert not codes.astype(f32).any()
    for scale in (x.q_scale, x.k_scale, x.v_scale):
        assert np.isfinite(scale).all()
        assert (scale > 0).all()


@pytest.mark.parametrize("value", [1.0, -7.25, 2.0**-40, 2.0**60])
def test_constant_channels_have_codes_zero(value):
    """Exactly representable in bfloat16: nothing is left of them after smoothing."""
    constant = np.full((1, 97, 1, 8), value, f32)
    x = quantize(constant, constant, constant)
    assert not x.k.any()
    assert not x.v.astype(f32).any()
    np.testing.assert_allclose(x.v_offset, value, rtol=2.0**-21)


@pytest.mark.parametrize("mean", [2.0**99, 2.0**101, 3e38])
@pytest.mark.parametrize("recipe", RECIPES)
def test_offset_of_a_large_mean(recipe, mean):
    """What is too large to be subtracted must not be taken off the output either."""
    q, k, v = arrays("normal", dtype="float32")
    v = f32(mean) * (1 + v / f32(16 * np.abs(v).max()))
    x = quantize(q, k, v, RECIPES[recipe])
    codes = x.v[..., :150, :].astype(np.float64)
    restored = codes * x.v_scale + x.v_offset
    exact = heads_first(v).astype(np.float64)
    error = np.abs(restored - exact).max()
    assert error <= mean * 2.0**-3  # E4M3: 1/17 for a code, as much for the mean code


def test_layouts_of_every_rank():
    """Batch dimensions are carried along; tokens and heads change places."""
    q, k, v = arrays("normal")
    expected = quantize(q, k, v)
    for lead in ((), (2, 1, 1)):
        x = quantize(*(y[0] if not lead else y.reshape(*lead, *y.shape[1:]) for y in (q, k, v)))
        for name, actual in x._asdict().items():
            wanted = getattr(expected, name)
            wanted = wanted[0] if not lead else wanted.reshape(*lead, *wanted.shape[1:])
            np.testing.assert_allclose(
                actual.astype(np.float64), wanted.astype(np.float64), atol=1e-6, err_msg=name
            )


def test_scale_of_many_tokens_is_each_its_own():
    q = np.ones((1, 3, 1, 8), f32) * np.array([1, 100, 1e-3], f32)[:, None, None]
    k = np.ones((1, 4, 1, 8), f32)
    x = quantize(q, k, k, scale_log2=1.0)
    np.testing.assert_allclose(x.q_scale[0, 0] * 127, [1, 100, 1e-3], rtol=1e-6)
    assert (x.q == 127).all()
    assert jnp.asarray(x.q).dtype == jnp.int8
