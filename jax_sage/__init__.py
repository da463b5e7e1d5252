"""Quantized attention for JAX: SageAttention2++ behind the call of jax.nn.dot_product_attention."""

from jax_sage.attention import attention
from jax_sage.info import info
from jax_sage.recipe import RECIPES, Recipe

__version__ = "0.1.0"
__all__ = ["RECIPES", "Recipe", "__version__", "attention", "info"]
