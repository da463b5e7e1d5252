import os

import pytest

# Subprocesses of the GPU tests share the GPU with this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(scope="class")
def compiled_quickly():
    """Compilation takes most of the time of many tests, and LLVM's optimizations most of that.

    What optimizations could change, the order and rounding of operations, is tested without this:
    test_portable.py's sums and accuracy, test_quantization.py.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


pytest.register_assert_rewrite("mask_suite", "reference", "suite")
