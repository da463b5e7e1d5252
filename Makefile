# make test        lint and every test that needs no GPU; with nvcc also those of the kernels that the CPU can run
# make test-models the same on models of other packages, which are 3 GB (TensorFlow among them)
# make demo        trains the example language model
# make gpu-check   on a machine with an NVIDIA GPU: the GPU's tests, then the record of its results
# make gpu-status  says whether the record is of the sources as they are: fresh, or stale
#
# PYTHON=...       makes .venv with this Python; otherwise the newest found, 3.11 at least
# PYTHON_ENV=...   a python that has jax_sage, its test and example requirements and JAX for CUDA:
#                  gpu-check runs with it and installs nothing

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# .venv has the package in editable form: a change to its Python files needs no installation, which
# would compile every kernel again. scikit-build-core's import hook finds those files and the compiled
# module together. That the wheel holds all of them is a test (tests/test_packaging.py).
# Where the package is installed for good (PYTHON_ENV), the current folder must not be on sys.path:
# it has a jax_sage/ without the compiled module.
export PYTHONSAFEPATH := 1

.PHONY: test test-models lint demo gpu-check gpu-status have-gpu

NVCC := $(shell $(PYTHON) -c 'import sys; sys.path.insert(0, "cuda"); import build_backend; \
  print(build_backend.machine_nvcc()[0] or "")')
SOURCES := pyproject.toml CMakeLists.txt $(shell find cuda -type f -not -path '*/__pycache__/*')
JAX_FOR_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 'jax[cuda13]')

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later was found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "make: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; exit 1; }

# A stamp is younger than everything that its installation was made of.
.venv/test.stamp: EXTRAS = dev,examples
.venv/demo.stamp: EXTRAS = examples
.venv/%.stamp: .venv/bin/python $(SOURCES)
	@echo "Installing .[$(EXTRAS)] $(JAX_FOR_GPU) into .venv (log: .venv/install.log)"
	@.venv/bin/python -m pip install -v -e '.[$(EXTRAS)]' $(JAX_FOR_GPU) >.venv/install.log 2>&1 \
	  || { cat .venv/install.log; exit 1; }
	@grep -m 1 'jax_sage: .* build' .venv/install.log
	@touch $@

# The kernels, built for the CPU. Of nvcc the headers are needed.
.venv/emulated.so: .venv/test.stamp $(wildcard tests/emulator/*.*)
	.venv/bin/python tests/emulator/sources.py "$(NVCC)" $@

lint: .venv/test.stamp
	.venv/bin/python -m ruff check
	.venv/bin/python -m mypy

test: lint $(if $(NVCC),.venv/emulated.so)
	@set -- $$(.venv/bin/python jax_sage/record.py status); test "$$1" = fresh || \
	  echo "warning: the GPU record is $$(echo $$1 $$2 $$3 $$4 $$5)$${6:+ and $$(($$# - 5)) more}; renew it by make gpu-check on a machine with a GPU"
	.venv/bin/python -m pytest tests -m "not gpu" -n 2
ifeq ($(NVCC),)
	@echo "make: there is no nvcc, so the kernels were not run on the CPU"
else
	JAX_SAGE_EMULATED=$(CURDIR)/.venv/emulated.so .venv/bin/python -m pytest tests -m "gpu and not not_emulated" -n 2 -k "not TestMasksOnMmaSync"
# Masks on a GPU that is no Hopper, which has the kernels on mma.sync alone.
	JAX_SAGE_EMULATED=$(CURDIR)/.venv/emulated.so JAX_SAGE_EMULATED_CAPABILITY=89 \
	  .venv/bin/python -m pytest tests -m "gpu and not not_emulated" -n 2 -k "TestMasksOnGpu or test_near_portable_on"
endif

# The requirements of an extra alone: to install the package with it would compile every kernel again.
EXTRA = import sys, tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
.venv/models.installed: .venv/test.stamp
	@echo "Installing other packages' models into .venv"
	@.venv/bin/python -c '$(EXTRA)' models | .venv/bin/python -m pip install -q -r /dev/stdin
	@touch $@

test-models: .venv/models.installed
	.venv/bin/python -m pytest tests/test_other_models.py -n 2

demo: .venv/demo.stamp
	.venv/bin/python examples/language_model.py

have-gpu:
	@nvidia-smi -L || { echo "make: gpu-check needs an NVIDIA GPU, and nvidia-smi shows none" >&2; exit 1; }

gpu-check: have-gpu $(if $(PYTHON_ENV),,.venv/test.stamp)
	$(or $(PYTHON_ENV),.venv/bin/python) -m jax_sage.record check

gpu-status:
	@$(PYTHON) jax_sage/record.py status
