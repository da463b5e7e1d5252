"""Checks of the arguments of the public call, and what they become for the primitive."""

import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_sage.masking import Band, Masks
from jax_sage.recipe import Recipe, resolve

MAX_HEAD_DIM = 256
_DTYPES = ("float16", "bfloat16", "float32")
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
_ALIGNMENTS = ("top_left", "bottom_right")

Window = int | tuple[int, int]
Alignment = Literal["top_left", "bottom_right"]


def prepare(
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
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Checks the arguments of `attention`; operands and parameters of the primitive."""
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    chosen = resolve(recipe)
    _check_arrays(query, key, value)
    for name, flag in (("is_causal", is_causal), ("return_residual", return_residual)):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} is {flag!r}; it must be a Python bool: it selects a kernel.")
    scale = _check_scale(scale, query.shape[-1])
    *batch, length_q, heads, _ = query.shape
    length_kv = key.shape[-3]
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        raise ValueError(
            "query_segment_ids and key_value_segment_ids belong together: one of them is not given."
        )
    own_segments = query_segment_ids is key_value_segment_ids
    scores = (*batch, heads, length_q, length_kv)
    masks = Masks(
        bias=_check_array("bias", bias, scores, "[*B, N, T, S]", _DTYPES),
        mask=_check_array("mask", mask, scores, "[*B, N, T, S]", ("bool",)),
        query_seq_lengths=_check_integers("query_seq_lengths", query_seq_lengths, batch),
        key_value_seq_lengths=_check_integers(
            "key_value_seq_lengths", key_value_seq_lengths, batch
        ),
        query_segment_ids=_check_integers(
            "query_segment_ids", query_segment_ids, batch, T=length_q
        ),
        key_value_segment_ids=_check_integers(
            "key_value_segment_ids", key_value_segment_ids, batch, S=length_kv
        ),
    )
    if own_segments:
        masks = masks._replace(key_value_segment_ids=None)
    if not isinstance(causal_alignment, str) or causal_alignment not in _ALIGNMENTS:
        raise ValueError(f"causal_alignment is {causal_alignment!r}; allowed: {_ALIGNMENTS}.")
    left, right = _check_window(local_window_size)
    if is_causal:
        right = 0
    has_lengths = not (query_seq_lengths is None and key_value_seq_lengths is None)
    band = Band(left, right, causal_alignment == "bottom_right").simplified(
        length_q, length_kv, has_lengths=has_lengths
    )

    return (query, key, value, *masks.arrays()), {
        "given": masks.given(),
        "band": band,
        "scale_log2": scale * math.log2(math.e),
        "with_lse": bool(return_residual),
        "recipe": chosen,
    }


def _check_arrays(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    layout = "Expected query [*B, T, N, H], key [*B, S, K, H] and value [*B, S, K, Hv]"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype.name not in _DTYPES:
            raise TypeError(
                f"{name} is {array.dtype.name}; allowed: {', '.join(_DTYPES)}. Cast it first."
            )
        _check_static(name, array)
        if array.ndim < 3:
            raise ValueError(f"{name} has rank {array.ndim}, at least 3 is needed. {layout}.")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value are {query.dtype.name}, {key.dtype.name} and "
            f"{value.dtype.name}; they must be of one dtype. Cast them first."
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key and value differ in batch dimensions, length or heads: {shapes}. {layout}."
        )
    if query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"The batch dimensions differ: {shapes}. {layout}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"The head dimensions H differ: {shapes}. {layout}.")
    for array, what in ((query, "head dimension"), (value, "head dimension of value")):
        if not 1 <= array.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"The {what} is {array.shape[-1]}; allowed: 1 to {MAX_HEAD_DIM}.")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads are not a multiple of {kv_heads} key/value heads: {shapes}."
        )


def _check_static(name: str, array: jax.Array) -> None:
    if not all(isinstance(dim, int) for dim in array.shape):
        raise NotImplementedError(
            f"{name} has the symbolic shape {array.shape}; jax_sage.attention needs shapes of "
            "numbers. Export for each shape."
        )


def _check_array(
    name: str,
    given: ArrayLike | None,
    shape: tuple[int, ...],
    layout: str,
    dtypes: tuple[str, ...],
) -> jax.Array | None:
    """The array with as many dimensions as `shape`, each that of `shape` or 1."""
    if given is None:
        return None
    array = jnp.asarray(given)
    _check_static(name, array)
    if array.dtype.name not in dtypes:
        advice = ""
        if name == "mask":
            advice = " Make it one by mask != 0; numbers that are to be added go into bias."
        raise TypeError(f"{name} is {array.dtype.name}; allowed: {', '.join(dtypes)}.{advice}")
    dims = array.shape
    while len(dims) > len(shape) and dims[0] == 1:  # [1, N, T, S] where there is no batch
        dims = dims[1:]
    dims = (1,) * (len(shape) - len(dims)) + dims
    if len(dims) != len(shape) or any(d not in (1, s) for d, s in zip(dims, shape, strict=True)):
        raise ValueError(
            f"{name} {array.shape} does not broadcast to {layout} = {shape} of this call."
        )
    return array.reshape(dims)


def _check_integers(
    name: str, given: ArrayLike | None, batch: list[int], **tokens: int
) -> jax.Array | None:
    """As int32 [*B, tokens]; where there is no batch, one of 1 is accepted as in jax.nn."""
    if given is None:
        return None
    array = jnp.asarray(given)
    _check_static(name, array)
    if array.dtype.name not in _INTEGERS:
        raise TypeError(f"{name} is {array.dtype.name}; it must be int32.")
    shape = (*batch, *tokens.values())
    if array.shape != shape and not (not batch and array.shape == (1, *shape)):
        layout = ", ".join(["*B", *tokens])
        raise ValueError(f"{name} has the shape {array.shape}, expected [{layout}] = {shape}.")
    return array.reshape(shape).astype(jnp.int32)


def _check_window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = window if isinstance(window, tuple | list) else (window, window)
    whole = all(
        isinstance(x, numbers.Integral) and not isinstance(x, bool | np.bool_) for x in sides
    )
    if len(sides) != 2 or not whole:
        raise TypeError(
            f"local_window_size is {window!r}; it must be a Python int or a pair (left, right) of "
            "them: it decides which keys are visited."
        )
    left, right = (int(x) for x in sides)
    if min(left, right) < 0:
        raise ValueError(f"local_window_size is {window!r}; it must not be negative.")
    return left, right


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
