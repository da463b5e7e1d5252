"""The public call: arguments, layouts and errors."""

from typing import Literal, overload

import jax
from jax.typing import ArrayLike

from jax_sage import primitive
from jax_sage.arguments import Alignment, Window, prepare
from jax_sage.recipe import Recipe


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: Window | None = ...,
    return_residual: Literal[False] = ...,
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    causal_alignment: Alignment = ...,
    recipe: str | Recipe = ...,
) -> jax.Array: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: Window | None = ...,
    return_residual: Literal[True],
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    causal_alignment: Alignment = ...,
    recipe: str | Recipe = ...,
) -> tuple[jax.Array, jax.Array]: ...
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window | None = None,
    return_residual: bool = False,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    causal_alignment: Alignment = "top_left",
    recipe: str | Recipe = "8+8",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention in INT8 and FP8: SageAttention2++.

    A replacement for :func:`jax.nn.dot_product_attention`, with the same layouts, arguments and
    defaults. On an NVIDIA GPU with a kernel for the call it runs as CUDA; elsewhere the same
    numerics run in plain JAX (:func:`jax_sage.info` says which, and why). Memory is proportional to
    the inputs: nothing of size T·S is stored.

    A query sees a key if everything that is given allows it. One that sees none gives output 0 and
    lse -inf.

    Args:
      query: ``[*B, T, N, H]``, float16, bfloat16 or float32. ``*B`` is any number of batch
        dimensions, none included. H from 1 to 256.
      key: ``[*B, S, K, H]``, the dtype of query. N is a multiple of K: query head n attends to
        head ``n // (N / K)`` of key and value (grouped-query and multi-query attention).
      value: ``[*B, S, K, Hv]``, the dtype of query. Hv from 1 to 256, usually H.
      bias: added to the scaled scores; float16, bfloat16 or float32, broadcastable to
        ``[*B, N, T, S]``. Where it is -inf, or below -5.8e6 (2^23 in base 2), the key is not seen.
      mask: bool, True where the key is seen; broadcastable to ``[*B, N, T, S]``.
      scale: multiplies the scores before softmax; a Python number. Default ``1 / sqrt(H)``.
      is_causal: query t sees the keys 0..t only (see ``causal_alignment``).
      query_seq_lengths: integers ``[*B]``: queries from this position on see nothing.
      key_value_seq_lengths: integers ``[*B]``: keys from this position on are not seen.
      local_window_size: ``(left, right)``: query t sees the keys t - left to t + right only. One
        int stands for both.
      return_residual: also return the log-sum-exp of the scores.
      query_segment_ids, key_value_segment_ids: integers ``[*B, T]`` and ``[*B, S]``, for several
        sequences packed into one: a query sees the keys of its own segment. Each segment is
        smoothed and scaled for itself.
      causal_alignment: which query and key ``is_causal`` and ``local_window_size`` take as being
        at the same position. ``"top_left"``: the first of each, as jax.nn does.
        ``"bottom_right"``: the last of each, by the lengths where they are given; a query that
        continues a longer key/value cache needs that.
      recipe: ``"8+8"`` (INT8 QKᵀ, E4M3 PV in FP16 accumulators added up in FP32: the fast one),
        ``"8+16"`` (INT8 QKᵀ, FP16 PV in FP32: the accurate one), or a :class:`jax_sage.Recipe`.

    Returns:
      ``[*B, T, N, Hv]`` in the dtype of query; with ``return_residual``, a pair of that and
      lse ``[*B, T, N]`` in float32, natural logarithm. Values of the input that are not finite give
      NaN in the outputs that depend on them and in no others; so does a query whose largest score,
      less its product with the mean key, is beyond ±1.16e7 (2^24 in base 2), where FP32 cannot tell
      scores apart. What a query does not see has no influence on any bit of the result, unless
      another query of the same batch entry and head sees it.

    Raises:
      TypeError: a dtype is not supported or differs between the arrays, or an option has the wrong
        type.
      ValueError: shapes do not fit together, or an option has a value that is not allowed.
      NotImplementedError: shapes are symbolic; and, when it is differentiated: there is no
        derivative yet.

    Sources: SageAttention2++ (arXiv 2505.21136), SageAttention2 (2411.10958).
    """
    operands, params = prepare(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        return_residual=return_residual,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        causal_alignment=causal_alignment,
        recipe=recipe,
    )
    out, lse = primitive.attention_p.bind(*operands, **params)
    return (out, lse) if return_residual else out
