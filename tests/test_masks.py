"""What a query sees, in plain JAX on the CPU of any machine."""

import jax
import pytest
from mask_suite import MaskSuite


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly():
    """Compilation takes most of the time. The other tests of the portable path optimize."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class TestMasks(MaskSuite):
    """The common tests."""
