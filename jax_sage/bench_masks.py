"""Speed of attention with masks and of large heads, as a ratio to that of the plain call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_sage.attention import attention
from jax_sage.bench import Note, Shape, inputs, measure

SHAPE = Shape(2, 8192, 16, 16, 128, False)


def masked_speed(shape: Shape, note: Note) -> list[dict[str, Any]]:
    """One row for each kind of mask: milliseconds a call, and how much faster than without.

    Half as many heads of twice as many channels are as many operations.
    """
    rows, keys = shape.batch, shape.length
    key = jax.random.key(1)
    bias = jax.random.normal(key, (1, 1, keys, keys), jnp.float32)
    half = jnp.full((rows,), keys // 2, jnp.int32)
    segments = jnp.broadcast_to(jnp.arange(keys) * 8 // keys, (rows, keys)).astype(jnp.int32)
    window = keys // 8
    arguments = (*inputs(shape), bias > 0, bias, bias.astype(jnp.bfloat16), half, segments)

    cases: dict[str, Callable[..., dict[str, Any]]] = {
        "plain": lambda *_: {},
        "causal": lambda *_: {"is_causal": True},
        "boolean mask [1, 1, T, S], half of it": lambda mask, *_: {"mask": mask},
        "bias [1, 1, T, S], float32": lambda _, bias, *__: {"bias": bias},
        "bias [1, 1, T, S], bfloat16": lambda _, __, bias, *___: {"bias": bias},
        f"window of {window} keys": lambda *_: {
            "local_window_size": (window // 2, window // 2 - 1)
        },
        f"8 segments of {keys // 8}": lambda *masks: {
            "query_segment_ids": masks[4],
            "key_value_segment_ids": masks[4],
        },
        "key lengths at half": lambda *masks: {"key_value_seq_lengths": masks[3]},
    }

    def run(options: Callable[..., dict[str, Any]]) -> Callable[..., jax.Array]:
        function = jax.jit(lambda q, k, v, *masks: attention(q, k, v, **options(*masks)))
        jax.block_until_ready(function(*arguments))
        return function

    def large_heads(q: jax.Array, k: jax.Array, v: jax.Array, *_: jax.Array) -> jax.Array:
        large = (rows, keys, -1, 2 * shape.head_dim)
        return attention(q.reshape(large), k.reshape(large), v.reshape(large))

    runs = {(case, "8+8"): run(options) for case, options in cases.items()}
    name = f"{shape.heads // 2} heads of {2 * shape.head_dim}"
    runs[name, "8+8"] = jax.jit(large_heads)
    jax.block_until_ready(runs[name, "8+8"](*arguments))
    seconds = measure(runs, arguments, note)
    plain = seconds["plain", "8+8"]
    return [
        {
            "case": case,
            "recipe": recipe,
            "milliseconds": float(f"{1e3 * time:.4g}"),
            "times_plain_speed": float(f"{plain / time:.3g}"),
        }
        for (case, recipe), time in seconds.items()
    ]
