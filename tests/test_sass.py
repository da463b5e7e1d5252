"""Machine code of the kernels, for GPUs that are not at hand: what their speed rests on.

It is read from the installed module, or compiled here where that has not the architecture.
"""

import functools
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


def compile_kernels(source: Path, arch: str, binary: Path) -> str:
    """What the compiler has to say."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc on PATH")
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'cuda'}", "-cubin", *target]
    result = subprocess.run(
        [*command, "-o", str(binary), str(source)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def mma_binaries(tmp_path_factory):
    """Files that together have cuda/mma's kernels for an architecture."""

    @functools.cache
    def find(arch: int) -> list[Path]:
        module = kernels.module()
        if module is not None and arch in module.architectures():
            return [Path(module.__file__)]
        binaries = []
        for source in sorted((ROOT / "cuda/mma").glob("*.cu")):
            if "fp8" in source.name and arch < 89:
                continue  # has no such instructions
            binaries.append(tmp_path_factory.mktemp("mma") / source.with_suffix(".cubin").name)
            compile_kernels(source, str(arch), binaries[-1])
        if not binaries:
            pytest.skip(f"the installed module has no sm_{arch}, and its sources are not here")
        return binaries

    return find


def cuobjdump(what: str, arch: str, binary: Path) -> list[tuple[str, str]]:
    """(function, text about it) for each function of a binary."""
    path = search_path()
    program = shutil.which("cuobjdump", path=path)
    if program is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump/-nvdisasm)")
    text = subprocess.run(
        [program, what, "-arch", f"sm_{arch}", str(binary)],
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    functions = re.split(r"^\s*Function\s*:?\s+", text, flags=re.MULTILINE)[1:]
    return [(re.match(r"\w+", function)[0], function) for function in functions]


def local_memory(arch: str, binary: Path) -> dict[str, tuple[int, int]]:
    """Bytes of (stack, local memory) of each function: more than 0 if registers did not suffice,
    or an array is indexed at run time."""
    return {
        name: tuple(int(x) for x in re.search(r"STACK:(\d+) .*LOCAL:(\d+)", text).groups())
        for name, text in cuobjdump("-res-usage", arch, binary)
    }


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_kernels_on_mma_sync_keep_to_registers(mma_binaries, arch):
    used = {}
    for binary in mma_binaries(arch):
        used |= local_memory(str(arch), binary)
    used = {name: memory for name, memory in used.items() if name.startswith("_ZN8jax_sage3mma")}
    # FP16 or E4M3, FP16 or FP32 sums, two head dimensions; plain, with masks, with a bias.
    assert len(used) == (24 if arch >= 89 else 12)
    for name, memory in used.items():
        # No named recipe runs E4M3 with FP32 sums, or E4M3 on mma.sync on a Hopper GPU.
        # (plain and in four warps; its variants with masks have eight).
        if "PvFp8" not in name or "ELi8E" in name or ("AccF32" not in name and arch != 90):
            assert memory == (0, 0), name


@pytest.mark.parametrize("source", sorted((ROOT / "cuda/sm90").glob("*.cu")), ids=lambda p: p.name)
def test_kernels_on_wgmma_keep_to_registers_and_stay_asynchronous(source, tmp_path):
    """ptxas says so (C7510 to C7519) where it waits for each wgmma in turn."""
    binary = tmp_path / "kernels.cubin"
    messages = compile_kernels(source, "90a", binary)
    assert re.findall(r"\(C75\d\d\).*", messages) == []
    functions = dict(cuobjdump("-sass", "90a", binary))
    used = local_memory("90a", binary)
    assert used
    for name, memory in used.items():
        # The producer plans with a mask or scattered segments, and may have a few registers too
        # few; consumers not in their loop, but where a bias is with FP32 sums.
        biased = "MaskingE1" in name or "MaskingE3" in name
        masked = not re.search("MaskingE[04]", name)  # 4: by the intervals of segments
        biased_fp16 = biased and "PvFp16" in name
        if biased_fp16 and "ILi256E" in name:
            assert sum(memory) <= 160, name
            continue
        assert sum(memory) <= (48 if masked else 0), name
        instructions = parse(functions[name])
        # A CTA may start before the quantization has ended: it reads nothing before it has waited.
        first = [x[1] for x in instructions].index("ACQBULK")
        assert not [x for x in instructions[:first] if re.match("LDG|UTMALDG|UBLKCP", x[1])], name
        loop = matrix_range(instructions)
        # Descriptors of K stay in uniform registers: where they were moved there, 5 to 14 times,
        # masks took a tenth longer. With FP32 sums there is one such move.
        qk = [i for i, x in enumerate(loop) if x[1].startswith("IGMMA")]
        between = [x[1] for x in loop[qk[0] : qk[-1]]]
        assert between.count("R2UR") <= 1, name
        assert biased_fp16 or not [x for x in loop if x[1].startswith(("LDL", "STL"))], name


def policies_of_copies(functions: list[tuple[str, str]]) -> set[int]:
    """Numbers of the uniform registers that the quantization's copies have their policy in.

    ptxas 13.0 has put it in UR1, behind an address in UR0: not an even one, an illegal instruction.
    """
    found: set[int] = set()
    for name, text in functions:
        if "quantize" in name:
            found |= {int(x) for x in re.findall(r"LDGSTS\S* [^;]*?desc\[UR(\d+)\]", text)}
    return found


def test_quantization_is_legal_code(tmp_path):
    """For Hopper; with segments, below, for an A100 too."""
    module = kernels.module()
    if module is not None and 90 in module.architectures():
        binary = Path(module.__file__)
    else:
        binary = tmp_path / "kernels.cubin"
        compile_kernels(ROOT / "cuda/quantize/quantize.cu", "90", binary)
    functions = cuobjdump("-sass", "90", binary)
    policies = policies_of_copies(functions)
    assert policies
    assert all(register % 2 == 0 for register in policies)
    # It lets the attention's CTAs start while the last of its own run.
    plain = [text for name, text in functions if "8Quantize" in name]
    assert plain
    assert all("PREEXIT" in text for text in plain)


@pytest.mark.parametrize("arch", ["80", "90"])
def test_quantization_of_segments_keeps_to_registers(arch, tmp_path):
    binary = tmp_path / "kernels.cubin"
    compile_kernels(ROOT / "cuda/quantize/segments.cu", arch, binary)
    assert all(x % 2 == 0 for x in policies_of_copies(cuobjdump("-sass", arch, binary)))
    used = local_memory(arch, binary)
    # Slots; V's channels for each head dimension; the rest for each dtype too, aligned or not.
    assert len(used) == 1 + 3 + 2 * 3 * 3
    for name, memory in used.items():
        # A few more registers would cost a third of the CTAs that fit on an SM (of 512 threads
        # there is one anyway, with 128 registers a thread at most), and 14 % of the speed, more
        # than what is spilled: 64 bytes for 16-bit inputs, beside the frames of what is rare, in
        # functions of its own.
        assert sum(memory) <= 128, name


def matrix_range(instructions):
    """From the first matrix instruction to the last."""
    matrix = [i for i, (_, name, _) in enumerate(instructions) if re.match(r"\w*MMA\b", name)]
    return instructions[matrix[0] : matrix[-1]]


def parse(function: str) -> list[tuple[int, str, str]]:
    """(address, instruction with its modifiers, operands) in order."""
    line = re.compile(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE
    )
    return [(int(a, 16), name, rest) for a, name, rest in line.findall(function)]


@pytest.fixture(scope="module")
def sass(mma_binaries):
    """Instructions of recipe 8+8's kernels for an RTX 4090, by head dimension."""
    kernels_by_head_dim = {}
    for binary in mma_binaries(89):
        for name, text in cuobjdump("-sass", "89", binary):
            found = re.search(r"AttentionKernel.*PvFp8.*AccF16ELi(64|128)ELi4E", name)
            if found:
                kernels_by_head_dim[int(found[1])] = parse(text)
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
def test_inner_loop_loads_ahead(sass, head_dim):
    """K and V come by cp.async, and fragments by ldmatrix: for K and V, H / 32 · 4 and H / 16 · 2
    loads of 4 fragments; Q, kept in shared memory, another H / 32 · 2. No other loads from global
    memory."""
    loop = inner_loop(sass[head_dim])
    assert count(loop, "LDGSTS") > 0
    assert count(loop, "LDSM") == head_dim // 32 * 4 + head_dim // 16 * 2 + head_dim // 32 * 2
    assert count(loop, "LDG") == 0
