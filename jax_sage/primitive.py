"""The primitive ``sage_attention``: abstract evaluation, batching, differentiation, lowering.

``attention_p.bind(q, k, v, *masks, given=, band=, scale_log2=, with_lse=, recipe=)`` gives (out,
lse), with the layouts of :func:`jax_sage.attention`. ``given`` names the arrays of
:class:`jax_sage.masking.Masks` that ``masks`` holds, each with as many batch dimensions as query.
``scale_log2`` is the softmax scale times log2(e). Without ``with_lse`` lse is 0.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_sage import lowering_cuda, portable
from jax_sage.masking import Band, Masks
from jax_sage.recipe import Recipe

# Warnings, profiles and the metadata of XLA then name the caller's line.
source_info_util.register_exclusion(os.path.join(os.path.dirname(__file__), ""))

attention_p = Primitive("sage_attention")
attention_p.multiple_results = True


@attention_p.def_impl
def _impl(*operands: jax.Array, **params: Any) -> Sequence[jax.Array]:
    return _compiled(**params)(*operands)


@functools.lru_cache(maxsize=256)
def _compiled(**params: Any) -> Any:
    # Eager calls go through jit, so that they run what a jitted model runs.
    return jax.jit(functools.partial(attention_p.bind, **params))


@attention_p.def_abstract_eval
def _abstract_eval(
    query: jax.core.ShapedArray,  # [*B, T, N, H]
    key: jax.core.ShapedArray,  # [*B, S, K, H]
    value: jax.core.ShapedArray,  # [*B, S, K, Hv]
    *masks: jax.core.ShapedArray,
    given: tuple[str, ...],
    band: Band,
    scale_log2: float,
    with_lse: bool,
    recipe: Recipe,
) -> tuple[jax.core.ShapedArray, jax.core.ShapedArray]:
    del key, masks, given, band, scale_log2, with_lse, recipe
    rows = query.shape[:-1]
    return query.update(shape=(*rows, value.shape[-1]), weak_type=False), query.update(
        shape=rows, dtype=jnp.dtype(jnp.float32), weak_type=False
    )


def _batch(
    operands: Sequence[jax.Array], axes: Sequence[int | None], *, band: Band, **params: Any
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    """The new axis becomes a leading batch dimension of all operands."""
    if axes[0] is not None and len(operands) == 3 and tuple(axes[1:]) == (None, None):
        return _batch_query(*operands, axis=axes[0], band=band, **params)
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    moved = []
    for i, (x, axis) in enumerate(zip(operands, axes, strict=True)):
        if i < 3:
            moved.append(batching.bdim_at_front(x, axis, size))
        else:  # masks may have a 1 for "all alike": nothing is copied
            moved.append(x[None] if axis is None else jnp.moveaxis(x, axis, 0))
    return attention_p.bind(*moved, band=band, **params), (0, 0)


def _batch_query(
    query: jax.Array, key: jax.Array, value: jax.Array, *, axis: int, band: Band, **params: Any
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    """The query alone has the new axis: more tokens (or heads, in a band) see one key and value."""
    if band == Band():  # [*B, axis, T, N, H]
        place = first = query.ndim - 4
    else:  # [*B, T, N, axis, H]: a group of query heads is in one piece
        place = query.ndim - 2
        first = place - 1
    moved = jnp.moveaxis(query, axis, place)
    shape = moved.shape
    merged = moved.reshape(*shape[:first], shape[first] * shape[first + 1], *shape[first + 2 :])
    out, lse = attention_p.bind(merged, key, value, band=band, **params)
    out = out.reshape(*shape[:-1], out.shape[-1])
    return (out, lse.reshape(shape[:-1])), (place, place)


batching.primitive_batchers[attention_p] = _batch


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> NoReturn:
    del primals, tangents, params
    raise NotImplementedError(
        "jax_sage.attention cannot be differentiated yet: it has no derivative rule, and gives an "
        "error rather than a gradient of zero. Use jax.nn.dot_product_attention where you need "
        "gradients, or jax.lax.stop_gradient on query, key and value (and bias) where you do not."
    )


ad.primitive_jvps[attention_p] = _jvp


def _guarded(function: Callable[..., Sequence[jax.Array]]) -> Callable[..., Sequence[jax.Array]]:
    """Puts the masks together. No implementation takes arrays of size 0: no query, or no key."""

    def run(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *masks: jax.Array,
        given: tuple[str, ...],
        with_lse: bool,
        **params: Any,
    ) -> Sequence[Any]:
        if query.size and key.size and value.size:
            all_masks = Masks(**dict(zip(given, masks, strict=True)))
            out, lse = function(query, key, value, all_masks, with_lse=with_lse, **params)
        else:
            out = jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
            lse = jnp.full(query.shape[:-1], -jnp.inf, jnp.float32)
        # An eager call has both as results, and jax_debug_nans and jax_debug_infs look at both.
        return out, lse if with_lse else jnp.zeros_like(lse)

    return run


def _portable(*operands: Any, with_lse: bool, **params: Any) -> Sequence[jax.Array]:
    del with_lse  # it makes lse in any case
    return portable.attention(*operands, **params)


_lower_portable = mlir.lower_fun(_guarded(_portable), multiple_results=True)
_lower_cuda = mlir.lower_fun(_guarded(lowering_cuda.attention), multiple_results=True)
mlir.register_lowering(attention_p, _lower_portable)
mlir.register_lowering(attention_p, _lower_cuda, platform="cuda")
