"""What a query sees, in plain JAX on the CPU of any machine."""

import jax
import pytest
from mask_suite import MaskSuite


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.mark.usefixtures("compiled_quickly")
class TestMasks(MaskSuite):
    """The common tests."""
