"""What the benchmark compares with: JAX's other attentions, each called as its users would.

Each takes bfloat16 q, k, v and returns a bfloat16 output, and imports what it needs when it is
traced: one that is not installed here, or whose private module has moved, raises then.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

E4M3_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)
# P <= 1 before it is scaled: a power of two that leaves E4M3 (up to 448) some room.
P_SCALE = 256.0


def cudnn_fp8(
    query: jax.Array,  # [B, T, N, H]
    key: jax.Array,  # [B, S, K, H]
    value: jax.Array,  # [B, S, K, H]
    *,
    is_causal: bool,
) -> jax.Array:
    """cuDNN's FP8 attention with one scale a tensor, from bfloat16 and back to bfloat16."""
    # jax.nn does not offer it.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    (q, descale_q), (k, descale_k), (v, descale_v) = map(quantize_e4m3, (query, key, value))
    one = jnp.ones_like(descale_v)
    # The backward pass's must be given too. Declared as floats, they are arrays.
    params: Any = dict.fromkeys(cudnn.FP8Params.__annotations__, one)
    params |= {
        "descale_q": descale_q,
        "descale_k": descale_k,
        "descale_v": descale_v,
        "scale_s": P_SCALE * one,
        "descale_s": one / P_SCALE,
        # What the largest output will be is not known; it cannot be above the largest value.
        "scale_o": 1 / descale_v,
    }
    out, *_ = cudnn.dot_product_attention(
        q,
        k,
        v,
        fp8_params=params,
        scale=query.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK,
        use_fp8=True,
    )
    return (out.astype(jnp.float32) * descale_v).astype(query.dtype)


def quantize_e4m3(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes of x, and what they are to be multiplied by: float32 [1, 1, 1, 1]."""
    x = x.astype(jnp.float32)
    descale = jnp.max(jnp.abs(x), keepdims=True) / E4M3_MAX
    return (x * (1 / descale)).astype(jnp.float8_e4m3fn), descale


def tokamax(
    query: jax.Array,  # [B, T, N, H]
    key: jax.Array,  # [B, S, K, H]
    value: jax.Array,  # [B, S, K, H]
    *,
    is_causal: bool,
) -> jax.Array:
    """tokamax on Mosaic GPU, without its fallbacks."""
    from tokamax import dot_product_attention

    out: jax.Array = dot_product_attention(
        query, key, value, is_causal=is_causal, implementation="mosaic_gpu"
    )
    return out


def _jax_nn(implementation: str) -> Callable[..., jax.Array]:
    return functools.partial(jax.nn.dot_product_attention, implementation=implementation)


XLA = ("jax.nn xla", "bf16")
# By implementation and recipe, as in the rows of the benchmark.
PEERS: dict[tuple[str, str], Callable[..., jax.Array]] = {
    ("jax.nn cudnn", "bf16"): _jax_nn("cudnn"),
    ("jax cudnn", "fp8"): cudnn_fp8,
    ("tokamax mosaic_gpu", "bf16"): tokamax,
    XLA: _jax_nn("xla"),
}
