"""Speed and accuracy of attention on this machine: ``python -m jax_sage.bench``.

Speed is that of the whole jitted call, quantization included, in TOPS: 4 B H N² D operations,
half of that if causal, over the time of a call. The implementations take turns in one run; a time
is the median over turns of many calls queued back to back, which hides the dispatch of all but the
first. The inputs are random and larger than the caches.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sage.attention import attention
from jax_sage.recipe import RECIPES

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    @property
    def operations(self) -> float:
        full = 4.0 * self.batch * self.heads * self.length**2 * self.head_dim
        return full / 2 if self.causal else full


def _grid(lengths: Sequence[int], head_dims: Sequence[int]) -> list[Shape]:
    """16384 tokens (one sequence beyond that), heads * head_dim = 2048."""
    return [
        Shape(max(1, 16384 // n), n, 2048 // d, 2048 // d, d, causal)
        for d in head_dims
        for causal in (False, True)
        for n in lengths
    ]


VIDEO_DIT = Shape(2, 17776, 48, 48, 64, False)
LLM_PREFILL = Shape(1, 8192, 32, 8, 128, True)
SHORT = [*_grid([1024, 4096, 8192, 32768], [128]), *_grid([1024, 4096, 8192, 32768], [64])]
FULL = [
    *_grid([1024, 2048, 4096, 8192, 16384, 32768, 65536], [128, 64]),
    VIDEO_DIT,
    LLM_PREFILL,
]
# The portable path computes the same numbers hundreds of times slower.
CPU = [Shape(1, 1024, 4, 4, 64, causal) for causal in (False, True)]


def implementations(shape: Shape) -> dict[tuple[str, str], Attention]:
    """What can be compared on this device, by (implementation, recipe)."""
    result: dict[tuple[str, str], Attention] = {
        ("jax_sage", name): functools.partial(attention, recipe=name, is_causal=shape.causal)
        for name in RECIPES
    }
    peers = ("cudnn", "xla") if jax.default_backend() == "gpu" else ("xla",)
    for peer in peers:
        # XLA's attention stores the scores: above this it does not fit, or takes minutes.
        if peer == "xla" and shape.batch * shape.heads * shape.length**2 > 2**33:
            continue
        result[(f"jax.nn {peer}", "bf16")] = functools.partial(
            jax.nn.dot_product_attention,
            is_causal=shape.causal,
            implementation=peer,
        )
    return result


def inputs(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (
        jax.random.normal(key, (shape.batch, shape.length, n, shape.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    return q, k, v


def measure(
    functions: dict[Any, Attention], arguments: Sequence[jax.Array], turns: int = 5
) -> dict[Any, float]:
    """Seconds a call of each; a function that cannot run on these arguments is left out."""
    compiled, calls = {}, {}
    for name, function in functions.items():
        run = jax.jit(function)
        try:
            jax.block_until_ready(run(*arguments))
        except Exception as error:
            print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        once = time.perf_counter() - start
        compiled[name], calls[name] = run, int(min(max(0.03 / once, 2), 100))
    times: dict[Any, list[float]] = {name: [] for name in compiled}
    for _ in range(turns):
        for name, run in compiled.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                out = run(*arguments)
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def speed(shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """One row for each shape and implementation."""
    rows = []
    for index, shape in enumerate(shapes):
        print(f"[{index + 1}/{len(shapes)}] {shape}", file=sys.stderr, flush=True)
        for (name, recipe), seconds in measure(implementations(shape), inputs(shape)).items():
            rows.append(
                {
                    "impl": name,
                    "recipe": recipe,
                    **dataclasses.asdict(shape),
                    "tops": float(f"{shape.operations / seconds / 1e12:.4g}"),
                    "includes_quantization": True,
                }
            )
    return rows


def accuracy(length: int = 4096, head_dim: int = 128) -> list[dict[str, Any]]:
    """Relative L1 error, Σ|o - o'| / Σ|o'|, of each recipe against float64 on the host.

    One sequence of eight heads, inputs rounded to bfloat16, the first 256 queries of each head.
    """
    rows = []
    for name, (q, k, v) in distributions(length, 8, head_dim).items():
        exact = exact_attention(q[:256], k, v)
        query, key, value = (jnp.asarray(x, jnp.float32)[None] for x in (q, k, v))
        for recipe in RECIPES:
            # Out in float32: the rounding of a bfloat16 output is not the recipe's.
            out = attention(query, key, value, recipe=recipe)
            difference = np.asarray(out)[0, :256] - exact
            rows.append(
                {
                    "recipe": recipe,
                    "distribution": name,
                    "length": length,
                    "head_dim": head_dim,
                    "relative_l1": round(float(np.abs(difference).sum() / np.abs(exact).sum()), 5),
                }
            )
    return rows


def distributions(
    length: int, heads: int, head_dim: int
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """q, k, v [N, heads, head_dim], rounded to bfloat16: what attention meets, and what is hard.

    "outlier" adds to 4 channels of K and 4 others of V of each head a mean of 10 to 20 of either
    sign; "heavy" is Student's t with 3 degrees of freedom.
    """
    rng = np.random.default_rng(0)
    shape = (3, length, heads, head_dim)
    normal, heavy = rng.standard_normal(shape), rng.standard_t(3, shape)
    outlier = rng.standard_normal(shape)
    for head in range(heads):
        channels = rng.permutation(head_dim)[:8].reshape(2, 4)
        for array, chosen in zip(outlier[1:], channels, strict=True):
            mean = rng.uniform(10, 20, 4) * rng.choice([-1, 1], 4)
            array[:, head, chosen] += mean
    named = {"normal": normal, "outlier": outlier, "heavy": heavy}
    return {name: tuple(x.astype(jnp.bfloat16).astype(np.float64)) for name, x in named.items()}


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of [T, N, H] and [S, N, H] in float64."""
    out = np.empty(q.shape)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head].T / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = p @ v[:, head] / p.sum(-1, keepdims=True)
    return out


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: a line a shape, a column an implementation."""
    names = list(dict.fromkeys((row["impl"], row["recipe"]) for row in rows))
    header = "TOPS (batch, length, heads/kv, head_dim)".ljust(42)
    lines = ["  ".join([header, *map(" ".join, names)])]
    shapes = list(dict.fromkeys(Shape(*(row[f.name] for f in _FIELDS)) for row in rows))
    for shape in shapes:
        label = f"{shape.batch}, {shape.length}, {shape.heads}/{shape.kv_heads}, {shape.head_dim}"
        cells = {
            (row["impl"], row["recipe"]): row["tops"]
            for row in rows
            if Shape(*(row[f.name] for f in _FIELDS)) == shape
        }
        values = ((f"{cells[n]:.3g}" if n in cells else "-").rjust(len(" ".join(n))) for n in names)
        lines.append("  ".join([(label + (" causal" if shape.causal else "")).ljust(42), *values]))
    return "\n".join(lines)


_FIELDS = dataclasses.fields(Shape)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jax_sage.bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer lengths, no model shapes")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    if jax.default_backend() == "gpu":
        shapes = SHORT if options.short else FULL
    else:
        print("No GPU: these figures are of the portable path, which is not meant to be fast.")
        shapes = CPU
    rows = speed(shapes)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
