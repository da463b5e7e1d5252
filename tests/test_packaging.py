"""The build backend's decisions, its sdist and wheel, and the installed compiled module."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import spread_over_gpus

ROOT = Path(__file__).resolve().parent.parent
ALL = (80, 86, 89, 90, 120)
NVCC = "/toolkit/bin/nvcc"


@pytest.fixture
def backend(monkeypatch):
    """The build backend, away from this machine's environment variables."""
    names = ("JAX_SAGE_CUDA", "JAX_SAGE_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "cuda/build_backend.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_backend", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(backend, monkeypatch):
    """Sets what the backend finds on the machine; by default a bare one that can compile."""

    def set_up(nvcc=None, version=(13, 0), driver=None, gpus=(), obstacle=None, **env):
        monkeypatch.setattr(backend, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(backend, "nvcc_version", lambda _: version)
        monkeypatch.setattr(backend, "driver_cuda", lambda: driver)
        monkeypatch.setattr(backend, "gpu_archs", lambda: gpus)
        monkeypatch.setattr(backend, "obstacle_to_compiling", lambda: obstacle)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return backend

    return set_up


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({}, "no nvcc on the machine, and there is no NVIDIA driver"),
        ({"JAX_SAGE_CUDA": "auto"}, "no nvcc"),
        ({"JAX_SAGE_CUDA": "off", "nvcc": NVCC, "driver": 13000}, "JAX_SAGE_CUDA=off"),
        ({"driver": 12080}, "supports CUDA 12.8"),
        ({"nvcc": NVCC, "version": (12, 4)}, "is of CUDA 12.4, and 12.8 or later is needed"),
        ({"nvcc": NVCC, "obstacle": "there is no C++ compiler"}, "no C\\+\\+ compiler"),
        ({"driver": 13000, "gpus": (75,)}, "compute capability is 75, .* for 80, 86"),
    ],
)
def test_portable_build(machine, found, reason):
    plan = machine(**found).plan_build()
    assert plan.archs == ()
    assert re.search(reason, str(plan))
    assert "portable build" in str(plan)


@pytest.mark.parametrize(
    ("found", "nvcc", "archs"),
    [
        ({"nvcc": NVCC}, NVCC, ALL),
        ({"nvcc": NVCC, "version": (12, 8)}, NVCC, ALL),
        ({"nvcc": NVCC, "gpus": (90,)}, NVCC, (90,)),
        ({"nvcc": NVCC, "gpus": (75, 87, 121)}, NVCC, (86, 120)),
        ({"nvcc": NVCC, "gpus": (90,), "JAX_SAGE_CUDA_ARCHS": "120; 80"}, NVCC, (80, 120)),
        ({"driver": 13000}, None, ALL),
        ({"driver": 13020, "gpus": (89,)}, None, (89,)),
        ({"driver": 13000, "nvcc": NVCC, "version": (12, 4)}, None, ALL),
        ({"JAX_SAGE_CUDA": "on"}, None, ALL),
        ({"JAX_SAGE_CUDA": "on", "driver": 12080, "gpus": (75,)}, None, ALL),
    ],
)
def test_cuda_build(machine, found, nvcc, archs):
    plan = machine(**found).plan_build()
    assert (plan.nvcc, plan.archs) == (nvcc, archs)
    assert ("PyPI" in str(plan)) == (nvcc is None)
    assert "CUDA build" in str(plan)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"JAX_SAGE_CUDA": "yes"}, "auto, on or off"),
        ({"JAX_SAGE_CUDA_ARCHS": "80;75"}, "'75'.*any of 80;86;89;90;120"),
        ({"JAX_SAGE_CUDA_ARCHS": "sm_90"}, "'sm_90'.*any of 80;86;89;90;120"),
        ({"JAX_SAGE_CUDA": "on", "obstacle": "there is no C++ compiler"}, "no C\\+\\+ compiler"),
        ({"nvcc": NVCC, "version": (12, 4), "CUDACXX": NVCC}, "12.4.*newer"),
    ],
)
def test_build_error(machine, found, message):
    backend = machine(**found)
    with pytest.raises(backend.BuildError, match=message):
        backend.plan_build()


def test_requirements_follow_the_plan(machine):
    def requires(**found):
        names = machine(**found).get_requires_for_build_wheel()
        return {re.split(r"[^\w-]", name)[0] for name in names} - {"cmake", "ninja"}

    assert requires() == set()
    assert requires(nvcc=NVCC) == {"jaxlib", "nanobind"}
    assert requires(driver=13000) == {"jaxlib", "nanobind", "cuda-toolkit"}


def write_program(path, output):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return str(path)


def test_gpus_are_those_that_nvidia_smi_lists(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.gpu_archs() == ()
    nvidia_smi = tmp_path / "nvidia-smi"
    write_program(nvidia_smi, "12.1\n9.0\n9.0")
    assert backend.gpu_archs() == (90, 121)
    write_program(nvidia_smi, "NVIDIA-SMI has failed because it could not communicate")
    assert backend.gpu_archs() == ()


def test_nvcc_is_looked_for_in_order(backend, monkeypatch, tmp_path):
    def program(folder):
        output = "Cuda compilation tools, release 12.9, V12.9.86"
        return write_program(tmp_path / folder / "nvcc", output)

    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert backend.find_nvcc() is None
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        nvcc = program(f"{variable}/bin")
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert backend.find_nvcc() == nvcc
    nvcc = program("path")
    assert backend.find_nvcc() == nvcc
    nvcc = program("chosen")
    monkeypatch.setenv("CUDACXX", nvcc)
    assert backend.find_nvcc() == nvcc
    assert backend.nvcc_version(nvcc) == (12, 9)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "absent"))
    with pytest.raises(backend.BuildError, match="CUDACXX=.*absent"):
        backend.find_nvcc()


def test_headers_are_those_of_the_oldest_supported_jaxlib(backend):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = next(d.split(">=")[1] for d in project["dependencies"] if d.startswith("jax>="))
    assert backend.JAXLIB == f"jaxlib=={oldest}.0"


def files_of(folder):
    """The relative names of a folder's files, as a clean checkout has them."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize(
    ("given", "worker", "expected"),
    [
        ({}, "gw1", {}),
        ({"JAX_SAGE_TEST_GPUS": "1"}, "gw1", {}),
        ({"JAX_SAGE_TEST_GPUS": "2"}, "gw3", {"CUDA_VISIBLE_DEVICES": "1"}),
        (
            {"JAX_SAGE_TEST_GPUS": "2", "CUDA_VISIBLE_DEVICES": "4,6"},
            "gw2",
            {"CUDA_VISIBLE_DEVICES": "4"},
        ),
    ],
)
def test_processes_of_gpu_tests_take_the_gpus_by_turns(given, worker, expected):
    environ = {**given, "PYTEST_XDIST_WORKER": worker}
    spread_over_gpus(environ)
    assert environ == {**expected, "PYTEST_XDIST_WORKER": worker}
    spread_over_gpus(environ)  # a process of the process
    assert environ == {**expected, "PYTEST_XDIST_WORKER": worker}
    controller = dict(given)
    spread_over_gpus(controller)
    assert controller == given


def test_wheel_from_sdist(tmp_path):
    """The sdist holds what a build needs, and the wheel made of it the package and nothing else."""
    hook = "import build_backend, sys; print(build_backend.{}(sys.argv[1]))"
    env = {**os.environ, "JAX_SAGE_CUDA": "off", "PYTHONPATH": "cuda"}

    def run(name, source):
        command = [sys.executable, "-c", hook.format(name), str(tmp_path)]
        built = subprocess.run(command, cwd=source, env=env, check=True, stdout=subprocess.PIPE)
        return tmp_path / built.stdout.decode().split()[-1]

    with tarfile.open(run("build_sdist", ROOT)) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("jax_sage-*/")
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"}
    needed |= files_of("cuda") | files_of("jax_sage")
    assert {name for name in needed if not (source / name).exists()} == set()

    path = run("build_wheel", source)
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        fields = email.message_from_bytes(wheel.read(metadata))
    assert names == files_of("jax_sage")
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"


# The installed package.


def installed_wheel():
    distribution = importlib.metadata.distribution("jax_sage")
    return email.message_from_string(distribution.read_text("WHEEL"))


@pytest.fixture
def cuda_module():
    if installed_wheel()["Root-Is-Purelib"] == "true":
        pytest.skip("jax_sage is installed without CUDA kernels")
    return importlib.import_module("jax_sage._cuda")


def test_module_needs_nothing_of_cuda(cuda_module):
    from elftools.elf.elffile import ELFFile

    with open(cuda_module.__file__, "rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
    assert "libc.so.6" in needed
    assert {name for name in needed if re.match(r"lib(cu|nv)", name)} == set()


def test_module_says_what_it_was_built_for(cuda_module, backend):
    assert set(cuda_module.architectures()) <= set(backend.SUPPORTED_ARCHS)
    assert cuda_module.toolkit_version() >= 12080
    places = importlib.util.find_spec("nvidia")
    tools = [Path(place, "cu13/bin/cuobjdump") for place in places.submodule_search_locations]
    tool = next((tool for tool in tools if tool.exists()), None)
    if tool is None:
        pytest.skip("nvidia-cuda-cuobjdump is not installed (extra dev)")
    command = [str(tool), "--list-elf", cuda_module.__file__]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    compiled = {int(arch) for arch in re.findall(r"\.sm_(\d+)a?\.cubin", listing)}
    assert compiled == set(cuda_module.architectures())


def test_module_has_the_custom_calls(cuda_module):
    calls = ("quantize", "attention", "pack_mask", "seen_keys", "intervals", "sort_ids")
    assert set(cuda_module.ffi_targets()) == {f"jax_sage_{call}" for call in calls}
