"""A few small attentions, for compute-sanitizer (test_gpu.py): both recipes, odd sizes, causal."""

import jax
import jax.numpy as jnp

import jax_sage

CASES = [
    # (batch, T, S, N, K, H, dtype, recipe, is_causal)
    (1, 1, 1, 1, 1, 1, "float32", "8+8", False),
    (1, 129, 65, 2, 1, 64, "bfloat16", "8+8", True),
    (2, 67, 191, 4, 2, 128, "float16", "8+8", False),
    (1, 130, 130, 2, 2, 127, "float32", "8+8", True),
    (1, 129, 65, 2, 1, 64, "bfloat16", "8+16", False),
    (2, 67, 191, 4, 2, 128, "float32", "8+16", True),
    (1, 33, 513, 1, 1, 40, "float16", "8+16", False),
    # More query tiles (288) than any GPU has SMs, more tiles of keys than stages: a persistent
    # kernel goes round.
    (2, 1100, 700, 16, 2, 64, "bfloat16", "8+8", True),
]


def main() -> None:
    for batch, length_q, length_kv, heads, kv_heads, head_dim, dtype, recipe, is_causal in CASES:
        q = jnp.ones((batch, length_q, heads, head_dim), dtype)
        k = jnp.ones((batch, length_kv, kv_heads, head_dim), dtype)
        out = jax_sage.attention(q, k, k, recipe=recipe, is_causal=is_causal)
        jax.block_until_ready(out)
        assert bool((out == 1).all())
    print("all cases ran")


if __name__ == "__main__":
    main()
