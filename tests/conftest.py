import os

import pytest

# Subprocesses of the GPU tests share the GPU with this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def spread_over_gpus(environ):
    """Processes of pytest-xdist take the GPUs by turns, if record.py says that there are more."""
    worker = environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    gpus = int(environ.pop("JAX_SAGE_TEST_GPUS", "1"))  # once: not in processes of this one
    if gpus > 1:
        visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        environ["CUDA_VISIBLE_DEVICES"] = visible[int(worker.removeprefix("gw")) % gpus]


spread_over_gpus(os.environ)

# The kernels built for the CPU, by emulator/sources.py: tests that need a GPU run with them.
if library := os.environ.get("JAX_SAGE_EMULATED"):
    import emulator

    emulator.take_the_place_of_a_gpu(library)


@pytest.fixture(scope="module", autouse=True)
def programs_are_given_back():
    """XLA maps memory for each program that it compiles for the CPU, some 30 times. A process may
    have 65530 mappings (vm.max_map_count), which all tests in two processes come close to: then
    the next compilation crashes.
    """
    yield
    import jax

    jax.clear_caches()


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


@pytest.fixture
def on_gpu():
    import jax
    from gpu_support import EMULATED

    from jax_sage import kernels
    from jax_sage.recipe import RECIPES

    if EMULATED:
        return
    if not kernels.capabilities():
        pytest.skip("no NVIDIA GPU, or JAX has no CUDA")
    assert jax.default_backend() == "gpu"
    for recipe in RECIPES.values():
        reason = kernels.why_unavailable(recipe)
        if reason and "E4M3 matrix instructions need sm_89" in reason:
            pytest.skip(f"this GPU cannot run every recipe: {reason}")
        assert reason is None, "without a kernel these tests would test the portable path"


@pytest.fixture(params=[False, True], ids=["own", "mma.sync"])
def mma_sync(request):
    """A Hopper GPU has kernels of its own, and can run the RTX 4090's: tests run with both."""
    from gpu_support import ALL_RECIPES

    from jax_sage import kernels

    if request.param and all(kernels.family(r) == "mma.sync" for r in ALL_RECIPES.values()):
        pytest.skip("this GPU's own kernels are those on mma.sync")
    return request.param
