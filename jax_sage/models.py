"""What swapping does to a model: layer by layer, and at its end."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sage.capture import capture, under
from jax_sage.compare import compare, cosine, load_plots, relative_l1, rmse
from jax_sage.policy import Policy, Rule
from jax_sage.report import Tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """Errors of one attention of a model, given the tensors of the exact run.

    Attributes:
      path: of the module, or the place in the code that calls it.
      shape: of query.
      relative_l1: by recipe.
      worst_head: the largest relative L1 of a head, by recipe.
    """

    path: str
    shape: tuple[int, ...]
    relative_l1: dict[str, float]
    worst_head: dict[str, float]


@dataclasses.dataclass(frozen=True)
class OutputErrors:
    """Errors of a model's output against the exact run, all its arrays as one.

    Attributes:
      relative_l1: Σ|o - o'| / Σ|o'|.
      cosine: of both as vectors.
      rmse: root of the mean of (o - o')².
    """

    relative_l1: float
    cosine: float
    rmse: float


@dataclasses.dataclass(frozen=True, repr=False)
class ModelComparison(Tables):
    """Result of :func:`compare_model`. Prints as text, shows as tables in a notebook.

    Attributes:
      recipes: that were compared.
      layers: every attention, in order.
      output: errors of the model's output, by recipe.
      metrics: of the exact run (``"exact"``) and of each recipe; empty without a metric.
    """

    recipes: tuple[str, ...]
    layers: tuple[LayerErrors, ...]
    output: dict[str, OutputErrors]
    metrics: dict[str, dict[str, float]]

    def _tables(self) -> list[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
        columns = ["attention", "query"]
        for recipe in self.recipes:
            columns += [f"{recipe}", f"{recipe}, worst head"]
        layers = [
            (
                layer.path,
                "x".join(map(str, layer.shape)),
                *(
                    f"{x[recipe]:.4f}"
                    for recipe in self.recipes
                    for x in (layer.relative_l1, layer.worst_head)
                ),
            )
            for layer in self.layers
        ]
        tables: list[tuple[str, Sequence[str], list[tuple[str, ...]]]] = [
            (
                "Relative L1 error of each attention, given the tensors of the exact run",
                columns,
                layers,
            )
        ]
        names = list(self.metrics["exact"]) if self.metrics else []
        rows = []
        if names:
            rows.append(
                ("exact", "-", "-", "-", *(f"{self.metrics['exact'][n]:.6g}" for n in names))
            )
        for recipe in self.recipes:
            e = self.output[recipe]
            own = (f"{self.metrics[recipe][n]:.6g}" for n in names)
            rows.append((recipe, f"{e.relative_l1:.4f}", f"{e.cosine:.6f}", f"{e.rmse:.2e}", *own))
        end = ("recipe", "relative L1", "cosine", "RMSE", *names)
        tables.append(("The model's output, all of its attention swapped", end, rows))
        return tables

    def plot(self) -> "Figure":
        """Error of each attention and of the output. Needs matplotlib."""
        return load_plots().draw_model(self)


def compare_model(
    model: Callable[..., Any],
    *args: Any,
    recipes: Sequence[str] = ("8+8",),
    metric: Callable[[Any], float | Mapping[str, float]] | None = None,
    rows: int = 64,
    **kwargs: Any,
) -> ModelComparison:
    """Compares a model with itself, swapped: each attention alone, and the output.

    ::

        print(jax_sage.compare_model(model, tokens, metric=lambda logits: loss(logits, targets)))

    All attention that :func:`jax_sage.swap` and :func:`jax_sage.patch` reach is swapped, of any
    length.

    Args:
      model: an ``nnx.Module`` (which is left alone) or any function, as for
        :func:`jax_sage.capture`.
      *args, **kwargs: its arguments.
      recipes: names of recipes.
      metric: what matters of the output: a function from it to a number, or to several by name.
      rows: at most so many queries of each head are compared in each attention.

    Raises:
      ValueError: there is no attention to swap.
    """
    attentions = capture(model, *args, **kwargs)
    if not attentions:
        raise ValueError("compare_model found no attention that swap or patch reaches.")
    layers = []
    for a in attentions:
        errors = compare(a.query, a.key, a.value, recipes=recipes, rows=rows, **a.options).recipes
        layers.append(
            LayerErrors(
                a.path,
                a.query.shape,
                {name: e.relative_l1 for name, e in errors.items()},
                {name: float(e.by_head.max()) for name, e in errors.items()},
            )
        )

    def run(policy: Policy) -> tuple[np.ndarray, dict[str, float]]:
        out = under(policy, model)(*args, **kwargs)
        return _flat(out), _measure(metric, out)

    exact, exact_metrics = run(Policy(rules=(Rule(off=True),)))
    output, metrics = {}, {"exact": exact_metrics}
    for recipe in recipes:
        actual, metrics[recipe] = run(Policy(rules=(Rule(min_length=0, recipe=recipe),)))
        output[recipe] = OutputErrors(
            relative_l1(actual, exact), cosine(actual, exact), rmse(actual, exact)
        )
    return ModelComparison(
        tuple(recipes), tuple(layers), output, metrics if metric is not None else {}
    )


def _flat(out: Any) -> np.ndarray:
    """All floating-point numbers of the output, in float64."""
    arrays = [x for x in jax.tree.leaves(out) if hasattr(x, "dtype")]
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        raise ValueError("The model's output holds no floating-point array to compare.")
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in floats])


def _measure(metric: Callable[[Any], Any] | None, out: Any) -> dict[str, float]:
    if metric is None:
        return {}
    value = metric(out)
    if isinstance(value, Mapping):
        return {str(name): float(x) for name, x in value.items()}
    return {"metric": float(value)}
