"""The record of a GPU run: ``benchmarks/records/<device>.json``.

``python jax_sage/record.py status`` (any Python, nothing installed) says whether the records are of
the sources as they are: ``fresh``, or ``stale: <files>``. ``python -m jax_sage.record check`` runs
the GPU tests, the accuracy table, the short benchmark, that of masks and the image generator on
this machine's GPU and writes its record. Both run in the root of a checkout.
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from typing import Any

RECORDS = pathlib.Path("benchmarks/records")
# What decides what a GPU computes: the kernels and their handlers, and the lowering.
CUDA_SUFFIXES = (".cu", ".cuh", ".cc", ".h")
LOWERING = tuple(
    f"jax_sage/{name}.py"
    for name in (
        "arguments",
        "attention",
        "kernels",
        "lowering_cuda",
        "mask_operands",
        "masking",
        "primitive",
        "quantization",
        "recipe",
    )
)


def cuda_sources(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in (root / "cuda").rglob("*") if p.suffix in CUDA_SUFFIXES)


def file_hashes(root: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file that a record depends on, by path from the root."""
    files = cuda_sources(root) + [root / name for name in LOWERING]
    if not (root / "cuda").is_dir():
        raise SystemExit(f"{root.resolve()} is not a checkout of jax_sage: it has no cuda/.")
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def combined_hash(hashes: dict[str, str], prefix: str = "") -> str:
    """One hash of the files whose path starts with `prefix`."""
    lines = "".join(f"{n} {h}\n" for n, h in sorted(hashes.items()) if n.startswith(prefix))
    return hashlib.sha256(lines.encode()).hexdigest()


def status(root: pathlib.Path) -> str:
    """``fresh``, or ``stale: <files>`` with the files that no longer are what was recorded."""
    now = file_hashes(root)
    records = sorted((root / RECORDS).glob("*.json"))
    if not records:
        return f"stale: no record in {RECORDS}"
    stale: set[str] = set()
    for path in records:
        record = json.loads(path.read_text())
        then = record["sources"]
        stale |= {name for name in now.keys() | then.keys() if now.get(name) != then.get(name)}
        if record["tests"]["failed"]:
            stale.add(f"{path.relative_to(root)} (with failed tests)")
    return f"stale: {' '.join(sorted(stale))}" if stale else "fresh"


def check(root: pathlib.Path) -> pathlib.Path:
    """Runs everything on this machine's GPU and writes the record; raises if a test failed."""
    # Several processes share the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jaxlib

    import jax_sage
    from jax_sage import bench, bench_masks, kernels

    device = jax.local_devices()[0]
    module = kernels.module()
    if device.platform != "gpu":
        raise SystemExit(f"The default device is {device}; a record is of an NVIDIA GPU.")
    if module is None:
        raise SystemExit("jax_sage was built without CUDA; reinstall it with JAX_SAGE_CUDA=on.")
    hashes = file_hashes(root)
    if module.source_hash() != combined_hash(hashes, "cuda/"):
        raise SystemExit("The installed kernels were built from other sources; reinstall jax_sage.")
    installed = pathlib.Path(jax_sage.__file__).parent.parent
    for name in LOWERING:
        if (installed / name).read_bytes() != (root / name).read_bytes():
            raise SystemExit(f"The installed {name} is another than this checkout's; reinstall.")

    print(jax_sage.info(), flush=True)
    tests = run_tests(root, len(jax.local_devices()))
    print(tests, flush=True)
    record = {
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "versions": {
            "jax_sage": jax_sage.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "cuda": kernels.version_text(module.toolkit_version()),
            "driver": kernels.version_text(module.driver_version()),
            "python": sys.version.split()[0],
        },
        "source_hash": combined_hash(hashes),
        "sources": hashes,
        "tests": tests,
        "accuracy": bench.accuracy(),
        "speed": bench.speed(bench.SHORT),
        "masked_speed": bench_masks.masked_speed(bench_masks.SHAPE, print),
    }
    path = root / RECORDS / f"{device.device_kind.replace(' ', '-').lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Before the example too, in case it does not come to its end.
    path.write_text(json.dumps(record, indent=1) + "\n")
    record["image_generation"] = run_example(root)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(bench.table(record["speed"]))
    for row in record["masked_speed"]:
        print(f"{row['case']}: {row['milliseconds']} ms, {row['times_plain_speed']} x plain")
    print(f"wrote {path}: {tests}")
    if tests["failed"] or not tests["passed"]:
        raise SystemExit("GPU tests failed.")
    return path


def run_tests(root: pathlib.Path, gpus: int) -> dict[str, int]:
    """Runs the tests marked gpu; counts of passed, failed (errors included) and skipped."""
    # Most of the time goes to compilation. tests/conftest.py gives each process one of the GPUs.
    processes = min(16 * gpus, os.cpu_count() or 1)
    environment = {**os.environ, "JAX_SAGE_TEST_GPUS": str(gpus)}
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-P", "-m", "pytest", "tests", "-m", "gpu", "--durations=10"]
        subprocess.run(
            [*command, "-n", str(processes), "--dist=worksteal", f"--junitxml={report}"],
            cwd=root,
            env=environment,
            check=False,
        )
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest writes one testsuite"
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def run_example(root: pathlib.Path) -> dict[str, Any]:
    """Time and quality of a whole model: the figures of examples/image_generation.py."""
    with tempfile.TemporaryDirectory() as folder:
        figures = pathlib.Path(folder) / "figures.json"
        command = [sys.executable, "-P", str((root / "examples/image_generation.py").resolve())]
        subprocess.run([*command, "--json", str(figures)], cwd=folder, check=True)
        content = json.loads(figures.read_text())
    return {name: content[name] for name in ("config", "results")}


def main(argv: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(prog="jax_sage.record", description=__doc__)
    parser.add_argument("command", choices=("status", "check", "cuda-hash"))
    command = parser.parse_args(argv).command
    root = pathlib.Path.cwd()
    if command == "status":
        print(status(root))
    elif command == "cuda-hash":  # read by CMakeLists.txt, compiled into the module
        print(combined_hash(file_hashes(root), "cuda/"))
    else:
        check(root)


if __name__ == "__main__":
    main()
