"""The ``attention_fn`` for Flax: ``jax_sage.flax.dot_product_attention``.

``nnx.MultiHeadAttention(..., attention_fn=jax_sage.flax.dot_product_attention)``, and the same for
``linen.MultiHeadDotProductAttention``. To swap the attention of a model that exists:
:func:`jax_sage.swap`.
"""

from jax_sage.adapters import dot_product_attention

__all__ = ["dot_product_attention"]
