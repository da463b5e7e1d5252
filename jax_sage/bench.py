"""Speed and accuracy of attention on this machine: ``python -m jax_sage.bench``.

Speed is that of the whole jitted call, from bfloat16 to bfloat16, quantization included, in TOPS:
4 B H N² D operations, half of that if causal, over the time of a call. The implementations take
turns in one run, and a time is the median over the turns. The inputs are standard normal.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_sage import __version__, kernels
from jax_sage.attention import attention
from jax_sage.peers import PEERS, XLA
from jax_sage.recipe import RECIPES

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Name = tuple[str, str]  # implementation and recipe
Note = Callable[[str], None]

OURS = "jax_sage"
# Above the error of any FP8 attention on these inputs, far below that of a wrong result (1.4).
# cuDNN's is 0.06, and 0.23 at 32K tokens: its output is FP8 too, and most of it subnormal there.
WRONG = 0.5


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
        return 4.0 * self.scores * self.head_dim / (2 if self.causal else 1)

    def __str__(self) -> str:
        kv_heads = f" ({self.kv_heads} of K and V)" if self.kv_heads != self.heads else ""
        return (
            f"batch {self.batch}, {self.length} tokens, {self.heads} heads{kv_heads} of "
            f"{self.head_dim}, {'causal' if self.causal else 'not causal'}"
        )

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.length**2


class Suite(NamedTuple):
    shapes: Sequence[Shape]
    # XLA's attention stores the scores. It runs where there are no more of them than this.
    xla_scores: int


def _grid(lengths: Sequence[int]) -> Iterator[Shape]:
    """16384 tokens (one sequence beyond that), heads * head_dim = 2048."""
    for head_dim in (128, 64):
        heads = 2048 // head_dim
        for causal in (False, True):
            for length in lengths:
                yield Shape(max(1, 16384 // length), length, heads, heads, head_dim, causal)


VIDEO_DIT = Shape(2, 17776, 48, 48, 64, False)
LLM_PREFILL = Shape(1, 8192, 32, 8, 128, True)
# XLA takes longer to compile its attention than all others together: 1K tokens must do.
SHORT = Suite([*_grid([1024, 4096, 8192, 32768])], xla_scores=2**29)
# 2**33 scores are 34 GB in float32.
FULL = Suite(
    [*_grid([1024, 2048, 4096, 8192, 16384, 32768, 65536]), VIDEO_DIT, LLM_PREFILL],
    xla_scores=2**33,
)
# The portable path computes the same numbers hundreds of times slower.
CPU = Suite([Shape(1, 1024, 4, 4, 64, causal) for causal in (False, True)], xla_scores=2**33)


def implementations(shape: Shape, xla_scores: int) -> dict[Name, Attention | str]:
    """What to compare, ours first; in place of one that cannot run, the reason."""
    result: dict[Name, Attention | str] = {}
    on_gpu = jax.default_backend() == "gpu"
    for name, recipe in RECIPES.items():
        # On a GPU without a kernel for it, a recipe would run for hours at these lengths.
        reason = kernels.why_unavailable(recipe) if on_gpu else None
        ours = functools.partial(attention, recipe=name, is_causal=shape.causal)
        result[OURS, name] = reason or ours
    for peer, function in PEERS.items():
        result[peer] = functools.partial(function, is_causal=shape.causal)
    if shape.scores > xla_scores:
        result[XLA] = f"it stores the scores: not run with more than {xla_scores:.1e} of them"
    return result


def inputs(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (
        jax.random.normal(key, (shape.batch, shape.length, n, shape.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    return q, k, v


def prepare(
    functions: dict[Name, Attention | str], arguments: Sequence[jax.Array], note: Note
) -> dict[Name, Attention]:
    """Compiles each and runs it once. A peer that fails is left out, and so is a wrong result."""
    runs: dict[Name, Attention] = {}
    reference = None
    for name, function in functions.items():
        left_out = f"{' '.join(name)} is left out: "
        if isinstance(function, str):
            note(left_out + function)
            continue
        run = jax.jit(function)
        try:
            out = jax.block_until_ready(run(*arguments))
        except Exception as error:  # there is no telling what a peer that cannot run raises
            if name[0] == OURS:
                raise
            note(f"{left_out}{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        if reference is None:
            reference = out
        difference = float(relative_l1(out, reference))
        if not difference <= WRONG:
            note(f"{left_out}its result is wrong (relative L1 difference {difference:.2g})")
            continue
        runs[name] = run
    return runs


@jax.jit
def relative_l1(x: jax.Array, reference: jax.Array) -> jax.Array:
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    return jnp.abs(x - reference).sum() / jnp.abs(reference).sum()


def measure(
    runs: dict[Name, Attention], arguments: Sequence[jax.Array], note: Note, turns: int = 5
) -> dict[Name, float]:
    """Seconds a call of each, without its dispatch.

    Dispatch takes the host 30 to 100 µs, a short call takes the GPU 150. Calls are queued back to
    back, so that the GPU always has the next one: of the 40 ms of a turn only the first dispatch
    is not hidden, less than 0.5 %. Whether the GPU did fall behind the host is checked.

    A loop inside of the program would need each call to depend on the one before. That takes a
    small kernel a call, which is no smaller an error, or outputs as the next queries, and these
    are averages: all scores would be alike.
    """
    calls = {}
    for name, run in runs.items():
        once, _ = _turn(run, arguments, 1)
        calls[name] = max(2, round(0.04 / once))
    times: dict[Name, list[float]] = {name: [] for name in runs}
    waits = dict.fromkeys(runs, 0)
    # For 20 ms and more a run has the clock that power allows after the one before. So each runs
    # for 40 before it is timed, and not always after the same other: by steps of another size each
    # turn, where there are some (of 3, 4 or 6 names to and fro).
    names = list(runs)
    steps = [step for step in range(1, len(names) + 1) if math.gcd(step, len(names)) == 1]
    for turn in range(turns):
        step = steps[turn % len(steps)]
        for place in range(len(names)):
            name = names[place * step % len(names)]
            _turn(runs[name], arguments, calls[name])
            seconds, behind = _turn(runs[name], arguments, calls[name])
            times[name].append(seconds)
            waits[name] += not behind
    for name, wait in waits.items():
        if 2 * wait > turns:
            note(f"{' '.join(name)}: the device had to wait for the host, dispatch is in the time")
    return {name: statistics.median(t) for name, t in times.items()}


def _turn(run: Attention, arguments: Sequence[jax.Array], calls: int) -> tuple[float, bool]:
    """Seconds a call, and whether the device still had to finish two calls after all were queued.

    A device that waits for the host has at most the last one left by then: between one and two,
    1.5 leaves room for the jitter of both.
    """
    start = time.perf_counter()
    for _ in range(calls):
        out = run(*arguments)
    queued = time.perf_counter()
    jax.block_until_ready(out)
    end = time.perf_counter()
    seconds = (end - start) / calls
    return seconds, end - queued > 1.5 * seconds


def speed(suite: Suite) -> list[dict[str, Any]]:
    """One row for each shape and implementation. Progress and what is left out go to stderr."""
    # Cached: each distinct note is printed once.
    note = functools.cache(functools.partial(print, file=sys.stderr, flush=True))
    rows = []
    start = time.monotonic()
    total = len(suite.shapes)
    for done, shape in enumerate(suite.shapes):
        elapsed = time.monotonic() - start
        left = f", about {elapsed / done * (total - done):.0f} s left" if done else ""
        progress = f"[{done + 1}/{total}] {shape} ({elapsed:.0f} s elapsed{left})"
        print(progress, file=sys.stderr, flush=True)
        arguments = inputs(shape)
        runs = prepare(implementations(shape, suite.xla_scores), arguments, note)
        for (name, recipe), seconds in measure(runs, arguments, note).items():
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


_COLUMNS = tuple(field.name for field in dataclasses.fields(Shape))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: a line a shape, a column an implementation."""
    shapes: dict[Shape, dict[Name, float]] = {}
    for row in rows:
        tops = shapes.setdefault(Shape(*(row[name] for name in _COLUMNS)), {})
        tops[row["impl"], row["recipe"]] = row["tops"]
    names = list(dict.fromkeys(name for tops in shapes.values() for name in tops))
    lines = [[""] * len(_COLUMNS) + [impl for impl, _ in names]]
    lines.append([*_COLUMNS, *(recipe for _, recipe in names)])
    for shape, tops in shapes.items():
        *sizes, causal = dataclasses.astuple(shape)
        cells = [f"{tops[name]:.4g}" if name in tops else "-" for name in names]
        lines.append([*map(str, sizes), "yes" if causal else "no", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jax_sage.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="fewer lengths, no model shapes; changes nothing without a GPU",
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--chart", type=pathlib.Path, help="also draw them, as this PNG file")
    options = parser.parse_args(argv)
    if options.chart:
        # Now, not after the minutes that measuring takes.
        try:
            from jax_sage import chart
        except ModuleNotFoundError as error:
            parser.error(f"--chart: {error}. It needs matplotlib: pip install matplotlib")
    device = jax.local_devices()[0].device_kind
    if jax.default_backend() == "gpu":
        suite = SHORT if options.short else FULL
        title = device
    else:
        suite = CPU
        title = f"{device} (jax_sage: the portable path, which is not meant to be fast)"
        print("No GPU: these figures are of the portable path, which is not meant to be fast.")
    rows = speed(suite)
    print("TOPS of the whole call, quantization included")
    print(table(rows))
    if options.json:
        versions = {"jax_sage": __version__, "jax": jax.__version__}
        result = {"device": device, "versions": versions, "speed": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.chart:
        chart.draw(rows, title, options.chart)


if __name__ == "__main__":
    main()
