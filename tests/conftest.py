import os

import pytest

# Subprocesses of the GPU tests share the GPU with this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
pytest.register_assert_rewrite("reference", "suite")
