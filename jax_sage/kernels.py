"""The compiled kernels: whether this process has one for a recipe, and if not, why."""

import importlib
import pathlib
import types

import jax

from jax_sage.recipe import Recipe

_cuda: types.ModuleType | None
try:
    _cuda = importlib.import_module("jax_sage._cuda")
except ModuleNotFoundError:  # never built; one that is there and does not load is an error
    _cuda = None

_FOLDER = pathlib.Path(__file__).resolve().parent

# Matrix instructions on E4M3 begin with this compute capability.
_FP8_CAPABILITY = 89
_HOPPER = "wgmma (Hopper)"


class PortableWarning(UserWarning):
    """A GPU runs the portable path because it has no kernel for what was asked."""


def module() -> types.ModuleType | None:
    """The compiled module, or None if the package was built without CUDA."""
    return _cuda


def capabilities() -> list[int]:
    """Compute capabilities of this process's GPUs, as 10 * major + minor; empty without any."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return []
    return [int(str(d.compute_capability).replace(".", "")) for d in devices]


def why_unavailable(recipe: Recipe) -> str | None:
    """Why no kernel can run `recipe` on the GPUs of this process, or None if one can.

    Without a GPU (lowering ahead of time for one) the question is whether the build has a kernel.
    """
    if _cuda is None:
        reason = (
            "jax_sage was built without CUDA. Reinstall it with JAX_SAGE_CUDA=on in the "
            "environment (pip install --force-reinstall --no-deps /path/to/jax_sage)."
        )
        if (_FOLDER.parent / "CMakeLists.txt").exists():
            reason += (
                f" Or it is the sources in {_FOLDER.parent} that were imported, which hide an "
                "installed jax_sage: run from another folder, or with python -P."
            )
        return reason
    built: list[int] = _cuda.architectures()
    found = capabilities()
    driver, toolkit = _cuda.driver_version(), _cuda.toolkit_version()
    if found and driver // 1000 < toolkit // 1000:
        return (
            f"the driver supports CUDA {version_text(driver)} and the kernels were built with CUDA "
            f"{version_text(toolkit)}: driver too old. Update the driver, or reinstall jax_sage "
            f"with an nvcc of CUDA {driver // 1000}."
        )
    for capability in found:
        # A binary runs on its own major version, from its own minor version up.
        usable = [a for a in built if a // 10 == capability // 10 and a <= capability]
        if not usable:
            return (
                f"compute capability {capability / 10} is not in the build (it has "
                f"{', '.join(f'sm_{a}' for a in built)}). Reinstall jax_sage with "
                f"JAX_SAGE_CUDA_ARCHS={capability} if that is a supported architecture."
            )
        if recipe.pv == "fp8" and max(usable) < _FP8_CAPABILITY:
            return (
                f"E4M3 matrix instructions need sm_89 or newer, here sm_{max(usable)} runs: use "
                'recipe="8+16".'
            )
    if recipe.pv == "fp8" and max(built) < _FP8_CAPABILITY:
        return 'no architecture of this build has E4M3 matrix instructions: use recipe="8+16".'
    return None


def family(recipe: Recipe) -> str:
    """The kernels that run `recipe` on the GPUs of this process, given that some can."""
    hopper = all(c // 10 == 9 for c in capabilities())
    if hopper and (recipe.pv, recipe.pv_accumulator) in (("fp8", "fp16"), ("fp16", "fp32")):
        return _HOPPER
    return "mma.sync"


def max_head_dim(recipe: Recipe, mma_sync: bool = False) -> int:
    """The largest head dimension of the kernels that run `recipe`, given that some can.

    Without a GPU it is that of the best kernels of the build; on another GPU these report an error.
    """
    on_hopper = not mma_sync and family(recipe) == _HOPPER
    return 256 if on_hopper and _cuda is not None and 90 in _cuda.architectures() else 128


def version_text(version: int) -> str:
    """13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


if _cuda is not None:
    for _name, _target in _cuda.ffi_targets().items():
        jax.ffi.register_ffi_target(_name, _target, platform="CUDA")
