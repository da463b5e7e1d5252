"""The benchmark's rows as a picture."""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Ours in color and thick, peers in greys; markers differ for those who do not see the colors.
_STYLES: dict[str, dict[str, Any]] = {
    "jax_sage 8+8": {"color": "tab:orange", "marker": "o", "linewidth": 2.5},
    "jax_sage 8+16": {"color": "tab:blue", "marker": "o", "linewidth": 2.5},
    "jax cudnn fp8": {"color": "0.2", "marker": "D"},
    "jax.nn cudnn bf16": {"color": "0.45", "marker": "s"},
    "tokamax mosaic_gpu bf16": {"color": "0.6", "marker": "^"},
    "jax.nn xla bf16": {"color": "0.75", "marker": "v"},
}
_Rows = list[dict[str, Any]]


def draw(rows: Sequence[dict[str, Any]], device: str, path: pathlib.Path) -> None:
    """Writes a PNG: lines over the length for each kind of head, bars for lone shapes."""
    panels: dict[tuple[Any, ...], _Rows] = {}
    for row in rows:
        kind = ("heads", "kv_heads", "head_dim", "causal")
        panels.setdefault(tuple(row[name] for name in kind), []).append(row)
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(13, 1.2 + 4.3 * height), layout="constrained")
    axes = figure.subplots(height, 2, squeeze=False).ravel()
    for spare in axes[len(panels) :]:
        spare.remove()
    top = 1.1 * max(row["tops"] for row in rows)
    for panel, members in zip(axes, panels.values(), strict=False):
        first = members[0]
        title = f"{first['heads']} heads of {first['head_dim']}"
        if first["kv_heads"] != first["heads"]:
            title += f" ({first['kv_heads']} of K and V)"
        title += ", causal" if first["causal"] else ", not causal"
        if len({row["length"] for row in members}) > 1:
            _lines(panel, members)
        else:
            _bars(panel, members)
            title += f"\nbatch {first['batch']}, {first['length']} tokens"
        panel.set(title=title, ylim=(0, top), ylabel="TOPS")
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
    handles: dict[str, Artist] = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)  # a line, with its marker, rather than a bar
    # The title is the legend's: a suptitle and a legend above the axes would overlap.
    legend = figure.legend(
        handles=list(handles.values()),
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        title=f"Attention on {device}\n"
        "TOPS of the whole jitted call, quantization included; higher is better\n",
        title_fontsize=14,
    )
    legend.get_title().set_multialignment("center")
    figure.savefig(path, dpi=120, format="png")


def _lines(axes: Axes, rows: _Rows) -> None:
    for name in dict.fromkeys(map(_name, rows)):
        points = sorted((row["length"], row["tops"]) for row in rows if _name(row) == name)
        axes.plot(*zip(*points, strict=True), label=name, **_STYLES.get(name, {}))
    batches = dict(sorted((row["length"], row["batch"]) for row in rows))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(batches), [f"{n / 1024:g}K\n×{batch}" for n, batch in batches.items()])
    axes.set_xlabel("tokens in a sequence × batch")


def _bars(axes: Axes, rows: _Rows) -> None:
    names = list(map(_name, rows))
    colors = [_STYLES.get(name, {}).get("color") for name in names]
    ticks = [name.replace(" ", "\n") for name in names]
    bars = axes.bar(ticks, [row["tops"] for row in rows], color=colors, label=names)
    axes.bar_label(bars, fmt="%.4g", padding=3)


def _name(row: dict[str, Any]) -> str:
    return f"{row['impl']} {row['recipe']}"
