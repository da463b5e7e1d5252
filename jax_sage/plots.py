"""Pictures of comparisons. Needs matplotlib."""

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_sage.compare import STEPS, Comparison

if TYPE_CHECKING:
    from jax_sage.models import ModelComparison

_COLORS = ("tab:orange", "tab:blue", "tab:green", "tab:purple", "tab:brown")
_GREY = "0.6"


class _NotebookFigure(Figure):
    """Shows itself in a notebook; others do so only once pyplot has loaded its backend."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = _NotebookFigure(
        figsize=(6.2 * min(panels, 2), 3.9 * -(-panels // 2)), layout="constrained"
    )
    axes = figure.subplots(-(-panels // 2), min(panels, 2), squeeze=False).ravel()
    for panel in axes:
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
    return figure, list(axes)


def _bars(axes: Axes, groups: list[str], series: dict[str, list[float]], colors: list[str]) -> None:
    """A bar for each group and each of the series."""
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        axes.bar(places, values, width, label=label, color=colors[i])
    axes.set_xticks(range(len(groups)), groups)


def draw_comparison(comparison: Comparison) -> Figure:
    figure, (heads, steps, channels, last) = _figure(4)
    recipes = comparison.recipes
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(recipes))]
    figure.suptitle(f"Quantized attention against FP32\n{comparison.call}", fontsize=11)

    count = max(e.by_head.size for e in recipes.values())
    by_head = {
        f"{n}, all: {e.relative_l1:.4f}": list(e.by_head.ravel()) for n, e in recipes.items()
    }
    if count <= 16:
        _bars(heads, [str(i) for i in range(count)], by_head, colors)
    else:
        for (label, values), color in zip(by_head.items(), colors, strict=True):
            heads.plot(values, ".", label=label, color=color)
    by_entry = next(iter(recipes.values())).by_head
    batched = by_entry.size > by_entry.shape[-1]
    for panel in (heads, steps, last):
        panel.margins(y=0.3)  # room for the legend
    heads.set(
        title="Error of each head",
        xlabel="batch entry × head" if batched else "head",
        ylabel="relative L1",
    )
    heads.legend(fontsize=9)

    alone = {name: [e.alone[step] for step in STEPS] for name, e in recipes.items()}
    _bars(steps, [f"only {step}" for step in STEPS.values()], alone, colors)
    steps.set(title="Where the error comes from", ylabel="relative L1")
    steps.set_xlabel("one step quantized, the others exact")
    steps.legend(list(recipes), fontsize=9)

    before, after = comparison.key_channels
    # Each sorted by itself: two distributions, not channel against channel.
    channels.plot(np.sort(before)[::-1], label="K", color=_GREY)
    channels.plot(np.sort(after)[::-1], label="K less each head's mean", color=_COLORS[2])
    channels.set(
        title="Largest value in each channel of K, largest first",
        xlabel="channels, each curve sorted",
        ylabel="max |K|",
        ylim=(0, None),
    )
    channels.legend(fontsize=9)

    if comparison.exact_seconds is not None:
        times = {"jax.nn, exact": comparison.exact_seconds}
        times |= {n: e.seconds for n, e in recipes.items() if e.seconds is not None}
        bars = last.bar(list(times), [t * 1e3 for t in times.values()], color=[_GREY, *colors])
        last.bar_label(bars, fmt="%.3g", padding=3)
        last.set(title="Time of a call", ylabel="milliseconds")
    else:
        smoothing = {
            "smoothed": [e.relative_l1 for e in recipes.values()],
            "K unsmoothed": [e.rough_k for e in recipes.values()],
            "V unsmoothed": [e.rough_v for e in recipes.values()],
        }
        _bars(last, list(recipes), smoothing, [_COLORS[2], _GREY, "0.8"])
        last.set(title="What smoothing is worth", ylabel="relative L1")
        last.legend(fontsize=9)
    return figure


def draw_model(comparison: "ModelComparison") -> Figure:
    figure, (axes,) = _figure(1)
    for i, recipe in enumerate(comparison.recipes):
        color = _COLORS[i % len(_COLORS)]
        errors = [layer.relative_l1[recipe] for layer in comparison.layers]
        axes.plot(range(len(errors)), errors, "o-", label=f"{recipe}: each attention", color=color)
        whole = comparison.output[recipe].relative_l1
        axes.axhline(whole, label=f"{recipe}: the model's output", color=color, linestyle=":")
    paths = [layer.path for layer in comparison.layers]
    if len(paths) <= 24:
        axes.set_xticks(range(len(paths)), paths, rotation=35, ha="right", fontsize=8)
    axes.set(
        title="Error of each attention, and of the whole model",
        xlabel="attention, in the order of the model",
        ylabel="relative L1",
        ylim=(0, None),
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure
