"""Machine code of the mma.sync kernel for sm_89: the instructions that its speed rests on.

An RTX 4090 is not at hand, but its machine code is: either in the installed module or compiled
here, and read by a disassembler.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jax_sage import kernels

ROOT = Path(__file__).resolve().parent.parent
QK = "IMMA.16832.S8.S8"
PV = "QMMA.16832.F16.E4M3.E4M3"


def search_path() -> str:
    """PATH, and where PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put their programs."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations or []) if spec else []
    packages = [str(Path(place, "cu13/bin")) for place in places]
    return os.pathsep.join([os.environ.get("PATH", ""), *packages])


def machine_code(folder: Path) -> str:
    """cuobjdump's listing of the E4M3 kernels for sm_89."""
    path = search_path()
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump/-nvdisasm)")
    module = kernels.module()
    if module is not None and 89 in module.architectures():
        binary = module.__file__
    else:
        nvcc, source = shutil.which("nvcc"), ROOT / "cuda/mma/attention_fp8.cu"
        if nvcc is None:
            pytest.skip("the installed module has no sm_89, and there is no nvcc to compile it")
        if not source.exists():
            pytest.skip("the installed module has no sm_89, and its sources are not here")
        binary = str(folder / "attention_fp8.cubin")
        options = ["-std=c++17", "-O3", f"-I{ROOT / 'cuda'}", "-cubin"]
        target = ["-gencode", "arch=compute_89,code=sm_89"]
        subprocess.run([nvcc, *options, *target, "-o", binary, str(source)], check=True)
    return subprocess.run(
        [cuobjdump, "-sass", "-arch", "sm_89", binary],
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def parse(function: str) -> list[tuple[int, str, str]]:
    """(address, instruction with its modifiers, operands) in order."""
    line = re.compile(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE
    )
    return [(int(a, 16), name, rest) for a, name, rest in line.findall(function)]


@pytest.fixture(scope="module")
def sass(tmp_path_factory):
    """Instructions of the kernels with FP16 accumulators, by head dimension."""
    listing = machine_code(tmp_path_factory.mktemp("sass"))
    kernels_by_head_dim = {}
    for function in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]:
        name = function.split(maxsplit=1)[0]
        found = re.search(r"AttentionKernel.*PvFp8.*AccF16ELi(64|128)E", name)
        if found:
            kernels_by_head_dim[int(found[1])] = parse(function)
    assert set(kernels_by_head_dim) == {64, 128}
    return kernels_by_head_dim


def count(instructions, prefix: str) -> int:
    return sum(name == prefix or name.startswith(prefix + ".") for _, name, _ in instructions)


def inner_loop(instructions):
    """The smallest range that a branch goes back over and that holds every matrix instruction."""
    matrix = [address for address, name, _ in instructions if re.match(r"\w*MMA\b", name)]
    loops = []
    for address, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target and int(target[1], 16) <= matrix[0] and address >= matrix[-1]:
            loops.append((int(target[1], 16), address))
    assert loops, "no loop holds all matrix instructions"
    first, last = min(loops, key=lambda loop: loop[1] - loop[0])
    return [x for x in instructions if first <= x[0] <= last]


@pytest.mark.parametrize(
    ("head_dim", "qk", "pv"),
    # A warp has 32 queries, 2 fragments of 16, and per tile 64 keys.
    # QK^T: 64 / 8 fragments of keys, H / 32 instructions of 32 channels: 2 · 8 · H / 32.
    # PV: H / 8 fragments of channels and one of ones (the row sum), 64 / 32 instructions of 32
    # keys: 2 · (H / 8 + 1) · 2.
    [(64, 32, 36), (128, 64, 68)],
)
def test_matrix_instructions_of_the_inner_loop(sass, head_dim, qk, pv):
    loop = inner_loop(sass[head_dim])
    matrix = [name for _, name, _ in loop if re.match(r"\w*MMA\b", name)]
    assert {name: matrix.count(name) for name in set(matrix)} == {QK: qk, PV: pv}


@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_local_memory(sass, head_dim):
    """Registers suffice: nothing is spilled and no array is indexed at run time."""
    assert len(sass[head_dim]) > 1000
    for instruction in ("LDL", "STL"):
        assert count(sass[head_dim], instruction) == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_inner_loop_loads_ahead(sass, head_dim):
    """K and V come by cp.async, and fragments by ldmatrix: for K and V, H / 32 · 4 and H / 16 · 2
    loads of 4 fragments; Q, kept in shared memory, another H / 32 · 2. No other loads from global
    memory."""
    loop = inner_loop(sass[head_dim])
    assert count(loop, "LDGSTS") > 0
    assert count(loop, "LDSM") == head_dim // 32 * 4 + head_dim // 16 * 2 + head_dim // 32 * 2
    assert count(loop, "LDG") == 0
