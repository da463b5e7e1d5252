"""The portable path, on the CPU of any machine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from suite import AttentionSuite

import jax_sage


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


class TestPortable(AttentionSuite):
    """The common tests."""


# The project's own bounds on relative L1 error: B=1, 8 heads, N=4096, D=128. SageAttention's
# kernels have 0.0373, 0.0036 and 0.0489 on the first three.
@pytest.mark.parametrize(
    ("recipe", "kind", "bound"),
    [
        ("8+8", "normal", 0.040),
        ("8+8", "outlier", 0.0045),
        ("8+8", "heavy", 0.052),
        ("8+16", "normal", 0.012),
    ],
)
def test_full_size_accuracy(recipe, kind, bound):
    shape = (1, 4096, 8, 128)
    q, k, v = reference.inputs(kind, shape, shape)
    rows = np.arange(3, 4096, 16)  # float64 of all would take a minute
    out = np.asarray(jax_sage.attention(q, k, v, recipe=recipe))[:, rows]
    expected = reference.outputs(q, k, v, rows=rows)
    error = reference.relative_l1(out, expected)
    cosine, rmse = reference.cosine(out, expected), reference.rmse(out, expected)
    print(f"{recipe} {kind}: relative L1 {error:.4f}, cosine {cosine:.6f}, RMSE {rmse:.2e}")
    assert error <= bound
    # For errors that are independent of the outputs, 1 - cosine = (RMSE / rms)^2 / 2, and a ratio
    # of means of absolute values is that of rms if both are distributed alike: twice as much is
    # for those of which some are larger.
    assert 1 - cosine <= (2 * bound) ** 2 / 2
    assert rmse <= 2 * bound * np.sqrt(np.mean(expected**2))


def temporary_bytes(length: int) -> int:
    shape = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16)
    compiled = jax.jit(jax_sage.attention).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear():
    half, whole = temporary_bytes(1 << 14), temporary_bytes(1 << 15)
    # Scores of all pairs would take 32 GiB. 32K x 8 heads x 128 channels are 128 MiB in float32:
    # at most eight arrays of that size at a time.
    assert whole < 1 << 30
    assert whole / half < 2.3  # proportional would be 2, quadratic 4
