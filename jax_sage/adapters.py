"""The attention functions of other libraries, in the terms of :func:`jax_sage.attention`."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_sage import calls
from jax_sage.policy import Policy

# Arguments of Flax's functions that put something in place of an einsum.
_HOOKS = ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum")


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """:func:`jax_sage.attention` with the arguments of Flax's ``dot_product_attention``.

    The ``attention_fn`` of ``nnx.MultiHeadAttention`` and ``linen.MultiHeadDotProductAttention``.

    Args:
      query: ``[*B, T, N, H]``.
      key, value: ``[*B, S, K, H]`` and ``[*B, S, K, Hv]``; linen has K = N.
      bias: broadcastable to ``[*B, N, T, S]``.
      mask: broadcastable to ``[*B, N, T, S]``, bool or numbers: not zero where the key is seen. A
        query that sees no key gives 0 here, and the mean of value in Flax.
      broadcast_dropout, precision, force_fp32_for_softmax: have no influence: there is no dropout,
        and the recipe says in which precision to compute.
      dropout_rng, dropout_rate, deterministic: dropout is not supported, and active if
        ``dropout_rate > 0`` and not ``deterministic``.
      dtype: query, key and value are cast to it; by default to the dtype that holds all three.
      module: given where the attention weights are to be stored (``sow_weights``): not supported.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: not supported: there
        are no such einsums to replace.
      promote_dtype: casts ``(query, key, value)`` in place of the default.
      is_causal: as in :func:`jax_sage.attention`.

    Returns:
      ``[*B, T, N, Hv]``.

    Raises:
      UnsupportedAttentionError: an argument is given that is not supported, or refused by
        :func:`jax_sage.attention`.
    """
    return calls.run_always(_flax_call(**locals()))


def _flax_call(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    **others: Any,
) -> calls.Call:
    problem = None
    hooks = [name for name in _HOOKS if others.get(name) is not None]
    if dropout_rate > 0 and not deterministic:
        problem = f"dropout is active (rate {dropout_rate}, not deterministic)"
    elif module is not None:
        problem = "the attention weights are to be stored (sow_weights); they never exist here"
    elif hooks:
        problem = f"{hooks[0]} is given; there is no such einsum to replace"
    arrays = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    if promote_dtype is not None:
        arrays = promote_dtype(arrays, dtype=dtype)
    else:
        target = jnp.result_type(*arrays) if dtype is None else dtype
        query, key, value = (x.astype(target) for x in arrays)
        arrays = query, key, value
    options = {"bias": bias, "mask": mask, "is_causal": bool(is_causal)}
    return calls.Call(*arrays, options, problem)


def _jax_nn_call(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    implementation: str | None = None,
    return_residual: bool = False,
    **options: Any,
) -> calls.Call:
    problem = "return_residual: its dtype is another than here" if return_residual else None
    arrays = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    return calls.Call(*arrays, options, problem)


def _equinox_call(
    query: jax.Array,  # [T, H]: called under vmap over heads
    key_: jax.Array,  # [S, H]
    value: jax.Array,  # [S, Hv]
    *,
    mask: jax.Array | None = None,  # [T, S]
    dropout: Any = None,
    inference: bool | None = None,
    key: jax.Array | None = None,
) -> calls.Call:
    problem = None
    if dropout is not None and dropout.p > 0:
        if not (dropout.inference if inference is None else inference):
            problem = f"dropout is active (rate {dropout.p}, not inference)"
    arrays = query[:, None, :], key_[:, None, :], value[:, None, :]
    return calls.Call(
        *arrays,
        {"mask": mask},
        problem,
        restore=lambda out: out[:, 0, :],
        arrange=lambda out: out[:, None, :],
    )


_CONVERT: dict[str, Callable[..., calls.Call]] = {
    "jax.nn": _jax_nn_call,
    "flax.linen": _flax_call,
    "flax.nnx": _flax_call,
    "equinox.nn": _equinox_call,
}


def stock_functions() -> dict[Callable[..., Any], str]:
    """The attention functions of the libraries that are imported, and whose they are."""
    found: dict[Callable[..., Any], str] = {inspect.unwrap(jax.nn.dot_product_attention): "jax.nn"}
    for library, module in (
        ("flax.linen", "flax.linen"),
        ("flax.nnx", "flax.nnx"),
        ("equinox.nn", "equinox.nn._attention"),
    ):
        function = getattr(sys.modules.get(module), "dot_product_attention", None)
        if function is not None:
            found[inspect.unwrap(function)] = library
    return found


def library_of(function: Any) -> str | None:
    """Whose attention function this is; None if it is of none of them."""
    try:
        return stock_functions().get(inspect.unwrap(function))
    except (TypeError, ValueError):  # not hashable, or not a function
        return None


@dataclasses.dataclass(frozen=True)
class SwappedAttention:
    """Takes the place of an attention function of jax.nn, Flax or equinox.

    Equal instances are alike for jit: swapping a model twice does not compile it twice.

    Attributes:
      path: of the module that calls it, or the place in the code.
      kind: of the module or function, for the report.
      policy: decides at each call.
      exact: the function that was there.
      library: whose that is; None if it is of none of them, and cannot be swapped.
    """

    path: str
    kind: str
    policy: Policy
    exact: Callable[..., jax.Array]
    library: str | None

    @property
    def __signature__(self) -> inspect.Signature:
        # linen hands over the arguments that the signature names.
        return inspect.signature(self.exact)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        exact = functools.partial(self.exact, *args, **kwargs)
        if self.library is None:
            query, key, value = (jnp.asarray(x) for x in args[:3])
            name = getattr(self.exact, "__qualname__", type(self.exact).__qualname__)
            call = calls.Call(query, key, value, {}, f"it has an attention of its own, {name}")
        else:
            # An argument that the function does not know raises here.
            arguments = self.__signature__.bind(*args, **kwargs).arguments
            call = _CONVERT[self.library](**arguments)
        return calls.run(call, self.policy, path=self.path, kind=self.kind, exact=exact)
