"""``python -m jax_sage``: prints :func:`jax_sage.info`."""

from jax_sage.info import info

if __name__ == "__main__":
    print(info())
