PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
DEVICE_PYTHON ?= python3

.PHONY: env demo lint test test-slow device-check bench-device constraints clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs,test]'
	touch $@

demo: env
	$(BIN)/python -m clip_jax.main --config=configs/demo.py --workdir=runs/demo

# Formatting, lint and types; `$(BIN)/ruff format` and `$(BIN)/ruff check --fix` mend most of it.
lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Two processes; a file's tests stay together, for what they share, in the order of tests/conftest.py.
test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# With a user's compiler settings, where `make test` takes those that compile soonest (tests/conftest.py).
test-slow: env
	TESTS_COMPILER= $(BIN)/python -m pytest -m slow -n 2

# On a machine with a GPU. Any Python with jax, flax, optax, numpy and etils; installs nothing. The checks
# against the CPU, five minutes; then speeds, too, ten minutes: bench_device.json.
device-check:
	PYTHONPATH=. $(DEVICE_PYTHON) bench/bench_device.py --only=check: $(DEVICE_FLAGS)

bench-device:
	PYTHONPATH=. $(DEVICE_PYTHON) bench/bench_device.py $(DEVICE_FLAGS)

# The newest versions that pyproject.toml allows, from a fresh environment: 3 minutes. Use the oldest
# Python that is supported, because newer ones take packages that it cannot install (jax 0.11). If a
# step fails, constraints.txt stays as it was.
constraints:
	rm -rf build
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet '.[docs,s3,test]'
	build/constraints/bin/python -m pip freeze --exclude clip-jax-ood > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build

clean:
	rm -rf $(VENV) build *.egg-info
