"""The public call: arguments, layouts and errors."""

import math
import numbers
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_sage import primitive
from jax_sage.recipe import Recipe, resolve

MAX_HEAD_DIM = 128
_DTYPES = ("float16", "bfloat16", "float32")


@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: None = ...,
    mask: None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: None = ...,
    key_value_seq_lengths: None = ...,
    local_window_size: None = ...,
    return_residual: Literal[False] = ...,
    recipe: str | Recipe = ...,
) -> jax.Array: ...
@overload
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: None = ...,
    mask: None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: None = ...,
    key_value_seq_lengths: None = ...,
    local_window_size: None = ...,
    return_residual: Literal[True],
    recipe: str | Recipe = ...,
) -> tuple[jax.Array, jax.Array]: ...
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: None = None,
    mask: None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: None = None,
    key_value_seq_lengths: None = None,
    local_window_size: None = None,
    return_residual: bool = False,
    recipe: str | Recipe = "8+8",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention in INT8 and FP8: SageAttention2++.

    A replacement for :func:`jax.nn.dot_product_attention`, with the same layouts and defaults.
    On an NVIDIA GPU with a kernel for the recipe it runs as CUDA; elsewhere the same numerics run
    in plain JAX (:func:`jax_sage.info` says which, and why). Memory is proportional to the inputs:
    nothing of size T·S is stored.

    Args:
      query: ``[*B, T, N, H]``, float16, bfloat16 or float32. ``*B`` is any number of batch
        dimensions, none included. H from 1 to 128.
      key: ``[*B, S, K, H]``, the dtype of query. N is a multiple of K: query head n attends to
        head ``n // (N / K)`` of key and value (grouped-query and multi-query attention).
      value: ``[*B, S, K, H]``, the dtype of query.
      bias, mask: not there yet; anything but None raises. They are named so that a Flax module that
        hands a mask to its attention function gets that error and not an unmasked result.
      scale: multiplies the scores before softmax; a Python number. Default ``1 / sqrt(H)``.
      is_causal: query t sees the keys 0..t only (aligned at the first token, whatever T and S).
      query_seq_lengths, key_value_seq_lengths, local_window_size: not there yet; anything but None
        raises.
      return_residual: also return the log-sum-exp of the scores.
      recipe: ``"8+8"`` (INT8 QKᵀ, E4M3 PV in FP16 accumulators added up in FP32: the fast one),
        ``"8+16"`` (INT8 QKᵀ, FP16 PV in FP32: the accurate one), or a :class:`jax_sage.Recipe`.

    Returns:
      ``[*B, T, N, H]`` in the dtype of query; with ``return_residual``, a pair of that and
      lse ``[*B, T, N]`` in float32, natural logarithm. A query that sees no key (S = 0) gives
      output 0 and lse -inf. Values of the input that are not finite give NaN in the outputs that
      attend to them and in no others; so does a query whose largest score, less its product with
      the mean key, is beyond ±1.16e7 (2^24 in base 2), where FP32 cannot tell scores apart.

    Raises:
      TypeError: a dtype is not supported or differs between the arrays, or an option has the wrong
        type.
      ValueError: shapes do not fit together, or the recipe is unknown.
      NotImplementedError: an argument that is not there yet is given, or shapes are symbolic; and,
        when it is differentiated: there is no derivative yet.

    Sources: SageAttention2++ (arXiv 2505.21136), SageAttention2 (2411.10958).
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    absent = {
        "bias": bias,
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
    }
    for name, argument in absent.items():
        if argument is not None:
            raise NotImplementedError(
                f"jax_sage.attention has no {name} yet (is_causal=True is there); use "
                "jax.nn.dot_product_attention for this call."
            )
    chosen = resolve(recipe)
    _check_arrays(query, key, value)
    for name, flag in (("is_causal", is_causal), ("return_residual", return_residual)):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} is {flag!r}; it must be a Python bool: it selects a kernel.")
    scale = _check_scale(scale, query.shape[-1])

    out, lse = primitive.attention_p.bind(
        query,
        key,
        value,
        scale_log2=scale * math.log2(math.e),
        is_causal=bool(is_causal),
        exact_lse=bool(return_residual),
        recipe=chosen,
    )
    return (out, lse) if return_residual else out


def _check_arrays(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    layout = "Expected query [*B, T, N, H], key and value [*B, S, K, H]"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype.name not in _DTYPES:
            raise TypeError(
                f"{name} is {array.dtype.name}; allowed: {', '.join(_DTYPES)}. Cast it first."
            )
        if not all(isinstance(dim, int) for dim in array.shape):
            raise NotImplementedError(
                f"{name} has the symbolic shape {array.shape}; jax_sage.attention needs shapes of "
                "numbers. Export for each shape."
            )
        if array.ndim < 3:
            raise ValueError(f"{name} has rank {array.ndim}, at least 3 is needed. {layout}.")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value are {query.dtype.name}, {key.dtype.name} and "
            f"{value.dtype.name}; they must be of one dtype. Cast them first."
        )
    if key.shape != value.shape:
        raise ValueError(f"key and value differ in shape: {shapes}. {layout}.")
    if query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"The batch dimensions differ: {shapes}. {layout}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"The head dimensions H differ: {shapes}. {layout}.")
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"The head dimension is {query.shape[-1]}; allowed: 1 to {MAX_HEAD_DIM}.")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads are not a multiple of {kv_heads} key/value heads: {shapes}."
        )


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not isinstance(scale, numbers.Real) and not (
        isinstance(scale, np.ndarray) and scale.ndim == 0
    ):
        raise TypeError(
            f"scale is a {type(scale).__name__}; it must be a Python number: it is a constant of "
            "the compiled program. Multiply query by a traced scale instead."
        )
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite.")
    return scale
