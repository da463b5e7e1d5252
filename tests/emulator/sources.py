"""Builds the kernels and their FFI handlers for the CPU, from their own sources and emulator.h.

What is not C++ is put otherwise: launches, shared memory of dynamic size, functions of PTX.

    python tests/emulator/sources.py NVCC LIBRARY

takes CUDA's headers from where nvcc does, and compiles with g++.
"""

import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jaxlib

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "cuda"

_FUNCTION = re.compile(
    r"(?P<head>^(?:template <(?P<template>[^>]*)>\n)?"
    r"__device__ __forceinline__ [^(;]*?(?P<name>\w+)\((?P<params>[^{;]*)\) \{)"
    r"(?:\n(?P<body>.*?)^| (?P<line>[^\n]*) )\}\n",
    re.DOTALL | re.MULTILINE,
)


def _names(declarations: str) -> list[str]:
    """Of parameters: the last name in each, or that of a reference to an array."""
    parts = re.split(r",(?![^()]*\))", declarations)
    found = [re.search(r"\(&(\w+)\)|(\w+)$", part.strip()) for part in parts if part]
    return [name[1] or name[2] for name in found]


def _forward(function: re.Match) -> str:
    """Calls the emulator's function in place of PTX."""
    if "asm" not in (function["body"] or function["line"] or ""):
        return function[0]
    explicit = f"<{', '.join(_names(function['template']))}>" if function["template"] else ""
    arguments = ", ".join(_names(function["params"]))
    call = f"emulator::{function['name']}{explicit}({arguments})"
    return f"{function['head']}\n  return {call};\n}}\n"


def translate(path: Path) -> str:
    source = path.read_text()
    source = re.sub(r'asm volatile\(\s*""[^;]*;', ";", source)  # says something to the compiler
    source = source.replace("__noinline__ ", "")  # of a GPU's registers
    source = _FUNCTION.sub(_forward, source)
    if "asm" in re.sub(r"//.*", "", source):
        sys.exit(
            f"{path} has PTX outside of a function of its own, as those of cuda/common/ptx.cuh"
        )
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulator::shared_memory);",
        source,
    )
    source = re.sub(
        r"([\w:]+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\(",
        r"emulator::Launch(\1, \2, ",
        source,
        flags=re.DOTALL,
    )
    return source.replace(
        '#include "xla/ffi/api/ffi.h"', '#include "xla/ffi/api/ffi.h"\n#include "stream.h"'
    )


def poison_results(source: str) -> str:
    """Of ffi.cc: results are NaN when a handler begins, or -1."""
    for place, buffers in (
        ("    results.push_back(Describe(out.back()));\n", ["out.back()"]),
        ("  AttentionParams params{};\n", ["(*out)", "(*lse)"]),
        ("  PackParams params{};\n", ["(*words)", "(*views)"]),
        ("  SeenParams params{};\n", ["(*seen)"]),
        (
            "  IntervalParams params{};\n",
            ["(*rows)", "(*groups)", "(*seen)", "(*per_counted_key)"],
        ),
        (
            "  SortParams params{};\n",
            [
                "(*sorted_ids)",
                "(*order)",
                "(*slots)",
                "(*scattered)",
                "(*group_ranges)",
                "(*tile_ranges)",
            ],
        ),
    ):
        assert source.count(place) == 1, place
        poison = "".join(
            f"emulator::Poison({x}.untyped_data(), {x}.size_bytes(), 0xff);" for x in buffers
        )
        source = source.replace(place, f"{place}{poison}\n")
    return source


def toolkit_headers(nvcc: str) -> list[str]:
    """The folders that nvcc takes its headers from."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True).stderr
    folders = re.findall(r'^#\$ (?:SYSTEM_)?INCLUDES=.*?(/[^"\s]+)', text, re.MULTILINE)
    if not folders:
        sys.exit(f"`{' '.join(command)}` names no folder of headers")
    return folders


def build(library: Path, headers: list[str]) -> None:
    """Makes the shared library with the handlers of cuda/ffi.h."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-Wno-psabi", "-ffp-contract=off"]
    # As nvcc has it: the kernels read one type as another.
    flags += ["-fno-strict-aliasing", "-DJAX_SAGE_SM90"]
    # longjmp goes from stack to stack, which its checks take for an error.
    flags += ["-U_FORTIFY_SOURCE"]
    for folder in (*headers, str(Path(jaxlib.__file__).parent / "include")):
        flags += ["-isystem", folder]

    def compile(path: Path) -> Path:
        target = path.with_suffix(f"{path.suffix}.o")
        includes = [f"-I{HERE}", f"-I{sources}", "-include", "emulator.h"]
        language = ["-x", "c++"]
        if path.name == "emulator.cc":  # most of the time is spent there
            language += ["-O3"]
        subprocess.run(["g++", *flags, *includes, *language, "-c", path, "-o", target], check=True)
        return target

    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder)
        for path in CUDA.rglob("*"):
            if path.suffix in (".cu", ".cuh", ".h", ".cc"):
                to = sources / path.relative_to(CUDA)
                to.parent.mkdir(exist_ok=True)
                source = translate(path)
                to.write_text(poison_results(source) if path.name == "ffi.cc" else source)
        files = [*sources.rglob("*.cu"), sources / "ffi.cc", sources / "checks.cc"]
        (sources / "emulator.cc").write_text((HERE / "emulator.cc").read_text())
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile, [*files, sources / "emulator.cc"]))
        # Its calls of the CUDA runtime are its own, whatever else the process has.
        subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", library], check=True)


if __name__ == "__main__":
    nvcc, library = sys.argv[1:]
    build(Path(library), toolkit_headers(nvcc))
