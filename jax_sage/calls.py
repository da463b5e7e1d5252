"""One attention call of a model: swapped or kept, as a policy says, and reported."""

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sage import kernels, lowering_cuda, primitive
from jax_sage.arguments import prepare
from jax_sage.masking import Masks
from jax_sage.policy import Policy, Rule
from jax_sage.recipe import RECIPES, resolve
from jax_sage.report import Report, Site


class UnsupportedAttentionError(NotImplementedError):
    """A policy with ``on_unsupported="error"`` wanted a swap that cannot be done."""


class SwapWarning(UserWarning):
    """An attention was not swapped though a rule wanted it, or nothing was swapped at all."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of an attention call, in the terms of :func:`jax_sage.attention`."""

    query: jax.Array  # [*B, T, N, H]
    key: jax.Array  # [*B, S, K, H]
    value: jax.Array  # [*B, S, K, Hv]
    options: dict[str, Any]  # further arguments of jax_sage.attention
    problem: str | None = None  # why it cannot be swapped, if the arguments say so
    # To the caller's layout of an output, and from it.
    restore: Callable[[jax.Array], jax.Array] = lambda out: out
    arrange: Callable[[jax.Array], jax.Array] = lambda out: out

    def known_options(self) -> dict[str, Any]:
        """With masks that are numbers as bool."""
        mask = self.options.get("mask")
        if mask is None:
            return self.options
        mask = jnp.asarray(mask)
        return {**self.options, "mask": mask if mask.dtype == bool else mask != 0}


Tap = Callable[[Call, str, str, Callable[[], jax.Array]], jax.Array]


class _State(threading.local):
    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.inside = False
        self.taps: dict[Policy, Tap] = {}


_state = _State()


@contextlib.contextmanager
def recording(report: Report) -> Iterator[Report]:
    """Calls of this thread are added to the report."""
    _state.reports.append(report)
    try:
        yield report
    finally:
        _state.reports.remove(report)


@contextlib.contextmanager
def tapping(policy: Policy, tap: Tap) -> Iterator[None]:
    """Calls of this thread with this policy go to the tap."""
    _state.taps[policy] = tap
    try:
        yield
    finally:
        del _state.taps[policy]


def is_inside() -> bool:
    """Whether an exact attention is being computed: what it calls is a part of it."""
    return _state.inside


def run(
    call: Call, policy: Policy, *, path: str, kind: str, exact: Callable[[], jax.Array]
) -> jax.Array:
    """The output of jax_sage.attention, or of what the model had."""

    def kept() -> jax.Array:
        before, _state.inside = _state.inside, True
        try:
            return exact()
        finally:
            _state.inside = before

    def keep(reason: str) -> jax.Array:
        _record(call, call.options, path=path, kind=kind, reason=reason)
        return kept()

    if policy in _state.taps:
        return _state.taps[policy](call, path, kind, kept)
    enough = call.query.ndim >= 3 and call.key.ndim >= 3
    length = min(call.query.shape[-3], call.key.shape[-3]) if enough else 0
    rule, why = policy.find(path, length)
    if rule is None or rule.off:
        return keep(why or "off by a rule")
    try:
        operands, params, options = _prepare(call, rule)
    except (TypeError, ValueError, NotImplementedError) as error:
        if policy.on_unsupported == "error":
            raise UnsupportedAttentionError(
                f"{kind} at {path} cannot be swapped: {error}"
            ) from error
        if not _state.reports:
            warnings.warn(f"{kind} at {path} is not swapped: {error}", SwapWarning, stacklevel=2)
        return keep(str(error))
    _record(call, options, path=path, kind=kind, recipe=_name(rule))
    out, _ = primitive.attention_p.bind(*operands, **params)
    return call.restore(out)


def run_always(call: Call) -> jax.Array:
    """The output of jax_sage.attention, or UnsupportedAttentionError."""
    try:
        operands, params, _ = _prepare(call, Rule())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UnsupportedAttentionError(str(error)) from error
    out, _ = primitive.attention_p.bind(*operands, **params)
    return call.restore(out)


def _prepare(
    call: Call, rule: Rule
) -> tuple[tuple[jax.Array, ...], dict[str, Any], dict[str, Any]]:
    """Operands and parameters of the primitive, and the options; raises if it cannot be done."""
    if call.problem is not None:
        raise NotImplementedError(call.problem)
    options = _options(call, rule)
    operands, params = prepare(call.query, call.key, call.value, **options, recipe=rule.recipe)
    if kernels.capabilities() and jax.default_backend() == "gpu":
        reason = lowering_cuda.why_portable(call.query, call.value, params["recipe"])
        if reason is not None:
            raise NotImplementedError(f"{reason}, and plain JAX would be slower than the model's")
    return operands, params, options


def _options(call: Call, rule: Rule) -> dict[str, Any]:
    """Those of the call, with the causal mask as a flag if a rule says so."""
    options = call.known_options()
    mask = options.get("mask")
    if mask is None or not rule.causal:
        return options
    length_q, length_kv = call.query.shape[-3], call.key.shape[-3]
    if length_q != length_kv:
        raise ValueError(
            f"a rule says causal, but there are {length_q} queries and {length_kv} keys"
        )
    if not isinstance(mask, jax.core.Tracer):
        causal = np.tril(np.ones((length_q, length_kv), bool))
        if mask.shape[-2:] != causal.shape or not bool((np.asarray(mask) == causal).all()):
            raise ValueError("a rule says causal, but the mask is another")
    return {**options, "mask": None, "is_causal": True}


def _record(
    call: Call,
    options: dict[str, Any],
    *,
    path: str,
    kind: str,
    recipe: str | None = None,
    reason: str | None = None,
) -> None:
    if not _state.reports:
        return
    site = Site(
        path=path,
        kind=kind,
        query=tuple(call.query.shape),
        key=tuple(call.key.shape),
        value=tuple(call.value.shape),
        dtype=call.query.dtype.name,
        mask=_describe_masks(call, options),
        recipe=recipe,
        reason=reason,
    )
    for report in _state.reports:
        report.add(site)


def _name(rule: Rule) -> str:
    recipe = resolve(rule.recipe)
    return next((name for name, known in RECIPES.items() if known == recipe), str(recipe))


def _describe_masks(call: Call, options: dict[str, Any]) -> str:
    letters: list[tuple[str, int]] = []
    if call.query.ndim >= 3 and call.key.ndim >= 3:
        letters = [("N", call.query.shape[-2]), ("T", call.query.shape[-3])]
        letters.append(("S", call.key.shape[-3]))
    parts = []
    if options.get("is_causal"):
        parts.append("causal")
    if options.get("local_window_size") is not None:
        parts.append(f"window {options['local_window_size']}")
    for name in Masks._fields:
        array = options.get(name)
        if array is None:
            continue
        if name not in ("mask", "bias"):
            parts.append(name)
            continue
        dims = [str(d) for d in np.shape(array)]
        if len(dims) == call.query.ndim == 4 and dims[0] == str(call.query.shape[0]) != "1":
            dims[0] = "B"
        for place, (letter, size) in zip((-3, -2, -1), letters, strict=False):
            if -place <= len(dims) and dims[place] == str(size) and size != 1:
                dims[place] = letter
        parts.append(f"{name} [{', '.join(dims)}]")
    return ", ".join(parts) or "none"
