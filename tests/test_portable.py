"""The portable path, on the CPU of any machine."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from suite import BOTH_MASKS, MORE_RECIPES, AttentionSuite, attention

import jax_sage
from jax_sage import RECIPES, quantization


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.mark.usefixtures("compiled_quickly")
class TestPortable(AttentionSuite):
    """The common tests."""


ALL_RECIPES = {**RECIPES, **MORE_RECIPES}


def two_level_sums(x, recipe, length_kv, is_causal):
    """out and lse from quantized operands of one batch entry and equal heads, in numpy."""
    p_type, keys = (ml_dtypes.float8_e4m3fn, 32) if recipe.pv == "fp8" else (np.float16, 16)
    partial_type = {"fp16": np.float16, "fp32": np.float32}[recipe.pv_accumulator]
    heads, length_q, head_dim = x.q.shape
    row_max = np.full((heads, length_q, 1), -np.inf)
    row_sum, total = 0.0, np.zeros((heads, length_q, head_dim + 1))
    for first in range(0, x.k.shape[1], 64):
        block = slice(first, first + 64)
        products = x.q.astype(np.float64) @ np.swapaxes(x.k[:, block].astype(np.float64), 1, 2)
        k_scale = x.k_scale[:, first // 64, (np.arange(64) % 8) // 2]
        scales = x.q_scale[..., None] * k_scale[:, None]  # float32, as all scores
        scores = products.astype(np.float32) * scales
        columns = np.arange(first, first + 64)
        visible = np.broadcast_to(columns < length_kv, (length_q, 64))
        if is_causal:
            visible = visible & (columns <= np.arange(length_q)[:, None])
        scores = np.where(visible, scores, -np.inf).astype(np.float64)
        new_max = np.maximum(row_max, np.ceil(scores.max(-1, keepdims=True)))
        p = np.exp2(scores - new_max + 6)  # the largest P is in (32, 64]
        rescale = np.exp2(row_max - new_max)
        row_max, row_sum = new_max, row_sum * rescale + p.sum(-1, keepdims=True)
        p = p.astype(np.float32).astype(p_type).astype(np.float64)
        v = x.v[:, block].astype(np.float64)
        v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
        partial = np.zeros(total.shape)
        for step in range(0, 64, keys):
            step = slice(step, step + keys)
            partial = (partial + p[..., step] @ v[:, step]).astype(partial_type).astype(np.float64)
        total = total * rescale + partial
    out = total[..., :-1] / total[..., -1:] * x.v_scale + x.v_offset
    lse = (row_max + np.log2(row_sum) - 6)[..., 0] + x.q_dot_mean
    return np.moveaxis(out, 0, 1), np.moveaxis(lse, 0, 1) * math.log(2)


@pytest.mark.parametrize("recipe", ALL_RECIPES.values(), ids=ALL_RECIPES)
@BOTH_MASKS
def test_sums_are_those_of_the_recipe(recipe, is_causal):
    """Bounds on errors cannot tell how P and the sums were rounded; another implementation can."""
    q, k, v = (x[0] for x in reference.inputs("normal", (1, 200, 4, 64), (1, 290, 4, 64)))
    out, lse = attention(q, k, v, recipe=recipe, is_causal=is_causal)
    run = jax.jit(quantization.quantize, static_argnames=("scale_log2", "recipe"))
    seen = 200 if is_causal else 290  # later keys do not count
    x = run(q, k[:seen], v[:seen], scale_log2=math.log2(math.e) / 8, recipe=recipe)
    x = quantization.Quantized(*map(np.asarray, x))
    other, other_lse = two_level_sums(x, recipe, seen, is_causal)
    expected = reference.analyse(q, k, v, is_causal=is_causal)
    # exp2 in FP32 moves a P over a boundary of E4M3 (one every 2^-3) in about one element of 10^5:
    # 3e-3 of the rows have one term of 290 that is off by 2^-3, others by FP32 alone. FP16 sums
    # that were not rounded, or rounded elsewhere, would be 3e-4 off; see test_gpu.py.
    assert np.abs(out - other).mean() <= 1e-4 * expected.typical.mean()
    np.testing.assert_allclose(lse, other_lse, rtol=2.0**-19, atol=2.0**-19)


# The project's own bounds on relative L1 error: B=1, 8 heads, N=4096, D=128. SageAttention's
# kernels have 0.0373, 0.0036 and 0.0489 on the first three.
@pytest.mark.parametrize(
    ("recipe", "kind", "bound"),
    [
        ("8+8", "normal", 0.040),
        ("8+8", "outlier", 0.0045),
        ("8+8", "heavy", 0.052),
        ("8+16", "normal", 0.012),
    ],
)
def test_full_size_accuracy(recipe, kind, bound):
    shape = (1, 4096, 8, 128)
    q, k, v = reference.inputs(kind, shape, shape)
    rows = np.arange(3, 4096, 16)  # float64 of all would take a minute
    out = np.asarray(jax_sage.attention(q, k, v, recipe=recipe))[:, rows]
    expected = reference.outputs(q, k, v, rows=rows)
    error = reference.relative_l1(out, expected)
    cosine, rmse = reference.cosine(out, expected), reference.rmse(out, expected)
    print(f"{recipe} {kind}: relative L1 {error:.4f}, cosine {cosine:.6f}, RMSE {rmse:.2e}")
    assert error <= bound
    # For errors that are independent of the outputs, 1 - cosine = (RMSE / rms)^2 / 2, and a ratio
    # of means of absolute values is that of rms if both are distributed alike: twice as much is
    # for those of which some are larger.
    assert 1 - cosine <= (2 * bound) ** 2 / 2
    assert rmse <= 2 * bound * np.sqrt(np.mean(expected**2))


def temporary_bytes(length: int) -> int:
    shape = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16)
    compiled = jax.jit(jax_sage.attention).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear():
    half, whole = temporary_bytes(1 << 14), temporary_bytes(1 << 15)
    # Scores of all pairs would take 32 GiB. 32K x 8 heads x 128 channels are 128 MiB in float32:
    # at most eight arrays of that size at a time.
    assert whole < 1 << 30
    assert whole / half < 2.3  # proportional would be 2, quadratic 4


@pytest.mark.parametrize("length_kv", [0, 3])
def test_nobody_sees_an_lse_that_was_not_asked_for(length_kv):
    """That of a row that sees no key is -inf, and jax_debug_infs looks at all results."""
    q, k, v = reference.inputs("normal", (1, 5, 2, 16), (1, length_kv, 2, 16), "float32")
    with jax.debug_infs(True):
        out = jax_sage.attention(q, k, v, key_value_seq_lengths=np.array([0]))
    np.testing.assert_array_equal(out, 0)
