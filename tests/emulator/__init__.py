"""Runs the CUDA kernels on the CPU, for tests where there is no GPU; see emulator.h."""

import ctypes
import os
import types

import jax
from jax.interpreters import mlir

from jax_sage import kernels, primitive

_HANDLERS = {
    "jax_sage_quantize": "JaxSageQuantize",
    "jax_sage_attention": "JaxSageAttention",
    "jax_sage_pack_mask": "JaxSagePackMask",
    "jax_sage_seen_keys": "JaxSageSeenKeys",
    "jax_sage_intervals": "JaxSageIntervals",
    "jax_sage_sort_ids": "JaxSageSortIds",
}


def take_the_place_of_a_gpu(library: str) -> None:
    """From here on this process's CPU lowers and runs like a GPU. For good.

    Like a Hopper, or one of the capability in JAX_SAGE_EMULATED_CAPABILITY.
    """
    jax.config.update("jax_platforms", "cpu")
    handlers = ctypes.CDLL(library)
    for name, symbol in _HANDLERS.items():
        target = jax.ffi.pycapsule(getattr(handlers, symbol))
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    kernels.capabilities = lambda: [int(os.environ.get("JAX_SAGE_EMULATED_CAPABILITY", "90"))]
    kernels._cuda = types.SimpleNamespace(
        architectures=lambda: [80, 86, 89, 90, 120],
        driver_version=lambda: 13000,
        toolkit_version=lambda: 13000,
    )
    mlir.register_lowering(primitive.attention_p, primitive._lower_cuda, platform="cpu")
