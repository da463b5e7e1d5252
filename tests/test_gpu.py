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
from gpu_support import (
    ALL_RECIPES,
    EACH_RECIPE,
    EMULATED,
    inputs,
    jitted,
    on_cpu,
    scale_log2,
    skip_without_kernel,
)
from mask_suite import MaskSuite
from suite import BOTH_MASKS, NAMED, AttentionSuite, attention, check, pv_of

import jax_sage
from jax_sage import kernels, lowering_cuda, portable
from jax_sage.arguments import prepare
from jax_sage.masking import Band, Masks
from jax_sage.recipe import RECIPES, resolve

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]


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


# Head dimensions above 128 have kernels on Hopper alone, and there for the named recipes.
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
    run = jitted(lowering_cuda.attention, **params, with_lse=True, mma_sync=mma_sync)
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
    run = jitted(lowering_cuda.attention, **params, with_lse=True, mma_sync=mma_sync)
    expected = on_cpu(jitted(portable.attention, **params), q, k, v)
    for x, y in zip(run(q, k, v), expected, strict=True):
        assert np.isnan(y).any()
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))


def drifting(length, channels, period, size, noise, seed):
    """[1, length, 2, channels], each channel waves as long as `period` and less, and noise."""
    rng = np.random.default_rng(seed)
    waves = np.arange(1, 3, 0.5)[:, None, None]
    phases = rng.random((4, 2, channels))
    turns = np.arange(length)[:, None, None, None] / period * waves + phases
    x = size * np.sin(2 * np.pi * turns).sum(1)
    return (x + noise * rng.standard_normal(x.shape))[None].astype(np.float32)


@pytest.mark.not_emulated
@pytest.mark.parametrize("period_of_value", [3000, 300])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_local_attention(head_dim, period_of_value):
    """Where nearby tokens attend to each other, what sums in FP16 lose does not average out.

    Hopper's matrix unit truncates. On inputs like these of 128 channels (cuda/sm90/DESIGN.md) sums
    over 512 keys had 1.1 and 1.2 times the error of sums over 128, those over 1024 keys 1.7 and
    2.1. The portable path rounds sums over 64.
    """
    rng = np.random.default_rng(1)
    q = drifting(4096, head_dim, 500, 0.5, 0, seed=0)
    q, k = (np.float32(q + 0.7 * rng.standard_normal(q.shape)) for _ in range(2))
    v = drifting(4096, head_dim, period_of_value, 0.7, 0.5, seed=2)
    rows = np.arange(7, 4096, 64)
    exact = reference.outputs(q, k, v, rows)
    params = {"scale_log2": scale_log2(q), "band": band(False), "recipe": RECIPES["8+8"]}
    portable_out, _ = on_cpu(jitted(portable.attention, **params), q, k, v)
    error, portable_error = (
        np.abs(np.asarray(out)[:, rows] - exact).sum() / np.abs(exact).sum()
        for out in (jax_sage.attention(q, k, v), portable_out)
    )
    assert error < 1.45 * portable_error


# Sizes.


@pytest.mark.not_emulated
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@BOTH_MASKS
def test_more_query_tiles_than_sms(head_dim, is_causal):
    """A persistent kernel works off several items, causal with different numbers of keys.

    With four warpgroups, 240 items of 256 queries: two rounds, the second of which goes back.
    """
    skip_without_kernel(head_dim)
    q, k, v = inputs("normal", (2, 1100, 24, head_dim), (2, 1300, 8, head_dim))
    check(q, k, v, recipe="8+8", is_causal=is_causal)
    without_lse = jax_sage.attention(q, k, v, is_causal=is_causal)
    with_lse, _ = jax_sage.attention(q, k, v, is_causal=is_causal, return_residual=True)
    np.testing.assert_array_equal(np.asarray(without_lse), np.asarray(with_lse))


@pytest.mark.parametrize("recipe", NAMED)
@BOTH_MASKS
def test_more_keys_than_four_warpgroups_take(is_causal, recipe):
    """Heads of 64 with more than 1024 keys run in five; on a GPU in three rounds of items.

    8+16 that is not causal has tiles of 128 keys then, the last of which has one block or two.
    """
    length, heads = (1070, 2) if EMULATED else (4300, 26)
    q, k, v = inputs("normal", (1, length, heads, 64), (1, length, 2, 64))
    run = functools.partial(jax_sage.attention, q, k, v, is_causal=is_causal, recipe=recipe)
    out, lse = run(return_residual=True)
    np.testing.assert_array_equal(np.asarray(run()), np.asarray(out))
    some = [0, heads - 1]  # a query head of each key/value head
    expected = reference.analyse(q[:, :, some], k, v, is_causal=is_causal, pv=pv_of(recipe))
    out, lse = np.asarray(out)[:, :, some], np.asarray(lse)[:, :, some]
    reference.assert_accurate(out, lse, expected, pv=pv_of(recipe))


def head_of_large(shape, batch_or_head, seed):
    """A normal bfloat16 array on the GPU, and one head of it as numpy."""
    whole = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))(jax.random.key(seed))
    return whole, np.asarray(jax.jit(lambda x: x[:, :, batch_or_head])(whole)[:, :, None])


LARGE = (1, (1 << 17) + 133, 129, 128)  # 129 heads: more than 2^31 elements


@pytest.mark.not_emulated
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


@pytest.mark.not_emulated
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


@pytest.mark.not_emulated
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
    largest = kernels.max_head_dim(RECIPES["8+8"])
    head_dim = int(rng.integers(1, 1 + int(rng.choice([64, 128, largest]))))
    return {
        "query_shape": (batch, length_q, kv_heads * heads_per_kv, head_dim),
        "key_shape": (batch, length_kv, kv_heads, head_dim),
        "dtype": str(rng.choice(["float16", "bfloat16", "float32"])),
    }, {
        "recipe": str(rng.choice(NAMED)),
        "is_causal": bool(rng.integers(2)),
    }


def parts(count):
    """Of a test: the first is enough where kernels are emulated."""
    return [0, *(pytest.param(i, marks=pytest.mark.not_emulated) for i in range(1, count))]


@pytest.mark.parametrize("part", parts(10))
def test_random_shapes(part):
    """1000 of them against float64, each tenth against the portable path too, in both families."""
    rng = np.random.default_rng(part)
    for number in range(30 if EMULATED else 100):
        arrays, options = random_case(rng)
        q, k, v = inputs("normal", **arrays, seed=number)
        try:
            check(q, k, v, **options)
            if number % 10 == 0:
                for mma_sync in (False, True) if q.shape[-1] <= 128 else (False,):
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


@pytest.mark.parametrize("part", parts(16))
def test_random_masks(part):
    """2000 cases against float64, in both families: 250 combinations of arguments, 8 data each."""
    rng = np.random.default_rng([part, 7])
    for number in range(part, 250, 16):
        arrays, options = random_case(rng)
        batch, length_q, heads, head_dim = arrays["query_shape"]
        length_kv = arrays["key_shape"][1]
        static, make = random_masks(rng, batch, length_q, length_kv, heads)
        recipe, mma_sync = options["recipe"], bool(number % 2) and head_dim <= 128

        @jax.jit
        def run(q, k, v, given, static=static, recipe=recipe, mma_sync=mma_sync):
            operands, params = prepare(q, k, v, **given, **static, recipe=recipe)
            masks = Masks(**dict(zip(params.pop("given"), operands[3:], strict=True)))
            params["with_lse"] = True
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


@pytest.mark.not_emulated
@pytest.mark.parametrize("recipe", NAMED)
@pytest.mark.parametrize(
    "kind",
    [
        "mask",
        "row mask",
        "bias",
        "segments",
        "lengths",
        "window",
        "bias in a window",
        "all but ids",
    ],
)
def test_masks_of_more_items_than_sms(kind, recipe):
    """A persistent kernel goes round, and K and V come in more tiles than it has stages."""
    batch, length_q, length_kv, heads, kv_heads = 2, 1100, 700, 16, 2
    rng = np.random.default_rng(0)
    q, k, v = inputs("normal", (batch, length_q, heads, 64), (batch, length_kv, kv_heads, 64))
    ids = [np.sort(rng.integers(0, 4, (batch, n))).astype("int32") for n in (length_q, length_kv)]
    rows = rng.random((1, 1, length_q, 1)) < 0.9
    bias = rng.standard_normal((1, 1, length_q, length_kv)).astype("float32")
    lengths = {
        "query_seq_lengths": np.array([1000, 70]),
        "key_value_seq_lengths": np.array([130, 700]),
    }
    # Some queries have windows behind all keys, and items of 256 begin at any key.
    window = {"local_window_size": (150, 37)}
    given = {
        "mask": {"mask": rng.random((1, heads, length_q, length_kv)) < 0.5},
        "row mask": {"mask": rows},
        "bias": {"bias": bias},
        "segments": {"query_segment_ids": ids[0], "key_value_segment_ids": ids[1]},
        "lengths": lengths,
        "window": window,
        "bias in a window": {"bias": bias, **window},
        "all but ids": {"bias": bias, "mask": rows, **lengths, **window},
    }[kind]
    check(q, k, v, recipe=recipe, **given)


def test_masks_of_whole_lines():
    """A lane packs 16 keys at once where rows are aligned to them, a warp 512: here two and a bit.

    The last tile of 128 keys is there in part; of the second 64 queries a few are.
    """
    q, k, v = inputs("normal", (1, 70, 2, 64), (1, 1040, 2, 64))
    mask = np.random.default_rng(0).random((1, 2, 70, 1040)) < 0.5
    mask[..., 640:768] = True  # a tile that all see
    mask[:, 1, :, 128:256] = False  # and one that none does
    check(q, k, v, mask=mask)


FIVE_HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 60])  # 60: rows that TMA does not store


def inputs_of_five_warpgroups(head_dim):
    """More than 1024 keys with heads of 64: FP16 sums are promoted, in several items of a CTA."""
    return inputs("normal", (1, 700, 4, head_dim), (1, 1300, 2, head_dim), "bfloat16")


@FIVE_HEAD_DIMS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"local_window_size": (700, 650)},
        {"key_value_seq_lengths": np.array([1111])},
    ],
    ids=str,
)
def test_five_warpgroups(options, head_dim):
    check(*inputs_of_five_warpgroups(head_dim), recipe="8+8", **options)


@FIVE_HEAD_DIMS
def test_what_is_not_finite_in_five_warpgroups(head_dim):
    """Query t sees the keys up to t + 600."""
    q, k, v = inputs_of_five_warpgroups(head_dim)
    k[0, 1000, 1, 3] = v[0, 900, 0, 5] = np.nan
    out = jax_sage.attention(q, k, v, is_causal=True, causal_alignment="bottom_right")
    expected = np.zeros(out.shape, bool)
    expected[0, 400:, 2:] = expected[0, 300:, :2, 5] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(out)), expected)


# How it runs.


def test_nobody_sees_an_lse_that_was_not_made():
    """jax_debug_nans looks at all results of an eager call. Emulated, they begin as NaN."""
    q, k, v = inputs("normal", (1, 70, 2, 64), (1, 90, 2, 64))
    with jax.debug_nans(True):
        out = jax_sage.attention(q, k, v)
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.not_emulated
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


@pytest.mark.not_emulated
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


@pytest.mark.not_emulated
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
