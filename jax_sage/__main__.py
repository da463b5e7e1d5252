"""``python -m jax_sage``: prints :func:`jax_sage.info`."""

from jax_sage.info import EXPECTED_ERROR, info

if __name__ == "__main__":
    report = info()
    print(report)
    if any(report.errors[name] > bound for name, bound in EXPECTED_ERROR.items()):
        raise SystemExit("The self-check found errors larger than quantization explains.")
