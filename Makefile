# make demo: set up and run the main job on a bundled model; make test: the tests; make check: lint, format, types.
# On a machine where the default torch is not wanted: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL ?= digits-unet
DEMO ?= demo
JOBS ?= 2
PIP_FLAGS := --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/aquabit run $(MODEL) --out $(DEMO)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installed from the source tree, so Python files are seen at once; the extension is built again when one of its sources changes.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard aquabit/kernels/*.cpp aquabit/kernels/*.h)
	@echo "Installing aquabit and its dependencies into $(VENV) (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist
