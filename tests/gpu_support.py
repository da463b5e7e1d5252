"""What the tests on a GPU share: recipes, and inputs on which kernels and portable JAX agree."""

import functools
import math
import os

import jax
import numpy as np
import pytest
import reference
from suite import MORE_RECIPES

from jax_sage import kernels
from jax_sage.recipe import RECIPES

# Whether the CPU runs the kernels, slowly (emulator/emulator.h): inputs are smaller then.
EMULATED = bool(os.environ.get("JAX_SAGE_EMULATED"))

# The kernel's sums and rows are alike for all of these.
ALL_RECIPES = {**RECIPES, **MORE_RECIPES}
EACH_RECIPE = pytest.mark.parametrize("recipe", ALL_RECIPES.values(), ids=ALL_RECIPES)


def exact_sums(x):
    """Multiples of 1/16 up to 64: the FP32 sum of 16K of them is exact in any order."""
    return (np.round(np.clip(x.astype(np.float64), -64, 64) * 16) / 16).astype(x.dtype)


def inputs(kind, query_shape, key_shape, dtype="float32", seed=0):
    q, k, v = reference.inputs(kind, query_shape, key_shape, dtype, seed)
    return q, exact_sums(k), exact_sums(v)


def on_cpu(function, *args):
    """Runs a portable function, jitted, on the host.

    There its divisions are IEEE's, as the kernels' are; XLA's on a GPU are not, and move a code of
    Q or K by one now and then.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return function(*args)


@functools.lru_cache(maxsize=256)
def jitted(function, **params):
    return jax.jit(functools.partial(function, **params))


def scale_log2(q, scale=None):
    return (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * math.log2(math.e)


def skip_without_kernel(head_dim):
    if head_dim > kernels.max_head_dim(RECIPES["8+8"]):
        pytest.skip("this GPU's kernels do not take so many channels")
