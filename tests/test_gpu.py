"""The CUDA kernels, on an NVIDIA GPU."""

import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from mask_suite import MaskSuite
from suite import BOTH_MASKS, MORE_RECIPES, NAMED, AttentionSuite, attention, check, pv_of

import jax_sage
from jax_sage import kernels, lowering_cuda, portable, quantization
from jax_sage.arguments import prepare
from jax_sage.masking import Band, Masks
from jax_sage.recipe import BLOCK_KV, RECIPES, resolve

pytestmark = pytest.mark.gpu
# The kernel's sums and rows are alike for all of these.
ALL_RECIPES = {**RECIPES, **MORE_RECIPES}
EACH_RECIPE = pytest.mark.parametrize("recipe", ALL_RECIPES.values(), ids=ALL_RECIPES)


@pytest.fixture(autouse=True)
def on_gpu():
    if not kernels.capabilities():
        pytest.skip("no NVIDIA GPU, or JAX has no CUDA")
    assert jax.default_backend() == "gpu"
    for recipe in RECIPES.values():
        reason = kernels.why_unavailable(recipe)
        if reason and "E4M3 matrix instructions need sm_89" in reason:
            pytest.skip(f"this GPU cannot run every recipe: {reason}")
        assert reason is None, "without a kernel these tests would test the portable path"


@pytest.fixture(params=[False, True], ids=["own", "mma.sync"])
def mma_sync(request):
    """A Hopper GPU has kernels of its own, and can run the RTX 4090's: tests run with both."""
    if request.param and all(kernels.family(r) == "mma.sync" for r in ALL_RECIPES.values()):
        pytest.skip("this GPU's own kernels are those on mma.sync")
    return request.param


class TestGpu(AttentionSuite):
    """The common tests."""


@pytest.fixture(scope="class")
def on_mma_sync():
    """The public call takes the mma.sync kernels, which every GPU has."""
    defaults = lowering_cuda.attention.__kwdefaults__
    jax.clear_caches()
    defaults["mma_sync"] = True
    yield
    defaults["mma_sync"] = False
    jax.clear_caches()


# Head dimensions above 128 have no kernel.
@pytest.mark.filterwarnings("ignore:.*head dimension:jax_sage.kernels.PortableWarning")
class TestMasksOnGpu(MaskSuite):
    """The common tests of masks."""


@pytest.mark.usefixtures("on_mma_sync")
@pytest.mark.filterwarnings("ignore:.*head dimension:jax_sage.kernels.PortableWarning")
class TestMasksOnMmaSync(MaskSuite):
    """The same with the RTX 4090's kernels."""

    @pytest.fixture(autouse=True)
    def another(self):
        if all(kernels.family(r) == "mma.sync" for r in ALL_RECIPES.values()):
            pytest.skip("this GPU's own kernels are those on mma.sync")


def exact_sums(x):
    """Multiples of 1/16 up to 64: the FP32 sum of 16K of them is exact in any order."""
    return (np.round(np.clip(x.astype(np.float64), -64, 64) * 16) / 16).astype(x.dtype)


def inputs(kind, query_shape, key_shape, dtype="float32", seed=0):
    q, k, v = reference.inputs(kind, query_shape, key_shape, dtype, seed)
    return q, exact_sums(k), exact_sums(v)


def on_cpu(function, *args):
    """Runs a portable function, jitted, on the host.

    There its divisions are IEEE's, as the kernels' are; XLA's on a GPU are not, and move a code of
    Q or K by one now and then.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return function(*args)


@functools.lru_cache(maxsize=256)
def jitted(function, **params):
    return jax.jit(functools.partial(function, **params))


def scale_log2(q, scale=None):
    return (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * math.log2(math.e)


def band(is_causal):
    return Band(right=0) if is_causal else Band()


def assert_near_portable(q, k, v, *, recipe, is_causal=False, mma_sync=False):
    """As close as the order of sums allows, on data whose codes and scales are bitwise equal.

    P is rounded alike, because the row maximum is an integer, whatever the order of blocks. There
    remain:
    - FP16 partial sums. The portable code rounds after each 32 keys; so does wgmma, but over 128
      keys; mma.sync of sm_90 has no such instruction, and rounds (or cuts) after each 16. 2
      roundings of 2^-11 and 4 of 2^-10 a block make less than 2^-7 of sum(w |v - v̄|), in the
      output and, times |out - v̄|, in the row sum: 2^-6 of what Reference.around bounds. (FP32
      ones: FP8 tensor cores keep 13 bits. Less.)
    - ex2.approx (2 ulp) and a fused multiply-add in its argument (2^-22 of a score up to 16) move
      P by up to 2^-18. Where a rounding boundary of E4M3 (one every 2^-3) lies in between, P moves
      by one step: in one of 10^4 to 10^5 elements, 2^-3 w_j |v_j - out|. Four such flips of a
      row's largest term are allowed.
    On average: roundings have random signs, so of 6 roundings of rms 2^-12.8 of a partial sum that
    is as large as Reference.typical sqrt(6) 2^-12.8 = 3.4e-4 remain, twice that if one side cuts;
    flips of 2^-3 in 2e-5 of the elements add 2^-3 sqrt(2e-5) = 5.6e-4. Together 1.3e-3, to be
    compared with quantization's 3e-2.
    """
    params = {"scale_log2": scale_log2(q), "band": band(is_causal), "recipe": resolve(recipe)}
    run = jitted(lowering_cuda.attention, **params, exact_lse=True, mma_sync=mma_sync)
    out, lse = (np.asarray(x) for x in run(q, k, v))
    run = jitted(portable.attention, **params)
    other, other_lse = (np.asarray(x) for x in on_cpu(run, q, k, v))
    expected = reference.analyse(q, k, v, is_causal=is_causal)

    difference = np.abs(out.astype(np.float64) - other.astype(np.float64))
    difference -= 2 * reference.half_ulp(expected.out, out.dtype)
    bound = 2.0**-6 * expected.around + 4 * 2.0**-3 * expected.largest
    bound += 2.0**-18 * np.abs(expected.out)
    assert np.all(difference <= bound), f"{(difference - bound).max()} beyond the bound"
    if out.size >= 2000:
        ratio = np.maximum(difference, 0).sum() / expected.typical.sum()
        print(f"kernel against portable: {ratio:.2e} of a typical term")
        assert ratio <= 2e-3
    # The maxima are equal; the sum of P before rounding, its logarithm and q·k̄ are FP32.
    np.testing.assert_allclose(lse, other_lse, rtol=2.0**-16, atol=2.0**-16)


@EACH_RECIPE
@BOTH_MASKS
def test_near_portable(recipe, is_causal, mma_sync):
    q, k, v = inputs("normal", (2, 300, 4, 128), (2, 1000, 2, 128))
    assert_near_portable(q, k, v, recipe=recipe, is_causal=is_causal, mma_sync=mma_sync)


@pytest.mark.parametrize("recipe", NAMED)
@pytest.mark.parametrize("kind", ["outlier", "heavy", "constant"])
def test_near_portable_on(kind, recipe, mma_sync):
    q, k, v = inputs(kind, (1, 257, 2, 64), (1, 700, 2, 64))
    assert_near_portable(q, k, v, recipe=recipe, mma_sync=mma_sync)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_near_portable_in(dtype, mma_sync):
    q, k, v = inputs("normal", (1, 257, 2, 96), (1, 700, 1, 96), dtype)
    assert_near_portable(q, k, v, recipe="8+8", mma_sync=mma_sync)


@BOTH_MASKS
def test_not_finite_is_as_in_portable(is_causal, mma_sync):
    """NaN in the outputs that attend to it and in no others."""
    q, k, v = inputs("normal", (2, 130, 4, 64), (2, 200, 2, 64))
    q[0, 67, 2, 5], k[1, 90, 1, 5], v[0, 100, 0, 7] = np.nan, np.inf, -np.inf
    params = {"scale_log2": scale_log2(q), "band": band(is_causal), "recipe": RECIPES["8+8"]}
    run = jitted(lowering_cuda.attention, **params, exact_lse=True, mma_sync=mma_sync)
    expected = on_cpu(jitted(portable.attention, **params), q, k, v)
    for x, y in zip(run(q, k, v), expected, strict=True):
        assert np.isnan(y).any()
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))


# Codes and scales.


def permuted(key: int) -> int:
    """Where FP8 V has this key: position 4t + 2h + e of 16 holds key 8h + 2t + e."""
    h, t, e = key % 16 // 8, key % 8 // 2, key % 2
    return key // 16 * 16 + 4 * t + 2 * h + e


def kernel_codes(q, k, v, recipe):
    """The quantized operands in the layout of quantization.Quantized, plus the channel means."""
    run = jax.jit(
        functools.partial(lowering_cuda.quantize, scale_log2=scale_log2(q), recipe=recipe)
    )
    names = "q q_scale q_dot_mean k k_scale v channels first_bad value_code_sum".split()
    raw = dict(zip(names, map(np.asarray, run(q, k, v)), strict=True))
    length_q, head_dim = q.shape[-3], q.shape[-1]
    length_kv = k.shape[-3]
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
    k_mean, v_average, v_mean, v_scale, v_down, v_inverse = np.moveaxis(
        raw["channels"][..., :head_dim], -2, 0
    )
    low, high = np.moveaxis(raw["value_code_sum"][..., :head_dim, :].astype(np.uint64), -1, 0)
    return {
        "q": raw["q"][..., :length_q, :head_dim],
        "q_scale": raw["q_scale"][..., :length_q],
        "q_dot_mean": raw["q_dot_mean"][..., :length_q],
        "k": raw["k"][..., :head_dim],
        "k_scale": raw["k_scale"],
        "v": values[..., :head_dim],
        "v_scale": v_scale,
        "v_down": v_down,
        "v_inverse": v_inverse,
        "k_mean": k_mean,
        "v_average": v_average,
        "v_mean": v_mean,
        "first_bad_k": raw["first_bad"][..., 0, 0],
        "first_bad": raw["first_bad"][..., 1, :head_dim],
        "code_sum": (low | high << np.uint64(32)).astype(np.int64) * 2.0**-24,
    }


def portable_codes(q, k, v, recipe):
    run = jax.jit(functools.partial(quantization.quantize, scale_log2=scale_log2(q), recipe=recipe))
    result = {name: np.asarray(x) for name, x in on_cpu(run, q, k, v)._asdict().items()}
    result["v"] = result["v"].astype(np.float32)
    result["v_scale"], result["v_offset"] = (result[n][..., 0, :] for n in ("v_scale", "v_offset"))
    # Of the first key, by head, that is not finite; and of the first value or key, by channel.
    bad_k, bad_v = (np.moveaxis(~np.isfinite(x), -3, -2) for x in (k, v))
    bad_k = bad_k.any(-1, keepdims=True)
    for name, bad in (("first_bad_k", bad_k), ("first_bad", bad_v | bad_k)):
        first = np.where(bad.any(-2), bad.argmax(-2), np.iinfo(np.int32).max)
        result[name] = first[..., 0] if name == "first_bad_k" else first
    return result


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [("normal", 3), ("normal", 64), ("normal", 128), ("outlier", 80), ("heavy", 128)],
)
@EACH_RECIPE
def test_codes_are_bitwise_equal(recipe, kind, head_dim):
    q, k, v = inputs(kind, (2, 200, 4, head_dim), (2, 1100, 2, head_dim))
    k[0, 70, 1, 0], v[1, 900, 0, 2] = np.nan, np.inf
    q[1, 3, 2, 1] = np.nan
    actual = kernel_codes(q, k, v, recipe)
    expected = portable_codes(q, k, v, recipe)
    for name in ("first_bad", "first_bad_k", "q_scale", "k_scale", "v_scale"):
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    for name in ("q", "k", "v"):  # as numbers: a code of V that is zero may have a sign
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    # Both products of V's code sum are exact integers; portable sums of codes are FP32.
    np.testing.assert_array_equal(
        actual["code_sum"],
        expected["v"].astype(np.float64).sum(-2) if recipe.smooth_v else 0,
    )
    offset = actual["v_average"].astype(np.float64)
    offset = offset - actual["v_scale"].astype(np.float64) * actual["code_sum"] / 1100
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
        atol=2.0**-20 * head_dim * k_max * np.abs(q[np.isfinite(q)]).max(),
    )


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


# Sizes.


@pytest.mark.parametrize("head_dim", [64, 128])
@BOTH_MASKS
def test_more_query_tiles_than_sms(head_dim, is_causal):
    """432 query tiles: a persistent kernel works off several, with different numbers of keys."""
    q, k, v = inputs("normal", (2, 1100, 24, head_dim), (2, 1300, 8, head_dim))
    check(q, k, v, recipe="8+8", is_causal=is_causal)
    without_lse = jax_sage.attention(q, k, v, is_causal=is_causal)
    with_lse, _ = jax_sage.attention(q, k, v, is_causal=is_causal, return_residual=True)
    np.testing.assert_array_equal(np.asarray(without_lse), np.asarray(with_lse))


def head_of_large(shape, batch_or_head, seed):
    """A normal bfloat16 array on the GPU, and one head of it as numpy."""
    whole = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))(jax.random.key(seed))
    return whole, np.asarray(jax.jit(lambda x: x[:, :, batch_or_head])(whole)[:, :, None])


LARGE = (1, (1 << 17) + 133, 129, 128)  # 129 heads: more than 2^31 elements


@pytest.mark.parametrize("recipe", NAMED)
def test_more_than_2_to_the_31_keys(recipe):
    assert math.prod(LARGE) > 2**31
    q = reference.inputs("normal", (1, 40, 129, 128), (1, 1, 1, 128), "bfloat16")[0]
    k, last_k = head_of_large(LARGE, 128, 1)
    v, last_v = head_of_large(LARGE, 128, 2)
    out, lse = jax_sage.attention(q, k, v, return_residual=True, recipe=recipe)
    expected = reference.analyse(q[:, :, 128:], last_k, last_v, pv=pv_of(recipe))
    out, lse = np.asarray(out)[:, :, 128:], np.asarray(lse)[:, :, 128:]
    reference.assert_accurate(out, lse, expected, pv=pv_of(recipe))


@pytest.mark.parametrize("recipe", NAMED)
def test_more_than_2_to_the_31_queries(recipe):
    _, k, v = reference.inputs("normal", (1, 1, 129, 128), (1, 100, 129, 128), "bfloat16")
    q, last_q = head_of_large(LARGE, 128, 3)
    both = jax.jit(
        lambda q, k, v: [
            x[:, -64:, 128:]
            for x in jax_sage.attention(q, k, v, return_residual=True, recipe=recipe)
        ]
    )
    out, lse = map(np.asarray, both(q, k, v))
    expected = reference.analyse(last_q[:, -64:], k[:, :, 128:], v[:, :, 128:], pv=pv_of(recipe))
    reference.assert_accurate(out, lse, expected, pv=pv_of(recipe))


@pytest.mark.parametrize("recipe", NAMED)
def test_long_sequence_is_as_accurate(recipe):
    """131072 keys with a biased V: sums that lost bits would show as an error that grows."""
    errors = []
    for length in (4096, 131072):
        q, k, v = reference.inputs("normal", (1, 64, 4, 64), (1, length, 4, 64), "float32")
        v = v + np.float32(0.5)
        out, _ = attention(q, k, v, recipe=recipe)
        errors.append(reference.relative_l1(out, reference.attention(q, k, v)[0]))
    print(f"{recipe}: relative L1 {errors[0]:.2e} at 4096 keys, {errors[1]:.2e} at 131072")
    # The bias stays and what the quantized terms add to it averages out as 1/sqrt(length).
    assert errors[1] <= errors[0]


def random_case(rng):
    heads_per_kv = int(rng.choice([1, 1, 2, 3, 4]))
    kv_heads = int(rng.choice([1, 1, 2]))
    batch = int(rng.choice([1, 1, 2]))
    longest = 256 // (batch * kv_heads)
    length_q, length_kv = (int(x) for x in rng.integers(1, longest, 2))
    head_dim = int(rng.integers(1, 129))
    return {
        "query_shape": (batch, length_q, kv_heads * heads_per_kv, head_dim),
        "key_shape": (batch, length_kv, kv_heads, head_dim),
        "dtype": str(rng.choice(["float16", "bfloat16", "float32"])),
    }, {
        "recipe": str(rng.choice(NAMED)),
        "is_causal": bool(rng.integers(2)),
    }


@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part):
    """1000 of them against float64, each tenth against the portable path too, in both families."""
    rng = np.random.default_rng(part)
    for number in range(100):
        arrays, options = random_case(rng)
        q, k, v = inputs("normal", **arrays, seed=number)
        try:
            check(q, k, v, **options)
            if number % 10 == 0:
                for mma_sync in (False, True):
                    assert_near_portable(q, k, v, **options, mma_sync=mma_sync)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {arrays} {options}") from error


def random_masks(rng, batch, length_q, length_kv, heads):
    """Names of what is given, and a function that makes the arrays."""
    scores = (batch, heads, length_q, length_kv)

    def some_ones():
        return tuple(int(d) if rng.integers(2) else 1 for d in scores)

    static = {"is_causal": bool(rng.integers(2))}
    if rng.integers(3) == 0:
        static["local_window_size"] = tuple(int(x) for x in rng.integers(0, length_kv, 2))
    if rng.integers(3) == 0:
        static["causal_alignment"] = "bottom_right"
    given = {}
    if rng.integers(2):
        given["mask"] = some_ones()
    if rng.integers(2):
        given["bias"] = some_ones()
    if rng.integers(3) == 0:
        given["query_seq_lengths"] = (batch,)
    if rng.integers(3) == 0:
        given["key_value_seq_lengths"] = (batch,)
    if rng.integers(3) == 0:
        given["query_segment_ids"] = (batch, length_q)
        given["key_value_segment_ids"] = (batch, length_kv)
    bias_type = str(rng.choice(["float32", "float16"]))

    def arrays(rng):
        made = {}
        for name, shape in given.items():
            if name == "mask":
                made[name] = rng.random(shape) < rng.choice([0.02, 0.5, 0.98])
            elif name == "bias":
                bias = 3 * rng.standard_normal(shape)
                bias[rng.random(shape) < rng.choice([0, 0.5])] = rng.choice([-np.inf, -6e4])
                made[name] = bias.astype(bias_type)
            elif name.endswith("lengths"):
                longest = length_q if name.startswith("query") else length_kv
                made[name] = rng.integers(0, longest + 1, shape).astype(np.int32)
            else:
                ids = rng.integers(0, 3, shape)
                made[name] = (np.sort(ids) if rng.integers(2) else ids).astype(np.int32)
        return made

    return static, arrays


@pytest.mark.parametrize("part", range(16))
def test_random_masks(part):
    """2000 cases against float64, in both families: 250 combinations of arguments, 8 data each."""
    rng = np.random.default_rng([part, 7])
    for number in range(part, 250, 16):
        arrays, options = random_case(rng)
        batch, length_q, heads, head_dim = arrays["query_shape"]
        length_kv = arrays["key_shape"][1]
        static, make = random_masks(rng, batch, length_q, length_kv, heads)
        recipe, mma_sync = options["recipe"], bool(number % 2)

        @jax.jit
        def run(q, k, v, given, static=static, recipe=recipe, mma_sync=mma_sync):
            operands, params = prepare(q, k, v, **given, **static, recipe=recipe)
            masks = Masks(**dict(zip(params.pop("given"), operands[3:], strict=True)))
            params["exact_lse"] = True
            return lowering_cuda.attention(q, k, v, masks, **params, mma_sync=mma_sync)

        for seed in range(8):
            q, k, v = inputs("normal", **arrays, seed=seed)
            given = make(rng)
            out, lse = (np.asarray(x) for x in run(q, k, v, given))
            try:
                expected = reference.analyse(q, k, v, pv=pv_of(recipe), **static, **given)
                reference.assert_accurate(out, lse, expected, pv=pv_of(recipe))
            except AssertionError as error:
                names = {name: (x.dtype, x.shape) for name, x in given.items()}
                case = f"case {number}, seed {seed}: {arrays} {options} {static} {names}"
                raise AssertionError(case) from error


@pytest.mark.parametrize("recipe", NAMED)
@pytest.mark.parametrize("kind", ["mask", "row mask", "bias", "segments", "lengths"])
def test_masks_of_more_items_than_sms(kind, recipe):
    """A persistent kernel goes round, and K and V come in more tiles than it has stages."""
    batch, length_q, length_kv, heads, kv_heads = 2, 1100, 700, 16, 2
    rng = np.random.default_rng(0)
    q, k, v = inputs("normal", (batch, length_q, heads, 64), (batch, length_kv, kv_heads, 64))
    ids = [np.sort(rng.integers(0, 4, (batch, n))).astype("int32") for n in (length_q, length_kv)]
    given = {
        "mask": {"mask": rng.random((1, heads, length_q, length_kv)) < 0.5},
        "row mask": {"mask": rng.random((1, 1, length_q, 1)) < 0.9},
        "bias": {"bias": rng.standard_normal((1, 1, length_q, length_kv)).astype("float32")},
        "segments": {"query_segment_ids": ids[0], "key_value_segment_ids": ids[1]},
        "lengths": {"query_seq_lengths": np.array([1000, 70]),
                    "key_value_seq_lengths": np.array([130, 700])},
    }[kind]  # fmt: skip
    check(q, k, v, recipe=recipe, **given)


# How it runs.


@pytest.mark.parametrize("recipe", NAMED)
def test_the_compiled_program_calls_the_kernels(recipe):
    x = jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.bfloat16)
    run = jax.jit(functools.partial(jax_sage.attention, recipe=recipe))
    text = run.lower(x, x, x).compile().as_text()
    assert text.count('custom_call_target="jax_sage_quantize"') == 1
    assert text.count('custom_call_target="jax_sage_attention"') == 1
    # Arguments go in and results come out as they are: nothing is transposed or copied.
    assert re.findall(r"= \S+ (transpose|copy|fusion)\(", text) == []


GRAPH_SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, jax_sage

@jax.jit
def f(q, k, v):
    x, lse = jax_sage.attention(q, k, v, return_residual=True, is_causal=True)
    y = jax_sage.attention(x * 2, k, v, recipe="8+16")
    return x, y + 1, lse

results = []
for i in range(5):  # the first runs are not captured; each has other inputs in other buffers
    keys = jax.random.split(jax.random.key(i), 3)
    q, k, v = (jax.random.normal(key, (2, 300, 4, 64), jnp.bfloat16) for key in keys)
    results += [np.asarray(x.astype(jnp.float32)) for x in f(q, k, v)]
np.savez(sys.argv[1], *results)
"""


def custom_calls(thunks):
    """Custom calls in XLA's dump of what an executable runs: (in a CUDA graph, outside of one).

    There is a line for each step, "003: kCustomCall ...". What a command buffer, the XLA name of a
    graph, holds is indented below it.
    """
    inside, outside, buffer_indent = 0, 0, None
    for indent, kind in re.findall(r"^( *)(?:\d+: )?(k[A-Z]\w+)", thunks, re.MULTILINE):
        if buffer_indent is not None and len(indent) <= buffer_indent:
            buffer_indent = None
        if kind == "kCommandBuffer" and buffer_indent is None:
            buffer_indent = len(indent)
        if kind == "kCustomCall":
            inside += buffer_indent is not None
            outside += buffer_indent is None
    return inside, outside


def test_cuda_graphs(tmp_path):
    def run(name, flags):
        env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
        command = [sys.executable, "-c", GRAPH_SCRIPT, str(tmp_path / name)]
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
        with np.load(tmp_path / name) as results:
            return list(results.values())

    plain = run("plain.npz", "--xla_gpu_enable_command_buffer=")
    dump = tmp_path / "dump"
    flags = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
    graph = run("graph.npz", f"{flags} --xla_dump_to={dump}")
    for x, y in zip(plain, graph, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(graph[0], graph[3])  # another input, another output

    dumped = {p.name: p.read_text() for p in sorted(dump.glob("*.jit_f.*.txt"))}
    programs = [text for name, text in dumped.items() if "gpu_after_optimizations.txt" in name]
    assert len(programs) == 1, f"f was not compiled once: {sorted(os.listdir(dump))}"
    targets = re.findall(r'custom_call_target="(\w+)"', programs[0])
    assert sorted(targets) == ["jax_sage_attention"] * 2 + ["jax_sage_quantize"] * 2
    # This one is written only if a command buffer was made.
    runs = [text for name, text in dumped.items() if "thunk_sequence_after_thunk_passes" in name]
    assert len(runs) == 1, "no graph was made of:\n" + "\n".join(
        text for name, text in dumped.items() if "thunk_sequence" in name
    )
    assert custom_calls(runs[0]) == (len(targets), 0), f"not all of them are in a graph:\n{runs[0]}"


@pytest.mark.parametrize(
    ("tool", "summary"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
    ],
)
@pytest.mark.parametrize("calls", ["plain", "masked"])
def test_sanitizer(tool, summary, calls, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    script = Path(__file__).with_name("sanitizer_script.py")
    # XLA's own kernels are not ours to check.
    command = [sanitizer, "--tool", tool, "--kernel-regex", "kns=jax_sage"]
    env = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # XLA's compilation has hung under memcheck: it happens before, without the tool, whose run
        # takes the programs from the cache.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": " ".join(
            [
                os.environ.get("XLA_FLAGS", ""),
                # No CUDA graphs: the tools see kernels launched one by one.
                "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
            ]
        ),
    }
    program = [sys.executable, "-P", str(script), calls]
    subprocess.run(program, cwd=tmp_path, env=env, check=True, timeout=150)
    process = subprocess.Popen(
        [*command, *program],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        report, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the script too, which is compute-sanitizer's child
        report, _ = process.communicate()
        raise AssertionError(f"not done after 150 s: {report[-3000:]}") from None
    if "Device not supported" in report:
        pytest.skip("compute-sanitizer does not support this (virtual) device")
    assert "all cases ran" in report, report[-3000:]
    assert summary in report, report[-3000:]
