"""What quantization does to given tensors: errors by recipe, head and step."""

import dataclasses
import functools
import importlib
import statistics
import time
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sage import kernels, lowering_cuda, portable, primitive
from jax_sage.arguments import prepare
from jax_sage.masking import Band, Masks
from jax_sage.quantization import Switches
from jax_sage.recipe import RECIPES, Recipe, resolve
from jax_sage.report import Tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps of the computation that can be left exact, and what they are called in tables.
STEPS = {"qk": "QKᵀ", "p": "P", "v": "V", "sums": "sums"}
# Queries that are next to each other in the sample: what is compiled computes so many at a time.
_RUN = 32
# A channel of K or V whose mean is this many standard deviations from zero is an outlier: smoothing
# takes it away, and without it its size would set the scale of all others.
_OUTLIER = 3.0


def load_plots() -> types.ModuleType:
    try:
        return importlib.import_module("jax_sage.plots")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"plot(): {error}. It needs matplotlib: pip install matplotlib", name=error.name
        ) from None


@dataclasses.dataclass(frozen=True)
class RecipeErrors:
    """Errors of one recipe against FP32, over the queries that were compared.

    Attributes:
      relative_l1: Σ|o - o'| / Σ|o'|, o' exact.
      cosine: of o and o', as one vector each.
      rmse: root of the mean of (o - o')².
      by_head: relative L1 of each head, float64 [*B, N].
      worst_rows: (batch index..., query, head, relative L1) of the five worst queries.
      without: relative L1 if one step is left exact, for each of ``"qk"``, ``"p"``, ``"v"``,
        ``"sums"``: the lower, the more of the error that step makes.
      alone: relative L1 if only that step is quantized.
      rough_k, rough_v: relative L1 without smoothing of K, of V.
      seconds: of a call, the median of some; None without a kernel for it.
    """

    relative_l1: float
    cosine: float
    rmse: float
    by_head: np.ndarray
    worst_rows: tuple[tuple[tuple[int, ...], float], ...]
    without: dict[str, float]
    alone: dict[str, float]
    rough_k: float
    rough_v: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class OutlierChannel:
    """A channel whose mean stands out: ``|mean| > 3 std``, over the tokens of one head.

    Attributes:
      tensor: ``"key"`` or ``"value"``.
      place: batch index..., head, channel.
      mean, std: of its values.
    """

    tensor: str
    place: tuple[int, ...]
    mean: float
    std: float


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Tables):
    """Result of :func:`compare`. Prints as text, shows as tables in a notebook.

    Attributes:
      call: shapes of query, key and value, dtype, and what is seen, in words.
      rows: how many queries of each head were compared.
      recipes: errors of each.
      exact_seconds: of a call of ``jax.nn.dot_product_attention``; None without a GPU.
      outliers: channels of K and V whose mean stands out, the largest first.
      key_channels: largest absolute value of each channel of K, of all tokens and heads, before
        smoothing and after: float64 [2, H].
    """

    call: str
    rows: int
    recipes: dict[str, RecipeErrors]
    exact_seconds: float | None
    outliers: tuple[OutlierChannel, ...]
    key_channels: np.ndarray

    def _tables(self) -> list[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
        errors, steps = [], []
        for name, e in self.recipes.items():
            row = [name, f"{e.relative_l1:.4f}", f"{e.cosine:.6f}", f"{e.rmse:.2e}"]
            place, worst = e.worst_rows[0]
            row.append(f"{worst:.3f} at {_place(place)}")
            head = np.unravel_index(e.by_head.argmax(), e.by_head.shape)
            row.append(f"{e.by_head.max():.4f} at {_place(head)}")
            row.append(_milliseconds(e.seconds))
            errors.append(tuple(row))
            steps.append(
                (
                    name,
                    *(f"{e.without[step]:.4f}" for step in STEPS),
                    *(f"{e.alone[step]:.4f}" for step in STEPS),
                    f"{e.rough_k:.4f}",
                    f"{e.rough_v:.4f}",
                )
            )
        if self.exact_seconds is not None:
            exact = ("jax.nn, exact", "-", "-", "-", "-", "-", _milliseconds(self.exact_seconds))
            errors.append(exact)
        tables: list[tuple[str, Sequence[str], list[tuple[str, ...]]]] = [
            (
                f"Error against FP32: {self.call}; {self.rows} queries of each head",
                ("recipe", "relative L1", "cosine", "RMSE", "worst query", "worst head", "time"),
                errors,
            ),
            (
                "Relative L1 with one step exact, with one step alone quantized, and unsmoothed",
                (
                    "recipe",
                    *(f"{step} exact" for step in STEPS.values()),
                    *(f"only {step}" for step in STEPS.values()),
                    "K unsmoothed",
                    "V unsmoothed",
                ),
                steps,
            ),
        ]
        if self.outliers:
            some = f"the first 8 of {len(self.outliers)}" if len(self.outliers) > 8 else "all"
            tables.append(
                (
                    f"Channels that stand out, largest mean first, {some}",
                    ("tensor", "place", "mean", "std"),
                    [
                        (o.tensor, _place(o.place), f"{o.mean:.3g}", f"{o.std:.3g}")
                        for o in self.outliers[:8]
                    ],
                )
            )
        return tables

    def plot(self) -> "Figure":
        """Error of each head, where the error comes from, K's channels, and time if measured.

        Needs matplotlib. In a notebook the returned figure shows itself.
        """
        return load_plots().draw_comparison(self)


def compare(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    *,
    recipes: Sequence[str | Recipe] = tuple(RECIPES),
    rows: int = 256,
    **attention_args: Any,
) -> Comparison:
    """Compares recipes with exact attention on given tensors, and says where errors come from.

    ::

        jax_sage.compare(q, k, v, is_causal=True)         # in a notebook: tables
        jax_sage.compare(q, k, v, is_causal=True).plot()

    Exact attention is computed in FP32 in plain JAX. Errors are those of the kernels where they
    run; which step makes them is found in plain JAX, by leaving one after the other exact.

    Args:
      query, key, value: as for :func:`jax_sage.attention`.
      recipes: names, or :class:`jax_sage.Recipe` objects.
      rows: at most so many queries of each head are compared, in runs of 32 spread over all.
      **attention_args: further arguments of :func:`jax_sage.attention`: masks, scale, ...

    Raises:
      TypeError, ValueError: as :func:`jax_sage.attention`; rows is not positive.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1.")
    named = {_name(recipe): resolve(recipe) for recipe in recipes}
    operands, params = prepare(query, key, value, **attention_args)
    q, k, v, *masks = operands
    if 0 in (q.size, k.size, v.size):
        raise ValueError("There is nothing to compare: query, key or value is empty.")
    # In FP32, also where the inputs are half precision: an output's own rounding is not an error.
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    arrays = Masks(**dict(zip(params["given"], masks, strict=True)))
    sample = _Sample.of(q.shape[-3], rows)
    results = {}
    for name, recipe in named.items():
        compiled = _compiled(
            scale_log2=params["scale_log2"],
            band=params["band"],
            recipe=dataclasses.replace(recipe, smooth_k=True, smooth_v=True),
            rows=sample.starts,
            block_q=sample.block,
        )

        def run(
            *on: str,
            compiled: Callable[..., Any] = compiled,
            smoothing: dict[str, bool] = {  # noqa: B006 (not changed)
                "rough_k": not recipe.smooth_k,
                "rough_v": not recipe.smooth_v,
            },
        ) -> np.ndarray:
            switches = {name: smoothing.get(name, False) or name in on for name in Switches._fields}
            traced = Switches(**{name: jnp.asarray(x) for name, x in switches.items()})
            out, _ = compiled(q, k, v, arrays, switches=traced)
            return sample.cut(np.asarray(out, np.float64))

        steps = [f"exact_{step}" for step in STEPS]
        exact = run(*steps)
        out, seconds = _on_kernels(operands, {**params, "recipe": recipe})
        actual = run() if out is None else sample.cut_from(np.asarray(out, np.float64))
        results[name] = RecipeErrors(
            relative_l1=relative_l1(actual, exact),
            cosine=cosine(actual, exact),
            rmse=rmse(actual, exact),
            by_head=_ratio(actual - exact, exact, (-3, -1)),
            worst_rows=_worst_rows(actual, exact, sample),
            without={s: relative_l1(run(f"exact_{s}"), exact) for s in STEPS},
            alone={
                s: relative_l1(run(*(x for x in steps if x != f"exact_{s}")), exact) for s in STEPS
            },
            rough_k=relative_l1(run("rough_k"), exact),
            rough_v=relative_l1(run("rough_v"), exact),
            seconds=seconds,
        )
    return Comparison(
        call=_describe(operands, params),
        rows=sample.places.size,
        recipes=results,
        exact_seconds=_exact_seconds(operands, attention_args),
        outliers=_outliers(k, v),
        key_channels=_key_channels(k),
    )


@functools.lru_cache(maxsize=64)
def _compiled(**params: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled once for each shape, whatever the switches, which are traced."""
    return jax.jit(functools.partial(portable.attention, **params))


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Runs of queries, spread over all."""

    block: int
    starts: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, length: int, rows: int) -> "_Sample":
        block = min(_RUN, length)
        blocks = -(-length // block)
        chosen = np.unique(np.linspace(0, blocks - 1, min(-(-rows // block), blocks)).round())
        return cls(block, tuple(int(i) * block for i in chosen), length)

    @property
    def places(self) -> np.ndarray:
        places = (np.array(self.starts)[:, None] + np.arange(self.block)).ravel()
        return places[places < self.length]

    def cut(self, out: np.ndarray) -> np.ndarray:
        """Without the queries beyond the last one, which fill its run."""
        return out[..., : self.places.size, :, :]

    def cut_from(self, out: np.ndarray) -> np.ndarray:
        return out[..., self.places, :, :]


def relative_l1(actual: np.ndarray, exact: np.ndarray) -> float:
    """Σ|o - o'| / Σ|o'|; 0 where both are zero."""
    return float(_ratio(actual - exact, exact, None))


def _ratio(difference: np.ndarray, exact: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    total = np.abs(exact).sum(axes)
    return np.asarray(np.abs(difference).sum(axes) / np.where(total == 0, 1, total))


def cosine(actual: np.ndarray, exact: np.ndarray) -> float:
    """Of two arrays as one vector each; 1 where both are zero."""
    norms = float(np.sqrt((actual**2).sum() * (exact**2).sum()))
    return float((actual * exact).sum()) / norms if norms else 1.0


def rmse(actual: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((actual - exact) ** 2)))


def _worst_rows(
    actual: np.ndarray, exact: np.ndarray, sample: _Sample
) -> tuple[tuple[tuple[int, ...], float], ...]:
    errors = _ratio(actual - exact, exact, (-1,))  # [*B, rows, N]
    order = np.argsort(errors, axis=None)[::-1][:5]
    result = []
    for flat in order:
        *batch, row, head = np.unravel_index(flat, errors.shape)
        place = (*batch, sample.places[row], head)
        result.append((tuple(int(i) for i in place), float(errors.flat[flat])))
    return tuple(result)


def _outliers(k: jax.Array, v: jax.Array) -> tuple[OutlierChannel, ...]:
    found = []
    for tensor, x in (("key", k), ("value", v)):
        mean, std = (np.asarray(f(x, axis=-3), np.float64) for f in (jnp.mean, jnp.std))
        for place in np.argwhere((np.abs(mean) > _OUTLIER * std) & (mean != 0)):
            at = tuple(int(i) for i in place)
            found.append(OutlierChannel(tensor, at, float(mean[at]), float(std[at])))
    return tuple(sorted(found, key=lambda o: -abs(o.mean)))


def _key_channels(k: jax.Array) -> np.ndarray:
    """[2, H]: the largest of each channel, as K is and with each head's mean taken off."""
    tokens_and_heads = tuple(range(k.ndim - 1))
    smooth = k - jnp.mean(k, axis=-3, keepdims=True)
    largest = [jnp.max(jnp.abs(x), axis=tokens_and_heads) for x in (k, smooth)]
    return np.asarray(jnp.stack(largest), np.float64)


def _on_kernels(
    operands: tuple[jax.Array, ...], params: dict[str, Any]
) -> tuple[jax.Array | None, float | None]:
    """Output and seconds of a call on this device's kernels; None where it has none."""
    if jax.default_backend() != "gpu" or not kernels.capabilities():
        return None, None
    q, _, v, *_ = operands
    if lowering_cuda.why_portable(q, v, params["recipe"]):
        return None, None
    run = jax.jit(functools.partial(primitive.attention_p.bind, **params))
    return run(*operands)[0], _seconds(run, *operands)


def _exact_seconds(operands: tuple[jax.Array, ...], options: dict[str, Any]) -> float | None:
    """Of jax.nn.dot_product_attention, by cuDNN where that takes the call, on a GPU."""
    if jax.default_backend() != "gpu":
        return None
    for implementation in ("cudnn", "xla"):
        run = jax.jit(
            functools.partial(
                jax.nn.dot_product_attention, implementation=implementation, **options
            )
        )
        try:
            return _seconds(run, *operands[:3])
        except Exception:  # what each of them refuses, and how, is not documented
            continue
    return None


def _seconds(run: Callable[..., Any], *args: jax.Array, calls: int = 10) -> float:
    """Of one call of several that wait in the GPU's queue: the median of three times."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _describe(operands: tuple[jax.Array, ...], params: dict[str, Any]) -> str:
    arrays = zip(("query", "key", "value"), operands, strict=False)
    parts = [f"{name} {'x'.join(map(str, x.shape))}" for name, x in arrays]
    parts.append(operands[0].dtype.name)
    if params["band"] != Band():
        is_causal = params["band"] == lowering_cuda.CAUSAL
        parts.append("causal" if is_causal else "in a band")
    return ", ".join([*parts, *params["given"]])


def _name(recipe: str | Recipe) -> str:
    known = resolve(recipe)
    return next((name for name, r in RECIPES.items() if r == known), str(known))


def _place(place: Sequence[Any]) -> str:
    return ",".join(str(int(i)) for i in place)


def _milliseconds(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds * 1e3:.3g} ms"
