"""What the tests compare with: float64 attention, inputs, and how large an error may be.

Everything here is numpy in float64 and shares no code with jax_sage.
"""

import dataclasses
import math

import ml_dtypes
import numpy as np

from jax_sage.quantization import is_sample

DISTRIBUTIONS = ("normal", "outlier", "heavy", "constant")

# Largest relative error of rounding to nearest (for E4M3 2^-4 / (1 + 2^-4), a tie just above a
# power of two), and half the distance of subnormal numbers.
_RELATIVE = {"fp8": 1 / 17, "fp16": 2.0**-11}
_SUBNORMAL = {"fp8": 2.0**-10, "fp16": 2.0**-25}
_P_MIN_TOP = 64.0  # the largest P of a row lies in (128, 256], in (64, 256] on Hopper
_V_MAX = 1.875  # the largest code of V

# Mean of |error| over the mean of `Reference.typical`. The terms w_j v_j of an output have
# independent relative errors: E4M3 rounding, uniform over a mantissa, has an rms of 2.6 %; it
# strikes P and V. A score is a sum of 2H products of a normal and an INT8 rounding error of step
# 3/127, times 1/sqrt(H): rms 1 %. Together sqrt(2.6² + 2.6² + 1²) = 3.8 %, and the mean of the
# absolute value is 0.8 of that: 3.0 %; with FP16 PV only the 1 % of the scores remain: 0.8 %.
# Student's t has its largest values at 9 sigma, not 3: the scores are off by 3 %, which makes 3.9
# and 2.4 %. Each times 1.4 or more, for the chance of a small sample.
_TYPICAL = {
    ("fp8", "normal"): 0.042,
    ("fp16", "normal"): 0.012,
    ("fp8", "heavy"): 0.060,
    ("fp16", "heavy"): 0.045,
}
# lse averages the errors of its scores, which alone would be off by 1 % (3 % for heavy tails).
_TYPICAL_LSE = {"normal": 0.01, "heavy": 0.15}
# Outputs that make a mean of errors meaningful: fewer are held to the worst case alone.
_ENOUGH = 2000
_ENOUGH_ROWS = 50  # likewise, of lse
# And scores of fewer channels than this are not sums of many errors.
_ENOUGH_CHANNELS = 16


def bf16(x: np.ndarray) -> np.ndarray:
    """x in float64, rounded to bfloat16."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def inputs(kind, query_shape, key_shape, dtype="float32", seed=0, rounded=True):
    """q, k, v as numpy arrays; values rounded to bfloat16 unless `rounded` is False.

    normal: standard normal. outlier: the same, and in each head 4 random channels of K have a mean
    of 10 to 20 of either sign, and 4 of V. heavy: Student's t with 3 degrees of freedom.
    constant: a quarter of the channels of K and V is zero, another one constant.
    """
    rng = np.random.default_rng([seed, *query_shape, *key_shape, DISTRIBUTIONS.index(kind)])

    def draw(shape):
        return rng.standard_t(3, shape) if kind == "heavy" else rng.standard_normal(shape)

    q, k, v = draw(query_shape), draw(key_shape), draw(key_shape)
    channels = key_shape[-1]
    for x in (k, v):
        if kind == "outlier":
            for head in range(key_shape[-2]):
                chosen = rng.permutation(channels)[:4]
                x[..., head, chosen] += rng.uniform(10, 20, chosen.size) * rng.choice(
                    [-1, 1], chosen.size
                )
        if kind == "constant":
            order = rng.permutation(channels)
            zero, constant = order[: channels // 4], order[channels // 4 : channels // 2]
            x[..., zero] = 0
            x[..., constant] = bf16(5 * rng.standard_normal(constant.size))
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return tuple((bf16(x) if rounded else x).astype(dtype) for x in (q, k, v))


@dataclasses.dataclass
class Reference:
    """Exact attention, and the error that quantization may make at each place."""

    out: np.ndarray  # [*B, T, N, Hv]
    lse: np.ndarray  # [*B, T, N]
    worst_out: np.ndarray  # a bound, before rounding to the output's dtype
    worst_lse: np.ndarray  # a bound
    typical: np.ndarray  # rms of an output's error if each term of its sum had rms error 1
    around: np.ndarray  # a bound of sum(w |v - out|), w the softmax weights
    largest: np.ndarray  # a bound of the largest w |v - out|


def attention(q, k, v, **options):
    """out [*B, T, N, Hv] and lse [*B, T, N] in float64; options as for jax_sage.attention."""
    x = analyse(q, k, v, **options)
    return x.out, x.lse


def outputs(q, k, v, rows):
    """Non-causal outputs of the queries `rows` without anything else: for large sizes."""
    q, k, v = (np.moveaxis(np.asarray(x).astype(np.float64), -3, -2) for x in (q, k, v))
    scores = q[..., rows, :] @ np.swapaxes(k, -1, -2)
    scores -= scores.max(-1, keepdims=True)
    scores /= math.sqrt(q.shape[-1])
    weights = np.exp(scores, out=scores)
    return np.moveaxis(weights @ v / weights.sum(-1, keepdims=True), -2, -3)


def what_is_seen(
    batch,
    heads,
    length_q,
    length_kv,
    *,
    bias=None,
    mask=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    causal_alignment="top_left",
):
    """Whether a query sees a key: bool [*B, N, T, S], by the definitions of each argument."""
    rows, columns = np.arange(length_q)[:, None], np.arange(length_kv)

    def lengths(given, whole):
        given = np.full(batch, whole) if given is None else np.asarray(given).reshape(batch)
        return given[..., None, None, None]

    q_len, kv_len = lengths(query_seq_lengths, length_q), lengths(key_value_seq_lengths, length_kv)
    visible = np.ones((*batch, heads, length_q, length_kv), bool)
    visible &= (rows < q_len) & (columns < kv_len)
    at = rows + (kv_len - q_len) * (causal_alignment == "bottom_right")
    if is_causal:
        visible &= columns <= at
    if local_window_size is not None:
        window = np.broadcast_to(local_window_size, 2)
        visible &= (columns >= at - window[0]) & (columns <= at + window[1])
    if mask is not None:
        visible &= np.asarray(mask)
    if query_segment_ids is not None:
        query_ids = np.asarray(query_segment_ids)[..., None, :, None]
        visible &= query_ids == np.asarray(key_value_segment_ids)[..., None, None, :]
    if bias is not None:
        visible &= ~(np.asarray(bias).astype(np.float64) * math.log2(math.e) <= -(2.0**23))
    return visible


def analyse(q, k, v, *, scale=None, pv="fp8", rows=None, **masks) -> Reference:
    """`rows`: only these queries (an index array); the results then have len(rows) of them."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    *batch, length_q, heads, head_dim = q.shape
    length_kv, kv_heads = k.shape[-3:-1]
    rows = np.arange(length_q) if rows is None else np.asarray(rows)
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    visible = what_is_seen(batch, heads, length_q, length_kv, **masks)
    bias = masks.get("bias")
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias).astype(np.float64), visible.shape)
        bias = np.where(visible, bias, 0)[..., rows, :]
    if length_kv == 0:
        shape = (*batch, len(rows), heads, v.shape[-1])
        zero, nothing = np.zeros(shape), np.zeros(shape[:-1])
        return Reference(zero, nothing - np.inf, zero, nothing, zero, zero, zero)
    group = heads // kv_heads
    seen = visible.reshape(*batch, kv_heads, group, length_q, length_kv).any((-3, -2))
    arguments = q[..., rows, :, :], k, v, scale, pv, visible[..., rows, :], bias

    query_ids, key_ids = masks.get("query_segment_ids"), masks.get("key_value_segment_ids")
    if query_ids is None:
        return _analyse(*arguments, seen, seen & is_sample(np.arange(length_kv)))
    # Each segment has statistics of its own. Keys of two segments may share a scale, after they
    # were brought to the same size but for a factor of 2.
    query_ids, key_ids = np.asarray(query_ids)[..., rows], np.asarray(key_ids)
    merged = None
    for segment in np.unique(query_ids):
        keys = seen & (key_ids == segment)[..., None, :]
        x = _analyse(*arguments, keys, keys, coarser=2)
        merged = x if merged is None else merged
        of_segment = (query_ids == segment)[..., None]
        for name, array in vars(x).items():
            where = of_segment if array.ndim == of_segment.ndim else of_segment[..., None]
            setattr(merged, name, np.where(where, array, getattr(merged, name)))
    return merged


def _analyse(q, k, v, scale, pv, visible, bias, seen, samples, coarser=1) -> Reference:
    """visible and bias (or None) are [*B, N, T, S].

    Keys are [*B, K, S]: those that are seen, of which is V's mean, and those that K's is of.
    """
    *batch, length_q, heads, head_dim = q.shape
    length_kv, kv_heads = k.shape[-3:-1]
    shape = (*batch, kv_heads, heads // kv_heads, length_q)

    def tokens(x):  # [*B, K, G, T, ...] -> [*B, T, N, ...]
        x = x.reshape(*batch, heads, length_q, *x.shape[len(batch) + 3 :])
        return np.moveaxis(x, len(batch), len(batch) + 1)

    # [*B, K, G, T, H], [*B, K, 1, S, H]; what no query sees counts nowhere
    q = np.moveaxis(q, -3, -2).reshape(*shape, head_dim)
    seen, samples = seen[..., None, :, None], samples[..., None, :, None]
    k, v = (np.moveaxis(x, -3, -2)[..., None, :, :] for x in (k, v))
    k, v = np.where(seen, k, 0), np.where(seen, v, 0)
    visible = visible.reshape(*shape, length_kv)
    number = np.maximum(seen.sum(-2, keepdims=True), 1)

    with np.errstate(over="ignore", invalid="ignore"):
        scores = q @ np.swapaxes(k, -1, -2)
        scores *= scale
        largest_bias = 0.0
        if bias is not None:
            bias = bias.reshape(*shape, length_kv)
            scores += bias
            largest_bias = np.abs(bias).max(-1)
        np.copyto(scores, -np.inf, where=~visible)
        top = scores.max(-1, keepdims=True)
        blind = np.isneginf(top)
        weights = np.exp(scores - np.where(blind, 0, top))
        total = weights.sum(-1, keepdims=True)
        weights /= np.where(blind, 1, total)
        out = weights @ v
        lse = (top + np.log(np.where(blind, 1, total)))[..., 0]

        v_mean = v.sum(-2, keepdims=True) / number
        k_mean = np.where(samples, k, 0).sum(-2, keepdims=True)
        k_mean /= np.maximum(samples.sum(-2, keepdims=True), 1)
        deviation = np.abs(k - bf16(k_mean)) * seen
        # its mean is rounded to bfloat16
        spread = (np.abs(v - v_mean) + 2.0**-8 * np.abs(v_mean)) * seen

        # A score: q and k' = k - k̄ are off by at most half a step in each channel, and
        # q·k̄ (for lse) and the score itself by FP32 roundings.
        q_step = np.abs(q).max(-1) / 127  # [*B, K, G, T]
        k_step = (deviation.max((-1, -2)) + 2.0**-8 * np.abs(k_mean).max((-1, -2)))[..., None] / 127
        k_step = k_step * coarser
        in_score = abs(scale) * (
            q_step / 2 * deviation.sum(-1).max(-1)[..., None]
            + k_step / 2 * (np.abs(q).sum(-1) + head_dim * q_step / 2)
            + 2.0**-18 * (np.abs(q) * np.abs(k).max(-2, keepdims=True)).sum(-1)
        )
        in_score = in_score + 2.0**-18 + 2.0**-18 * largest_bias
        # lse moves by no more than the largest change of a score.
        worst_lse = in_score + 2.0**-18 * np.abs(np.where(np.isinf(lse), 0, lse))

        # An output is sum(w' v') / sum(w'), w' = w e^(error of the score) (1 + rounding of P). As
        # sum(w (v - out)) = 0, the errors of w count only times v - out.
        relative, subnormal = _RELATIVE[pv], _SUBNORMAL[pv]
        in_score = in_score[..., None]
        above = np.exp(in_score) * (1 + relative)
        below = np.exp(-in_score) * (1 - relative)
        # sum(w |v - out|) <= sum(w |v - v̄|) + |v̄ - out|
        around = weights @ spread + np.abs(out - v_mean)
        count = visible.sum(-1)[..., None]
        around_all = (visible @ spread) + count * np.abs(out - v_mean)
        in_weights = (above - 1) / below * around + subnormal / _P_MIN_TOP / below * around_all
        # V: the rounding of codes, once in the sum and once in the mean that is put back.
        step = spread.max(-2, keepdims=True) * subnormal / _V_MAX
        in_v = above / below * (relative * (weights @ spread) + step)
        in_v = in_v + relative * spread.sum(-2, keepdims=True) / number + step
        # FP16 partial sums over 64 (Hopper: 128) keys: at most four roundings of 2^-11, for output
        # and row sum.
        in_sums = 2.0**-8 * above / below * (weights @ spread + step)
        in_fp32 = 2.0**-18 * (np.abs(out) + np.abs(v_mean) + weights @ spread)
        worst_out = in_weights + in_v + in_sums + in_fp32

        # As in TYPICAL: errors of the terms w_j (v_j - v̄) are independent.
        typical = np.sqrt((weights**2) @ ((v - v_mean) ** 2))
        largest = 2 * weights.max(-1, keepdims=True) * spread.max(-2, keepdims=True)
    results = out, lse, worst_out, worst_lse, typical, around, largest
    return Reference(*map(tokens, results))


def half_ulp(x, dtype):
    """What rounding x to dtype may change."""
    info = ml_dtypes.finfo(dtype)
    return np.abs(x) * float(info.eps) / 2 + float(info.smallest_subnormal)


def assert_accurate(out, lse, expected: Reference, *, pv="fp8", kind="normal"):
    """Within the worst case everywhere; where there are enough outputs, typical on average."""
    tails = "heavy" if kind == "heavy" else "normal"
    assert out.shape == expected.out.shape
    rounding = half_ulp(expected.out, out.dtype)
    error = np.abs(np.asarray(out).astype(np.float64) - expected.out)
    excess = error - expected.worst_out - rounding
    assert not np.isnan(error).any(), f"{np.isnan(error).sum()} outputs are NaN"
    assert excess.max(initial=0) <= 0, (
        f"output {np.unravel_index(excess.argmax(), error.shape)} is off by {error.max()}"
    )
    channels = error.shape[-1]
    # Rows that see nothing are exact: they make no mean of the others' errors.
    outputs = np.count_nonzero(~np.isneginf(expected.lse)) * channels
    enough = outputs >= _ENOUGH and channels >= _ENOUGH_CHANNELS
    if enough:
        error = np.maximum(error - rounding, 0)
        assert error.sum() <= _TYPICAL[pv, tails] * expected.typical.sum()
    if lse is None:
        return
    assert lse.shape == expected.lse.shape
    assert lse.dtype == np.float32
    lse = np.asarray(lse).astype(np.float64)
    nothing = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), nothing)
    error = np.abs(lse[~nothing] - expected.lse[~nothing])
    assert not np.isnan(error).any(), f"{np.isnan(error).sum()} lse are NaN"
    assert np.all(error <= expected.worst_lse[~nothing]), f"lse is off by {error.max()}"
    if enough and error.size >= _ENOUGH_ROWS:
        assert error.mean() <= _TYPICAL_LSE[tails]


def relative_l1(actual, expected) -> float:
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    return float(np.abs(actual - expected).sum() / np.abs(expected).sum())


def cosine(actual, expected) -> float:
    a, b = (np.asarray(x).astype(np.float64).ravel() for x in (actual, expected))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def rmse(actual, expected) -> float:
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    return float(np.sqrt(np.mean((actual - expected) ** 2)))
