"""Quantized attention for JAX: SageAttention2++ behind the call of jax.nn.dot_product_attention."""

from jax_sage import flax
from jax_sage.attention import attention
from jax_sage.calls import SwapWarning, UnsupportedAttentionError
from jax_sage.capture import capture
from jax_sage.compare import compare
from jax_sage.info import info
from jax_sage.models import compare_model
from jax_sage.patch import patch
from jax_sage.policy import Policy, Rule
from jax_sage.recipe import RECIPES, Recipe
from jax_sage.report import Report
from jax_sage.sites import attention_sites
from jax_sage.swap import swap

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "Policy",
    "Recipe",
    "Report",
    "Rule",
    "SwapWarning",
    "UnsupportedAttentionError",
    "__version__",
    "attention",
    "attention_sites",
    "capture",
    "compare",
    "compare_model",
    "flax",
    "info",
    "patch",
    "swap",
]
