"""The build backend of `pip install .` (PEP 517): chooses the portable or the CUDA build.

The portable package is Python files alone and needs no compiler. The CUDA build adds the module
jax_sage._cuda; it takes nvcc from the machine, or else from PyPI. scikit-build-core does the work.

Environment variables:
  JAX_SAGE_CUDA        auto: CUDA where the machine has nvcc or an NVIDIA driver, and otherwise
                       portable (the default); on: CUDA, or an error that says what is missing;
                       off: portable
  JAX_SAGE_CUDA_ARCHS  compute capabilities, for example "80;90"; the default is those of the
                       machine's GPUs, and all that are supported where it has none
  CUDACXX              the nvcc to use; otherwise PATH, CUDA_HOME and CUDA_PATH are searched
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SUPPORTED_ARCHS = (80, 86, 89, 90, 120)

# Compute capability 12.0 is known to nvcc from this release on.
OLDEST_NVCC = (12, 8)

# The compiler and its headers on PyPI. The metapackage keeps all parts at one release, as nvcc
# needs them. Machine code by any 13.x runs on every driver that knows CUDA 13.0.
PYPI_TOOLKIT = "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.*"
PYPI_TOOLKIT_CUDA = 13000

# XLA refuses a custom call whose FFI API is newer than its own, so the headers come from the oldest
# jaxlib that jax_sage supports; every later one accepts them.
JAXLIB = "jaxlib==0.8.0"
NANOBIND = "nanobind>=2.4"


class BuildError(SystemExit):
    """Ends the build with its message alone; a traceback would bury it."""

    def __init__(self, message: str):
        super().__init__(f"jax_sage: {message}")


@dataclass(frozen=True)
class Plan:
    """What to build. Without archs: the portable package. Without nvcc: with PyPI's."""

    reason: str
    archs: tuple[int, ...] = ()
    nvcc: str | None = None

    def __str__(self) -> str:
        if not self.archs:
            return f"jax_sage: portable build, without CUDA kernels: {self.reason}"
        archs = ", ".join(map(str, self.archs))
        return f"jax_sage: CUDA build for compute capability {archs}: {self.reason}"


# What the machine has.


def find_nvcc() -> str | None:
    """The machine's nvcc: CUDACXX, then PATH, then CUDA_HOME and CUDA_PATH."""
    chosen = os.environ.get("CUDACXX")
    if chosen:
        nvcc = shutil.which(chosen)
        if nvcc is None:
            raise BuildError(f"CUDACXX={chosen} is no program. Set it to nvcc's path, or unset it.")
        return nvcc
    homes = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")])
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes)]
    return next(filter(None, found), None)


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """(major, minor) of the toolkit that nvcc belongs to."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise BuildError(
            f"`{nvcc} --version` names no release, so it is no working nvcc. "
            "Set CUDACXX to one, or JAX_SAGE_CUDA=off for the portable build."
        )
    return int(match[1]), int(match[2])


def driver_cuda() -> int | None:
    """The driver's CUDA version, as 1000 * major + 10 * minor; None without a driver."""
    try:
        version = ctypes.c_int(0)
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return version.value or None
    except OSError:
        # A container that is being built can see the host's driver without its library, and so
        # without its version. It is taken to be new enough.
        seen = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")
        return PYPI_TOOLKIT_CUDA if seen else None


def gpu_archs() -> tuple[int, ...]:
    """The compute capabilities of the machine's GPUs, as 10 * major + minor."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:
        return ()
    return tuple(sorted({int(a + b) for a, b in re.findall(r"^(\d+)\.(\d)$", text, re.MULTILINE)}))


def obstacle_to_compiling() -> str | None:
    """What keeps this machine from compiling a Python extension; None when nothing does."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"CUDA kernels are built on 64-bit Linux, not on {sys.platform} {platform.machine()}"
    compilers = filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"])
    if not any(map(shutil.which, compilers)):
        return "there is no C++ compiler (on Debian: apt install g++)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Python's headers are missing, {header} (on Debian: apt install python3-dev)"
    return None


# What to build.


def machine_nvcc() -> tuple[str | None, str]:
    """The machine's nvcc, None unless it is new enough, and a clause that says what was found."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None, "there is no nvcc on the machine"
    major, minor = nvcc_version(nvcc)
    if (major, minor) >= OLDEST_NVCC:
        return nvcc, f"{nvcc} is of CUDA {major}.{minor}"
    needed = ".".join(map(str, OLDEST_NVCC))
    found = f"{nvcc} is of CUDA {major}.{minor}, and {needed} or later is needed"
    if os.environ.get("CUDACXX"):
        raise BuildError(f"{found}. Set CUDACXX to a newer nvcc, or unset it.")
    return None, found


def obstacle_to_pypi_toolkit() -> str | None:
    """Why auto does not take the compiler from PyPI; None when it does."""
    driver = driver_cuda()
    if driver is None:
        return "there is no NVIDIA driver"
    if driver < PYPI_TOOLKIT_CUDA:
        version = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"the NVIDIA driver supports CUDA {version}, which is too old for the compiler on PyPI "
            "(CUDA 13.0, driver 580 or later)"
        )
    return None


def choose_archs() -> tuple[int, ...]:
    """The compute capabilities to compile for; empty if none of the machine's GPUs is supported."""
    wanted = os.environ.get("JAX_SAGE_CUDA_ARCHS")
    if wanted:
        entries = [entry.strip() for entry in wanted.split(";")]
        allowed = [str(arch) for arch in SUPPORTED_ARCHS]
        wrong = [entry for entry in entries if entry not in allowed]
        if wrong:
            raise BuildError(
                f"JAX_SAGE_CUDA_ARCHS={wanted}: {', '.join(map(repr, wrong))} not supported. "
                f"Set it to any of {';'.join(allowed)}, separated by semicolons."
            )
        return tuple(sorted({int(entry) for entry in entries}))
    gpus = gpu_archs()
    if not gpus:
        return SUPPORTED_ARCHS
    # A GPU runs the machine code of its own major version up to its own minor one.
    runs = [[a for a in SUPPORTED_ARCHS if a // 10 == gpu // 10 and a <= gpu] for gpu in gpus]
    return tuple(sorted({max(archs) for archs in runs if archs}))


def plan_build() -> Plan:
    """Decides from the environment variables and the machine; raises BuildError."""
    mode = os.environ.get("JAX_SAGE_CUDA") or "auto"
    if mode not in ("auto", "on", "off"):
        raise BuildError(f"JAX_SAGE_CUDA={mode} is unknown. Set it to auto, on or off.")
    if mode == "off":
        return Plan("JAX_SAGE_CUDA=off")

    archs = choose_archs()
    nvcc, found = machine_nvcc()
    if mode == "auto" and nvcc is None and (obstacle := obstacle_to_pypi_toolkit()):
        return Plan(f"{found}, and {obstacle}")
    if mode == "auto" and not archs:
        gpus, supported = (", ".join(map(str, every)) for every in (gpu_archs(), SUPPORTED_ARCHS))
        return Plan(f"the GPU's compute capability is {gpus}, and kernels exist for {supported}")
    if obstacle := obstacle_to_compiling():
        if mode == "auto":
            return Plan(obstacle)
        raise BuildError(
            f"JAX_SAGE_CUDA=on, but {obstacle}. "
            "Install what is missing, or set JAX_SAGE_CUDA=off for the portable build."
        )
    source = found if nvcc else f"{found}, so it comes from PyPI ({PYPI_TOOLKIT})"
    return Plan(source, archs or SUPPORTED_ARCHS, nvcc)


# What scikit-build-core is told.


def package_folder(module: str, file: str, requirement: str) -> Path:
    """The folder of an installed package that has the file; looked up without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # Of a parent package.
        spec = None
    for folder in spec.submodule_search_locations or () if spec else ():
        if Path(folder, file).exists():
            return Path(folder)
    raise BuildError(
        f"the CUDA build needs {requirement}, and {file} of it is not installed. "
        f"Install it (pip install '{requirement}'), or build without --no-build-isolation."
    )


def settings_for(plan: Plan) -> dict[str, str]:
    """The settings that depend on the plan alone."""
    if not plan.archs:
        return {"wheel.cmake": "false", "wheel.py-api": "py3"}
    return {"cmake.define.JAX_SAGE_CUDA_ARCHS": ";".join(map(str, plan.archs))}


def tools_for(plan: Plan) -> dict[str, str]:
    """The settings that name the installed compiler and headers."""
    if not plan.archs:
        return {}
    jaxlib = package_folder("jaxlib", "include/xla/ffi/api/ffi.h", JAXLIB)
    nanobind = package_folder("nanobind", "cmake/nanobind-config.cmake", NANOBIND)
    settings = {
        "cmake.define.JAX_SAGE_JAXLIB_INCLUDE": str(jaxlib / "include"),
        "cmake.define.nanobind_DIR": str(nanobind / "cmake"),
    }
    if plan.nvcc is not None:
        return {**settings, "cmake.define.CMAKE_CUDA_COMPILER": plan.nvcc}
    toolkit = package_folder("nvidia.cu13", "bin/nvcc", PYPI_TOOLKIT)
    return {
        **settings,
        "cmake.define.CMAKE_CUDA_COMPILER": str(toolkit / "bin/nvcc"),
        # nvcc looks for the CUDA runtime in lib64; the packages have it in lib.
        "cmake.define.CMAKE_CUDA_FLAGS": f"-L{toolkit / 'lib'}",
    }


# The hooks. Settings that the caller gives win over the backend's. scikit-build-core is imported in
# them and not above: the decisions can be tested without it.


def get_requires_for_build_wheel(config_settings=None):
    from scikit_build_core import build

    plan = plan_build()
    print(plan, flush=True)
    requires = build.get_requires_for_build_wheel({**settings_for(plan), **(config_settings or {})})
    if plan.archs:
        requires += [JAXLIB, NANOBIND]
        if plan.nvcc is None:
            requires.append(PYPI_TOOLKIT)
    return requires


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    from scikit_build_core import build

    settings = {**settings_for(plan_build()), **(config_settings or {})}
    return build.prepare_metadata_for_build_wheel(metadata_directory, settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    from scikit_build_core import build

    plan = plan_build()
    print(plan, flush=True)
    settings = {**settings_for(plan), **tools_for(plan), **(config_settings or {})}
    return build.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    from scikit_build_core import build

    plan = plan_build()
    print(plan, flush=True)
    settings = {**settings_for(plan), **tools_for(plan), **(config_settings or {})}
    return build.build_editable(wheel_directory, settings, metadata_directory)


# An editable installation needs what a wheel needs, and says the same of itself.
get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    from scikit_build_core import build

    return build.get_requires_for_build_sdist(config_settings)


def build_sdist(sdist_directory, config_settings=None):
    from scikit_build_core import build

    return build.build_sdist(sdist_directory, config_settings)
