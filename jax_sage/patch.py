"""A context in which attention functions are swapped, wherever they are called."""

import contextlib
import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from jax_sage import calls, places
from jax_sage.adapters import SwappedAttention, library_of
from jax_sage.policy import Policy
from jax_sage.report import Report

# A part of jit's cache key: what was compiled outside is compiled anew inside, and the other way.
_active = jax.make_user_context(None)
# The same for what `linen_modules` does.
_active_in_linen = jax.make_user_context(None)

# Policies with which something was swapped: a compiled function may have it without being traced.
_traced: set[Policy] = set()


@contextlib.contextmanager
def patch(policy: Policy | None = None, *, strict: bool = False) -> Iterator[Report]:
    """Swaps attention functions and Flax's attention modules in whatever is called inside.

    ::

        with jax_sage.patch() as report:
            images = sample(model, noise)  # jit-compiled or not
        print(report)

    Reached are ``jax.nn.dot_product_attention``, ``flax.linen.dot_product_attention``,
    ``flax.nnx.dot_product_attention`` and equinox's, where they are looked up as attributes
    (``jax.nn.dot_product_attention(...)``, not a name that was imported from there), and Flax's
    attention modules that call them. Other threads are not affected. ``jax.jit`` and ``nnx.jit``
    compile a function anew inside and keep both versions: nothing is ignored and nothing lasts.

    Args:
      policy: which attentions are swapped, and how; by default all where it pays.
      strict: raise where nothing is swapped.

    Yields:
      A report of the attentions that were traced. A function that an earlier block with an equal
      policy has compiled is not traced again, and is not in the report.

    Raises:
      UnsupportedAttentionError: see :class:`jax_sage.Policy`.
      ValueError: ``strict``, and nothing was swapped.

    Warns:
      SwapWarning: nothing was swapped.
    """
    policy = check_policy(policy)
    report = Report()
    with patched(policy), calls.recording(report):
        yield report
    if report.swapped:
        _traced.add(policy)
    elif report.sites or policy not in _traced:
        complain(report, "jax_sage.patch", strict, stacklevel=4)  # past contextlib


@contextlib.contextmanager
def patched(policy: Policy) -> Iterator[None]:
    with _installed(), _active(policy), linen_modules(policy):
        yield


def check_policy(policy: Policy | None) -> Policy:
    if policy is None:
        return Policy()
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy is {policy!r}; it must be a jax_sage.Policy, for example "
            "jax_sage.Policy([jax_sage.Rule(recipe='8+16')])."
        )
    return policy


def complain(report: Report, who: str, strict: bool, stacklevel: int) -> None:
    """That nothing was swapped."""
    what = f"\n{report}" if report.sites else " No attention that it reaches was found."
    message = (
        f"{who} swapped nothing.{what}\njax_sage.attention_sites(function, *args) lists what "
        "computes attention in a function, and what would reach it. strict=True makes this an "
        "error."
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, calls.SwapWarning, stacklevel=stacklevel)


# Functions are replaced in their modules as long as any thread is in a block. A replacement looks
# at the policy of its own thread.

_lock = threading.Lock()
_depth = 0
_replaced: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    global _depth
    with _lock:
        if _depth == 0:
            for place, name, replacement in list(_replacements()):
                _replaced.append((place, name, getattr(place, name)))
                setattr(place, name, replacement)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            while _depth == 0 and _replaced:
                setattr(*_replaced.pop())


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """(module or class, attribute, what takes its place), of the libraries that are imported."""
    name = "dot_product_attention"
    yield jax.nn, name, _swappable(jax.nn.dot_product_attention, "jax.nn")
    for library in ("flax.linen", "flax.nnx"):
        module = sys.modules.get(library)
        if module is not None:
            replacement = _swappable(module.dot_product_attention, library)
            yield module, name, replacement
            yield sys.modules[module.dot_product_attention.__module__], name, replacement
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None:
        yield nnx.MultiHeadAttention, "__call__", _swappable_module(nnx.MultiHeadAttention.__call__)
    home = sys.modules.get("equinox.nn._attention")
    if home is not None and hasattr(home, name):
        yield home, name, _swappable(home.dot_product_attention, "equinox.nn")


def _active_policy() -> Policy | None:
    """None outside of a block, and in an exact attention: what that calls is a part of it."""
    return None if calls.is_inside() else _active.value


def _swappable(function: Callable[..., Any], library: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        policy = _active_policy()
        if policy is None:
            return function(*args, **kwargs)
        kind = f"{library}.dot_product_attention"
        return SwappedAttention(caller(), kind, policy, function, library)(*args, **kwargs)

    return dot_product_attention


def _swappable_module(method: Callable[..., Any]) -> Callable[..., Any]:
    """nnx.MultiHeadAttention holds its function in an attribute."""

    @functools.wraps(method)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        policy = _active_policy()
        function = self.attention_fn
        if policy is None or isinstance(function, SwappedAttention):
            return method(self, *args, **kwargs)
        swapped = SwappedAttention(
            caller(), "nnx.MultiHeadAttention", policy, function, library_of(function)
        )
        with _attribute(self, "attention_fn", swapped):
            return method(self, *args, **kwargs)

    return __call__


@contextlib.contextmanager
def _attribute(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute past the checks of Flax, which do not let a traced function set one."""
    before = getattr(instance, name)
    object.__setattr__(instance, name, value)
    try:
        yield
    finally:
        object.__setattr__(instance, name, before)


@contextlib.contextmanager
def linen_modules(policy: Policy) -> Iterator[None]:
    """Swaps the function of linen's attention modules while they are called."""
    linen = sys.modules.get("flax.linen")
    if linen is None:
        yield
        return

    def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_attention = isinstance(module, linen.MultiHeadDotProductAttention)
        if not is_attention or context.method_name != "__call__" or calls.is_inside():
            return method(*args, **kwargs)
        function = module.attention_fn
        if isinstance(function, SwappedAttention):
            return method(*args, **kwargs)
        kind = f"linen.{type(module).__name__}"
        path = "/".join(module.path) or type(module).__name__
        swapped = SwappedAttention(path, kind, policy, function, library_of(function))
        with _attribute(module, "attention_fn", swapped):
            return method(*args, **kwargs)

    with _active_in_linen(policy), linen.intercept_methods(intercept):
        yield


_LIBRARIES = ("jax_sage", "jax", "flax", "equinox", "keras")


def caller() -> str:
    """The place outside of libraries that calls."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        library = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if library not in (*_LIBRARIES, "contextlib", "functools"):
            break
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    name = frame.f_code.co_qualname.rpartition("<locals>.")[2]
    return places.describe(frame.f_code.co_filename, frame.f_lineno, name)
