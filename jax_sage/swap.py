"""Flax models with their attention modules swapped."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np

from jax_sage import calls
from jax_sage.adapters import SwappedAttention, library_of
from jax_sage.patch import check_policy, complain, linen_modules
from jax_sage.policy import Policy
from jax_sage.report import Report
from jax_sage.sites import traceable

Model = TypeVar("Model")


@overload
def swap(
    model: Model,
    policy: Policy | None = ...,
    *,
    sample: tuple[Any, ...] | dict[str, Any] | None = ...,
    return_report: Literal[False] = ...,
    strict: bool = ...,
) -> Model: ...
@overload
def swap(
    model: Model,
    policy: Policy | None = ...,
    *,
    sample: tuple[Any, ...] | dict[str, Any],
    return_report: Literal[True],
    strict: bool = ...,
) -> tuple[Model, Report]: ...
def swap(
    model: Model,
    policy: Policy | None = None,
    *,
    sample: tuple[Any, ...] | dict[str, Any] | None = None,
    return_report: bool = False,
    strict: bool = False,
) -> Model | tuple[Model, Report]:
    """The model with its attention modules computed by :func:`jax_sage.attention`.

    ::

        fast = jax_sage.swap(model)
        fast, report = jax_sage.swap(model, sample=(x,), return_report=True)

    The result is called as the model is, its parameters are the model's arrays, in the same tree,
    and the model is left alone. Swapped are ``nnx.MultiHeadAttention``,
    ``linen.MultiHeadDotProductAttention`` and what derives from them, and, in nnx models, any other
    attribute that is an attention function of ``jax.nn``, ``flax.nnx`` or ``flax.linen``. Modules
    that call such a function by its name are reached by :func:`jax_sage.patch`. Swap for
    inference: there is no derivative yet.

    Args:
      model: an ``nnx.Module`` or a ``linen.Module``.
      policy: which attentions are swapped, and how; by default all where it pays.
      sample: arguments of a call of the model, by position (a tuple) or by name (a dict), arrays or
        :class:`jax.ShapeDtypeStruct`; of a linen model without its variables. The call is traced,
        nothing is computed.
      return_report: also return what became of each attention in that call.
      strict: raise where nothing is swapped.

    Returns:
      The new model; with ``return_report``, a pair of that and a :class:`jax_sage.Report`.

    Raises:
      TypeError: the model is of neither kind.
      ValueError: ``return_report`` without ``sample``; ``strict``, and nothing was swapped.
      UnsupportedAttentionError: see :class:`jax_sage.Policy`; here only with ``sample``, otherwise
        when the new model is called.

    Warns:
      SwapWarning: nothing was swapped.
    """
    policy = check_policy(policy)
    if return_report and sample is None:
        raise ValueError("return_report needs sample=(...): arguments of a call of the model.")
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if nnx is not None and isinstance(model, nnx.Module):
        new, found = swap_nnx(model, policy)
        call = traceable(new)
    elif linen is not None and isinstance(model, linen.Module):
        new, found = _swap_linen(model, policy), None  # only a call makes its modules
        call = functools.partial(new.init, jax.random.key(0))
        _check_no_variables(sample)
    else:
        raise TypeError(
            f"model is a {type(model).__name__}; jax_sage.swap takes flax.nnx and flax.linen "
            "modules. For others: with jax_sage.patch(): ..."
        )
    report = Report()
    if sample is not None:
        with calls.recording(report):
            _trace(call, sample)
        if not report.swapped:
            complain(report, "jax_sage.swap", strict, stacklevel=3)
    elif found == 0:
        complain(report, "jax_sage.swap", strict, stacklevel=3)
    return (new, report) if return_report else new


def swap_nnx(model: Any, policy: Policy) -> tuple[Any, int]:
    """A swapped copy, and how many attributes were replaced."""
    from flax import nnx

    new = nnx.clone(model)
    found = 0
    for parts, module in nnx.iter_modules(new):
        path = "/".join(map(str, parts))
        is_attention = isinstance(module, nnx.MultiHeadAttention)
        for name, function in list(vars(module).items()):
            if isinstance(function, SwappedAttention):  # swapped before: by another policy now
                function = function.exact
            library = library_of(function) if callable(function) else None
            if library is None and not (is_attention and name == "attention_fn"):
                continue
            kind = f"nnx.{type(module).__name__}"
            setattr(module, name, SwappedAttention(path or kind, kind, policy, function, library))
            found += 1
    return new, found


def _swap_linen(model: Any, policy: Policy) -> Any:
    base: Any = getattr(type(model), "_jax_sage_base", type(model))
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init}
    del fields["parent"]
    return _swapped_class(base, policy)(**fields)


@functools.lru_cache(maxsize=256)
def _swapped_class(base: type, policy: Policy) -> type:
    """A subclass in whose methods linen's attention modules are swapped.

    One for each class and policy: equal models stay equal, and are compiled once.
    """
    from flax import linen

    def within(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(base, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with linen_modules(policy):
                return getattr(super(new, self), name)(*args, **kwargs)

        # A plain method that calls one with linen's marks (compact, ...), which stay there.
        method.__dict__.clear()
        return method

    body: dict[str, Any] = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_jax_sage_base": base,
    }
    # What a model is called by, at the top (`apply(..., method=f)` calls any f) or as a part of
    # another, which calls its methods.
    for name in ("apply", "init", "init_with_output"):
        body[name] = linen.nowrap(within(name))
    for name, _ in inspect.getmembers(base, inspect.isfunction):
        if name == "__call__" or not (name.startswith("__") or hasattr(linen.Module, name)):
            body[name] = within(name)
    new: type = type(base)(base.__name__, (base,), body)
    return new


def _check_no_variables(sample: tuple[Any, ...] | dict[str, Any] | None) -> None:
    first = sample[0] if isinstance(sample, tuple | list) and sample else None
    if isinstance(first, Mapping) and "params" in first:
        raise TypeError(
            "sample begins with the variables of a linen model; it takes the other arguments of "
            "the call alone, as sample=(x,)."
        )


def _trace(function: Callable[..., Any], sample: tuple[Any, ...] | dict[str, Any]) -> None:
    """Traces a call with the sample's arrays; what is not an array stays as it is."""
    if not isinstance(sample, tuple | list | dict):
        raise TypeError(
            f"sample is of type {type(sample).__name__}; it must be a tuple of arguments, as (x,), "
            "or a dict of them by name."
        )
    leaves, tree = jax.tree.flatten(sample)
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, kinds)}

    def call(arrays: dict[int, jax.Array]) -> None:
        given = jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)])
        function(**given) if isinstance(given, dict) else function(*given)

    jax.eval_shape(call, arrays)
