"""A few small attentions, for compute-sanitizer (test_gpu.py): both recipes, odd sizes, masks."""

import functools
import sys

import jax
import jax.numpy as jnp

from jax_sage import RECIPES, lowering_cuda
from jax_sage.masking import Band, Masks

CASES = [
    # (batch, T, S, N, K, H, dtype, recipe, is_causal)
    (1, 1, 1, 1, 1, 1, "float32", "8+8", False),
    (1, 129, 65, 2, 1, 64, "bfloat16", "8+8", True),
    (2, 67, 191, 4, 2, 128, "float16", "8+8", False),
    (1, 130, 130, 2, 2, 127, "float32", "8+8", True),
    (1, 129, 65, 2, 1, 64, "bfloat16", "8+16", False),
    (2, 67, 191, 4, 2, 128, "float32", "8+16", True),
    (1, 33, 513, 1, 1, 40, "float16", "8+16", False),
    (1, 130, 4200, 1, 1, 64, "bfloat16", "8+8", False),  # by five warpgroups
    (1, 130, 1070, 1, 1, 64, "bfloat16", "8+16", False),  # in tiles of 128 keys
]
# For these there are none on mma.sync.
LARGE = [
    (1, 129, 200, 2, 1, 256, "bfloat16", "8+8", True),
    (1, 70, 300, 2, 2, 200, "float32", "8+16", False),
    (1, 129, 600, 2, 1, 192, "bfloat16", "8+8", False),
    (1, 129, 300, 2, 1, 136, "bfloat16", "8+16", True),
]
# More items than any GPU has SMs (on Hopper 160 of 256 queries), more tiles of keys than stages: a
# persistent kernel goes round. Those on mma.sync are not persistent.
MANY_TILES = (2, 1100, 700, 16, 2, 64, "bfloat16", "8+8", True)
# (recipe, mma_sync, with_lse, what there is of masks, shape): of each kind of kernel on wgmma,
# with intervals, a bias, a mask or segments, and both of these.
MANY, FEW = (2, 1100, 700, 16, 2, 64), (2, 150, 300, 2, 1, 128)
ALIGNED = (2, 70, 592, 2, 1, 128)  # masks are packed 16 keys at once; of FEW 4, of ODD one
ODD = (1, 150, 301, 2, 1, 64)
# With 256 channels; and most parts of the keys are beyond all windows, and have no codes.
LARGE_FEW, FEW_SEEN, LARGE_FEW_SEEN = (
    (1, 150, 300, 2, 1, 256),
    (1, 150, 1400, 2, 1, 128),
    (1, 150, 700, 2, 1, 256),
)
# Two parts of the sorted keys, which share a segment.
PARTS, LARGE_PARTS = (2, 150, 700, 2, 1, 128), (2, 150, 700, 2, 1, 256)
# With 192 channels.
WIDE, WIDE_PARTS = (1, 150, 300, 2, 1, 192), (1, 150, 700, 2, 1, 130)
MASKED = [
    ("8+8", False, False, "window", MANY),
    ("8+8", False, True, "mask window", MANY),
    ("8+8", False, True, "bias", MANY),
    ("8+16", False, True, "lengths", MANY),
    ("8+16", False, True, "mask", FEW),
    ("8+8", False, True, "whole mask", ALIGNED),
    ("8+8", False, True, "whole mask", ODD),
    ("8+16", False, True, "bias", FEW),
    ("8+16", False, True, "mask bias", FEW),
    ("8+8", False, True, "mask bias lengths window", FEW),
    ("8+8", True, True, "mask lengths", FEW),
    ("8+16", True, True, "bias", FEW),
    ("8+8", False, True, "segments", PARTS),
    ("8+16", True, True, "segments", PARTS),
    ("8+16", False, True, "segments", LARGE_PARTS),
    ("8+8", False, True, "mask bias", LARGE_FEW),
    ("8+8", False, True, "mask bias", WIDE),
    ("8+16", False, True, "segments", WIDE_PARTS),
    ("8+8", False, True, "window", FEW_SEEN),
    ("8+16", False, True, "window", LARGE_FEW_SEEN),
    ("8+8", False, False, "bias window", FEW),
    ("8+8", False, True, "bias", LARGE_FEW),
    ("8+16", False, True, "bias window", LARGE_FEW),
]


def run_masked(
    recipe: str, mma_sync: bool, with_lse: bool, kinds: str, shape: tuple[int, ...]
) -> None:
    batch, length_q, length_kv, heads, kv_heads, head_dim = shape

    def ids(length: int) -> jax.Array:
        tokens = jnp.arange(length)
        in_order = tokens * 4 // length
        scattered = jnp.where(tokens % 97 == 0, 9, in_order)
        return jnp.stack([scattered, in_order][:batch])  # of a kernel each, on Hopper

    has = set(kinds.split())
    q = jnp.ones((batch, length_q, heads, head_dim), jnp.bfloat16)
    k = jnp.ones((batch, length_kv, kv_heads, head_dim), jnp.bfloat16)
    mask = jnp.arange(length_kv).reshape(1, 1, 1, -1) % 3 > 0
    if "whole" in has:
        mask = jnp.broadcast_to(mask, (1, 1, length_q, length_kv))
    masks = Masks(
        mask=mask if "mask" in has else None,
        bias=jnp.zeros((1, 1, length_q, length_kv), jnp.float32) if "bias" in has else None,
        query_segment_ids=ids(length_q) if "segments" in has else None,
        key_value_segment_ids=ids(length_kv) if "segments" in has else None,
        key_value_seq_lengths=jnp.array([length_kv, 70]) if "lengths" in has else None,
    )
    attention = functools.partial(
        lowering_cuda.attention,
        scale_log2=0.1,
        band=Band(left=100, right=20) if "window" in has else Band(),
        with_lse=with_lse,
        recipe=RECIPES[recipe],
        mma_sync=mma_sync,
    )
    out, lse = jax.jit(attention)(q, k, k, masks)
    # Where a row sees nothing its output is 0, and lse -inf; without lse there is only the former.
    sees = lse > -jnp.inf if with_lse else (out != 0).any(-1)
    assert bool(((out == 1).all(-1) == sees).all())
    print("ran", recipe, "mma.sync" if mma_sync else "own", kinds, flush=True)


def run(
    batch: int,
    length_q: int,
    length_kv: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    recipe: str,
    is_causal: bool,
    mma_sync: bool,
) -> None:
    attention = functools.partial(
        lowering_cuda.attention,
        scale_log2=0.1,
        band=Band(right=0) if is_causal else Band(),
        with_lse=False,
        recipe=RECIPES[recipe],
        mma_sync=mma_sync,
    )
    q = jnp.ones((batch, length_q, heads, head_dim), dtype)
    k = jnp.ones((batch, length_kv, kv_heads, head_dim), dtype)
    out, _ = jax.jit(attention)(q, k, k)
    assert bool((out == 1).all())


def main() -> None:
    if sys.argv[1] == "plain":
        for mma_sync in (False, True):
            for case in CASES:
                run(*case, mma_sync)
        for case in (*LARGE, MANY_TILES):
            run(*case, mma_sync=False)
    else:
        for case in MASKED:
            run_masked(*case)
    print("all cases ran")


if __name__ == "__main__":
    main()
