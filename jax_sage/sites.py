"""Attention that a function computes otherwise: found in its jaxpr."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from jax_sage import places
from jax_sage.report import html_table, text_table

# Operations whose results hold, element by element, what their operands hold.
_PASSING = frozenset(
    "add sub mul div neg sign max min exp exp2 expm1 log tanh logistic pow integer_pow square sqrt "
    "rsqrt abs select_n clamp convert_element_type reduce_precision broadcast_in_dim reshape "
    "transpose squeeze expand_dims slice dynamic_slice dynamic_update_slice concatenate pad rev "
    "copy copy_p stop_gradient optimization_barrier add_any".split()
)
_EXPONENTIALS = frozenset(["exp", "exp2"])
_REDUCTIONS = frozenset(["reduce_max", "reduce_sum", "argmax", "cummax", "cumsum", "reduce_min"])
# Libraries' functions that jax_sage.patch replaces.
_REACHED = "dot_product_attention"
_WEIGHTS = "dot_product_attention_weights"
_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "keras", "jax_sage")


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """A softmax(QKᵀ)V that a function computes without jax_sage.

    Attributes:
      place: where, in the code that calls it: ``"models/dit.py:88 (attend)"``.
      query, key: shapes of the operands of QKᵀ, as they come.
      scores: shape of QKᵀ.
      dtype: of the scores.
      why: why it is not swapped, and what would reach it.
    """

    place: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    scores: tuple[int, ...]
    dtype: str
    why: str


class AttentionSites(list[AttentionSite]):
    """A list that prints as a table, and shows as HTML in a notebook."""

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (s.place, *("x".join(map(str, d)) for d in (s.query, s.key, s.scores)), s.dtype, s.why)
            for s in self
        ]

    def __str__(self) -> str:
        if not self:
            return "No attention is computed without jax_sage."
        return text_table(_COLUMNS, self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_COLUMNS, self._rows()) if self else f"<p>{self}</p>"


_COLUMNS = ("place", "query", "key", "scores", "dtype", "why, and what would reach it")


def attention_sites(function: Callable[..., Any], *args: Any, **kwargs: Any) -> AttentionSites:
    """Every softmax(QKᵀ)V that a function still computes without jax_sage.

    ::

        print(jax_sage.attention_sites(model.apply, variables, x))

    It is traced, nothing is computed. An attention is two matrix products, with an exponential of
    the first's result as an operand of the second, and a sum or maximum of it in between; through
    jit, scan, while, cond, remat and custom derivatives. Not seen is attention that a custom kernel
    computes (Pallas, cuDNN by a custom call), and that of one head of rank 2 written as
    ``q @ k.T``, which is not told from a layer and its softmax.

    Args:
      function: any that JAX can trace, or an ``nnx.Module``.
      *args, **kwargs: its arguments; arrays or :class:`jax.ShapeDtypeStruct`. What is not an array
        stays as it is.

    Returns:
      A list of :class:`AttentionSite`, in the order in which they are computed.
    """
    function = traceable(function)
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]
    arrays = [x for x, array in zip(leaves, is_array, strict=True) if array]

    def call(*traced: Any) -> Any:
        given = iter(traced)
        merged = [next(given) if array else x for x, array in zip(leaves, is_array, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, merged)
        return jax.tree.map(_only_arrays, function(*args, **kwargs))

    search = _Search()
    search.walk(_open(jax.make_jaxpr(call)(*arrays)), [_NONE] * len(arrays))
    return AttentionSites(search.found())


def traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """An nnx module is called as a copy made while tracing: nnx lets no other change its state."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(function, nnx.Module):
        return function
    return lambda *args, **kwargs: nnx.clone(function)(*args, **kwargs)


def _only_arrays(x: Any) -> Any:
    return x if hasattr(x, "dtype") else 0


@dataclasses.dataclass(frozen=True)
class _Mark:
    """A value that comes from the result of a matrix product, and whether an exponential did."""

    product: int  # id of the equation
    exponential: bool = False


_Marks = frozenset[_Mark]
_NONE: _Marks = frozenset()


class _Search:
    def __init__(self) -> None:
        self.products: dict[int, core.JaxprEqn] = {}
        self.reduced: set[int] = set()  # products of which a sum or maximum was taken
        self.attended: dict[int, core.JaxprEqn] = {}  # product QKᵀ -> the one with V

    def found(self) -> Iterator[AttentionSite]:
        for product, after in self.attended.items():
            equation = self.products[product]
            if product in self.reduced and _is_of_two_sequences(equation):
                yield _describe(equation, after)

    def walk(self, jaxpr: core.Jaxpr, inputs: Sequence[_Marks]) -> list[_Marks]:
        """Marks of the outputs, from those of the inputs."""
        marks: dict[Any, _Marks] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Marks:
            return _NONE if isinstance(atom, core.Literal) else marks.get(atom, _NONE)

        for equation in jaxpr.eqns:
            given = [read(x) for x in equation.invars]
            for var, mark in zip(equation.outvars, self.step(equation, given), strict=True):
                marks[var] = mark
        return [read(x) for x in jaxpr.outvars]

    def step(self, equation: core.JaxprEqn, given: list[_Marks]) -> list[_Marks]:
        name = equation.primitive.name
        every = _NONE.union(*given)
        if name == "dot_general":
            self.products[id(equation)] = equation
            for mark in every:
                if mark.exponential:
                    self.attended.setdefault(mark.product, equation)
            return [frozenset([_Mark(id(equation))])]
        if name in _REDUCTIONS:
            self.reduced |= {mark.product for mark in every}
            return [_NONE] * len(equation.outvars)
        if name in _EXPONENTIALS:
            return [frozenset(_Mark(mark.product, True) for mark in every)]
        if name == "scan":
            return self.scan(equation, given)
        if name == "while":
            return self.loop(equation, given)
        if name == "cond":
            results = [self.walk(_open(b), given[1:]) for b in equation.params["branches"]]
            return [_NONE.union(*marks) for marks in zip(*results, strict=True)]
        inner = [x for v in equation.params.values() for x in _jaxprs(v)]
        if len(inner) >= 1:  # jit, remat, custom derivatives: the first is the function
            fits = len(inner[0].invars) == len(given)
            result = self.walk(inner[0], given if fits else [_NONE] * len(inner[0].invars))
            same = len(result) == len(equation.outvars)
            return result if same else [_NONE] * len(equation.outvars)
        passing = name in _PASSING
        return [every if passing else _NONE] * len(equation.outvars)

    def scan(self, equation: core.JaxprEqn, given: list[_Marks]) -> list[_Marks]:
        """How parameters tell which operands are carried differs between versions of JAX: a result
        is taken to come back as every operand of its shape and type."""
        body = _open(equation.params["jaxpr"])
        while True:
            result = self.walk(body, given)
            carried: dict[str, _Marks] = {}
            for var, mark in zip(body.outvars, result, strict=True):
                carried[str(var.aval)] = carried.get(str(var.aval), _NONE) | mark
            after = [
                mark | carried.get(str(var.aval), _NONE)
                for var, mark in zip(body.invars, given, strict=True)
            ]
            if after == given:
                same = len(result) == len(equation.outvars)
                every = _NONE.union(*result)
                return result if same else [every] * len(equation.outvars)
            given = after

    def loop(self, equation: core.JaxprEqn, given: list[_Marks]) -> list[_Marks]:
        skip, consts = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        body = _open(equation.params["body_jaxpr"])
        fixed, carry = given[skip : skip + consts], given[skip + consts :]
        while True:
            result = self.walk(body, [*fixed, *carry])
            after = [a | b for a, b in zip(carry, result, strict=True)]
            if after == carry:
                return result
            carry = after


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
        yield _open(value)


def _is_of_two_sequences(product: core.JaxprEqn) -> bool:
    """Not x·W: that has no batch dimensions, and contracts the first dimension of W."""
    (lhs_contract, rhs_contract), (lhs_batch, _) = product.params["dimension_numbers"]
    if lhs_batch:
        return True
    ranks = [len(_shape(x)) for x in product.invars]
    return list(lhs_contract) == [ranks[0] - 1] and list(rhs_contract) == [ranks[1] - 1]


def _describe(product: core.JaxprEqn, after: core.JaxprEqn) -> AttentionSite:
    query, key = (_shape(x) for x in product.invars)
    frames = _frames(product)
    functions = {name for _, name, _, in_library in frames if in_library}
    place = next(
        (
            places.describe(file, line, name)
            for file, name, line, in_library in frames
            if not in_library
        ),
        "an unknown place",
    )
    # The product with V is inside of the function too, or it is not the whole attention.
    whole = {name for _, name, _, in_library in _frames(after) if in_library}
    if _REACHED in functions & whole:
        why = "calls a library's dot_product_attention: jax_sage.patch() or swap() reaches it"
    elif _WEIGHTS in functions:
        why = "weights of flax, einsum of its own: call jax_sage.flax.dot_product_attention there"
    else:
        why = "einsums of its own: call jax_sage.attention there"
    scores: Any = product.outvars[0].aval
    return AttentionSite(place, query, key, tuple(scores.shape), scores.dtype.name, why)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _frames(equation: core.JaxprEqn) -> list[tuple[str, str, int, bool]]:
    """(file, function, line, whether it is of a library), innermost first."""
    traceback: Any = equation.source_info.traceback
    roots = [
        os.path.dirname(str(sys.modules[name].__file__)) + os.sep
        for name in _LIBRARIES
        if getattr(sys.modules.get(name), "__file__", None)
    ]
    result = []
    for frame in traceback.frames if traceback else []:
        file = str(frame.file_name)
        in_library = any(file.startswith(root) for root in roots)
        in_library = in_library or os.sep + "contextlib.py" in file
        in_library = in_library or file.startswith("<") and not places.is_typed(file)
        name = frame.function_name.rpartition(".")[2]
        result.append((file, name, int(frame.line_num), in_library))
    return result
