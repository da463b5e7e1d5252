"""What would run here: versions, devices, kernels, and a small check that the numbers are right."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jax_sage import kernels
from jax_sage.arguments import MAX_HEAD_DIM
from jax_sage.recipe import RECIPES, Recipe

# Of the self-check: normal inputs, where it measures 0.034 and 0.0095.
EXPECTED_ERROR = {"8+8": 0.045, "8+16": 0.015}


@dataclasses.dataclass(frozen=True)
class Info:
    """Result of :func:`info`. Printing it gives a readable report.

    Attributes:
      versions: of jax_sage and the folder it was imported from; of jax and jaxlib; of CUDA: what
        the kernels were built with ("none (portable build)" without them), and what the driver
        supports ("none" where there is none).
      architectures: compute capabilities that the kernels were built for, e.g. ``("sm_89",)``.
      devices: kind of each device that JAX uses by default, GPUs with their compute capability.
      kernels: for each named recipe, the kernel family that would run on these devices, or
        "portable JAX" and the reason.
      errors: for each named recipe, the relative L1 error of a small attention, run as above,
        against float32.
    """

    versions: dict[str, str]
    architectures: tuple[str, ...]
    devices: tuple[str, ...]
    kernels: dict[str, str]
    errors: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{name:<20}{version}" for name, version in self.versions.items()]
        lines.append(f"{'built for':<20}{', '.join(self.architectures) or 'no GPU'}")
        lines += [f"{'device':<20}{device}" for device in self.devices]
        lines += [f"{'recipe ' + name:<20}{kernel}" for name, kernel in self.kernels.items()]
        lines += [
            f"{'self-check ' + name:<20}relative L1 error {error:.4f} against float32: "
            + ("ok" if error <= EXPECTED_ERROR[name] else "TOO LARGE")
            + f" (expected: below {EXPECTED_ERROR[name]})"
            for name, error in self.errors.items()
        ]
        return "\n".join(lines)


def info() -> Info:
    """Reports versions, devices, the kernel of each recipe or why there is none, and a self-check.

    The self-check computes a small attention with each named recipe on the default device.
    """
    from jax_sage import __version__

    module = kernels.module()
    folder = pathlib.Path(__file__).parent
    versions = {
        "jax_sage": __version__,
        "imported from": str(folder),
        "jax": jax.__version__,
        "jaxlib": _jaxlib_version(),
    }
    if module is not None:
        driver = module.driver_version()
        versions["CUDA of the build"] = kernels.version_text(module.toolkit_version())
        versions["CUDA of the driver"] = kernels.version_text(driver) if driver else "none"
    else:
        versions["CUDA of the build"] = "none (portable build)"
    return Info(
        versions=versions,
        architectures=tuple(f"sm_{a}" for a in module.architectures()) if module else (),
        devices=tuple(_describe(d) for d in jax.local_devices()),
        kernels={name: _kernel(recipe) for name, recipe in RECIPES.items()},
        errors={name: _self_check(name) for name in RECIPES},
    )


def _jaxlib_version() -> str:
    import jaxlib

    return str(jaxlib.__version__)


def _describe(device: jax.Device) -> str:
    capability = getattr(device, "compute_capability", None)
    suffix = f", compute capability {capability}" if capability else ""
    return f"{device.device_kind} ({device.platform}{suffix})"


def _kernel(recipe: Recipe) -> str:
    platform = jax.default_backend()
    if platform != "gpu" or not kernels.capabilities():
        return f"portable JAX: the default device is a {platform}, kernels are for NVIDIA GPUs"
    reason = kernels.why_unavailable(recipe)
    if reason is not None:
        return f"portable JAX: {reason}"
    limit = kernels.max_head_dim(recipe)
    rest = f"; portable JAX for head dimensions above {limit}" if limit < MAX_HEAD_DIM else ""
    return f"CUDA, {kernels.family(recipe)}{rest}"


def _self_check(recipe: str) -> float:
    from jax_sage.attention import attention

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 320, 4, 64), jnp.float32) for key in keys)
    with jax.default_matmul_precision("highest"):
        exact = jax.nn.dot_product_attention(q, k, v)
    difference = np.asarray(attention(q, k, v, recipe=recipe)) - np.asarray(exact)
    return float(np.abs(difference).sum() / np.abs(np.asarray(exact)).sum())
