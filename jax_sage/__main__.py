"""Says what would run here, versions and devices included, and whether the numbers are right."""

import argparse

from jax_sage.info import EXPECTED_ERROR, info

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m jax_sage", description=__doc__).parse_args()
    report = info()
    print(report)
    if any(report.errors[name] > bound for name, bound in EXPECTED_ERROR.items()):
        raise SystemExit("The self-check found errors larger than quantization explains.")
