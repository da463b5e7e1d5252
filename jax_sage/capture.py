"""The tensors of every attention in a run of a model."""

import contextlib
import dataclasses
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_sage import calls
from jax_sage.arguments import prepare
from jax_sage.patch import patched
from jax_sage.policy import Policy
from jax_sage.report import text_table
from jax_sage.swap import swap_nnx


@dataclasses.dataclass(frozen=True)
class CapturedAttention:
    """One attention call of a run, as numpy arrays.

    ``jax_sage.compare(a.query, a.key, a.value, **a.options)`` says what quantization does to it.

    Attributes:
      path: of the module, or the place in the code that calls it.
      kind: of the module or function.
      query, key, value: ``[*B, T, N, H]``, ``[*B, S, K, H]`` and ``[*B, S, K, Hv]``; what a
        function under vmap is mapped over is a batch dimension.
      options: further arguments of :func:`jax_sage.attention`: masks, is_causal, scale, ...
      output: of the model's own attention, ``[*B, T, N, Hv]``.
    """

    path: str
    kind: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    options: dict[str, Any]
    output: np.ndarray


class CapturedAttentions(list[CapturedAttention]):
    """A list that prints as a table."""

    def __str__(self) -> str:
        rows = []
        for a in self:
            shapes = ("x".join(map(str, x.shape)) for x in (a.query, a.key, a.value))
            options = (n for n, x in a.options.items() if x is not None and x is not False)
            rows.append((a.path, a.kind, *shapes, a.query.dtype.name, ", ".join(options)))
        columns = ("path", "kind", "query", "key", "value", "dtype", "options")
        return f"{len(self)} attentions\n{text_table(columns, rows)}"

    __repr__ = __str__


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> CapturedAttentions:
    """Runs a model or function and returns the tensors of every attention in it.

    ::

        attentions = jax_sage.capture(model, x)                                   # nnx
        attentions = jax_sage.capture(functools.partial(model.apply, variables), x)  # linen

    The attentions are those that :func:`jax_sage.swap` and :func:`jax_sage.patch` reach; nothing is
    swapped. Each call is captured, also those of a loop, in the order in which they are computed.
    Functions that are jit-compiled are compiled anew.

    Args:
      model: an ``nnx.Module`` (which is left alone: a copy is called) or any function.
      *args, **kwargs: its arguments.

    Raises:
      TypeError: a linen module is given without its variables.

    Warns:
      SwapWarning: no attention was found, or one could not be captured.
    """
    tape: list[CapturedAttention] = []
    policy = _Capture(number=next(_numbers))
    with _recording(policy, tape):
        out = under(policy, model)(*args, **kwargs)
        jax.block_until_ready(out)
        jax.effects_barrier()
    if not tape:
        warnings.warn(
            "jax_sage.capture found no attention. jax_sage.attention_sites(function, *args) lists "
            "what computes attention otherwise.",
            calls.SwapWarning,
            stacklevel=2,
        )
    return CapturedAttentions(tape)


def under(policy: Policy, model: Callable[..., Any]) -> Callable[..., Any]:
    """The model or function as it runs with this policy wherever it can be reached."""
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if linen is not None and isinstance(model, linen.Module):
        raise TypeError(
            "model is a linen module, which has no variables. Give a function of the other "
            "arguments: functools.partial(model.apply, variables)."
        )
    if nnx is not None and isinstance(model, nnx.Module):
        model, _ = swap_nnx(model, policy)

    def run(*args: Any, **kwargs: Any) -> Any:
        with patched(policy):
            return model(*args, **kwargs)

    return run


@dataclasses.dataclass(frozen=True)
class _Capture(Policy):
    """No two are equal: what is compiled with one is never used for another."""

    number: int = 0


_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class _Description:
    """What a tap knows when it is traced; by a number of its own, to be a parameter."""

    path: str
    kind: str
    options: dict[str, Any]  # without arrays
    names: tuple[str, ...]  # of the arrays that follow query, key and value
    tape: list[CapturedAttention]


_descriptions: dict[int, _Description] = {}


@contextlib.contextmanager
def _recording(policy: _Capture, tape: list[CapturedAttention]) -> Iterator[None]:
    mine: list[int] = []

    def tap(call: calls.Call, path: str, kind: str, exact: Callable[[], jax.Array]) -> jax.Array:
        out = exact()
        try:
            operands, params = prepare(call.query, call.key, call.value, **call.known_options())
        except (TypeError, ValueError, NotImplementedError) as error:
            message = f"{kind} at {path} is not captured: {error}"
            warnings.warn(message, calls.SwapWarning, stacklevel=2)
            return out
        static = {n: x for n, x in call.options.items() if n not in params["given"]}
        number = next(_numbers)
        _descriptions[number] = _Description(path, kind, static, params["given"], tape)
        mine.append(number)
        (out,) = tap_p.bind(call.arrange(out), *operands, number=number)
        return call.restore(out)

    with calls.tapping(policy, tap):
        try:
            yield
        finally:
            for number in mine:
                del _descriptions[number]


# The output as it is, and query, key, value and masks to the host. Like attention_p, it has what it
# is mapped over as leading dimensions, so that the host sees whole arrays.
tap_p = Primitive("jax_sage_tap")
tap_p.multiple_results = True


@tap_p.def_impl
def _impl(*operands: jax.Array, number: int) -> Sequence[jax.Array]:
    return jax.jit(functools.partial(tap_p.bind, number=number))(*operands)


@tap_p.def_abstract_eval
def _abstract_eval(out: jax.core.ShapedArray, *operands: Any, number: int) -> Sequence[Any]:
    del operands, number
    return [out]


def _batch(
    operands: Sequence[jax.Array], axes: Sequence[int | None], *, number: int
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    moved = []
    for i, (x, axis) in enumerate(zip(operands, axes, strict=True)):
        if i < 4:  # output, query, key, value
            moved.append(batching.bdim_at_front(x, axis, size))
        else:
            moved.append(x[None] if axis is None else jnp.moveaxis(x, axis, 0))
    return tap_p.bind(*moved, number=number), (0,)


batching.primitive_batchers[tap_p] = _batch


def _tap(*operands: jax.Array, number: int) -> Sequence[jax.Array]:
    def host(*arrays: Any) -> np.ndarray:
        out, query, key, value, *masks = map(np.asarray, arrays)
        d = _descriptions[number]
        options = {**d.options, **dict(zip(d.names, masks, strict=True))}
        d.tape.append(CapturedAttention(d.path, d.kind, query, key, value, options, out))
        return out

    shape = jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)
    return [jax.pure_callback(host, shape, *operands)]


mlir.register_lowering(tap_p, mlir.lower_fun(_tap, multiple_results=True))
