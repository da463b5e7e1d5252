"""The numeric recipe: which precision each step of the attention runs in."""

import dataclasses
from typing import Literal

# Largest magnitudes that P and V are scaled to before they are rounded to the PV operand type.
# P_MAX * V_MAX * 512 = 61440 <= 65504, the largest FP16 number: an FP16 partial sum over up to 512
# keys cannot overflow, whatever the data. P_MAX is a power of two, and the running row maximum is
# rounded up to an integer (in base 2), so the mantissas of P do not depend on the order in which
# the blocks of keys are visited: a kernel with other tiles rounds the same P (but for P below
# 2^-6, where E4M3 is subnormal, which depends on what the maximum was at the time).
# P gets the larger part of the range: behind a single large score (an attention sink) many small
# weights must survive. V's errors hardly depend on V_MAX; only heavy tails prefer it large.
P_MAX = 64.0
V_MAX = 1.875

# Scores (base 2) from here on have rounding errors above 1 in FP32: P may be off by powers of two,
# and overflow. A row whose maximum is that large gives NaN.
SCORE_MAX = 2.0**24

# Keys whose INT8 scales are computed together.
BLOCK_KV = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is quantized to what. Frozen and hashable: a static argument under ``jax.jit``.

    Attributes:
      qk: type of Q and K in the product QKᵀ. INT8 with one scale per query token and one per
        16 keys; products and their sums are exact in INT32.
      pv: type of P and V in the product PV: ``"fp8"`` (E4M3) or ``"fp16"``.
      pv_accumulator: type in which PV is summed over blocks of 64 keys (up to 512 on Hopper); each
        block's sum is then added to an FP32 accumulator.
      smooth_k: subtract the mean key of each head before quantizing (exact: softmax does not see
        it; ``lse`` is corrected).
      smooth_v: subtract the mean of each channel of V before quantizing and add it back to the
        output (exact: rows of P sum to one), such that the quantized V keeps the mean of V.

    Sources: SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958), SageAttention2++
    (2505.21136).
    """

    qk: Literal["int8"] = "int8"
    pv: Literal["fp8", "fp16"] = "fp8"
    pv_accumulator: Literal["fp16", "fp32"] = "fp16"
    smooth_k: bool = True
    smooth_v: bool = True

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {
            "qk": ("int8",),
            "pv": ("fp8", "fp16"),
            "pv_accumulator": ("fp16", "fp32"),
            "smooth_k": (True, False),
            "smooth_v": (True, False),
        }
        for field, values in allowed.items():
            given = getattr(self, field)
            if not isinstance(given, str | bool) or given not in values:
                raise ValueError(f"Recipe.{field} is {given!r}; allowed: {values}.")


RECIPES: dict[str, Recipe] = {
    "8+8": Recipe(),
    "8+16": Recipe(pv="fp16", pv_accumulator="fp32"),
}


def resolve(recipe: str | Recipe) -> Recipe:
    """Returns the recipe of that name, or the recipe itself."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str) and recipe in RECIPES:
        return RECIPES[recipe]
    raise ValueError(
        f"recipe is {recipe!r}; allowed: {', '.join(map(repr, RECIPES))}, or a jax_sage.Recipe."
    )
