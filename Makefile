# make demo: set up, and run a small main job on a bundled model, at a size where one format for all layers shows; make test: the tests; make check: lint, format, types; make docs: the site;
# make fuzz: mutated inputs for everything that reads; make sanitize: the tests of the C++ kernels on a build of their own that finds reads and writes out of bounds and undefined behaviour (gcc); make arm: some of them
# built for ARM, under qemu.
# make gpu: on a machine with CUDA, the tests of the Triton kernels and what a GPU takes for kernels and whole models, in about ten minutes, into benchmarks/results/gpu.md; again: what is missing.
# On a machine where the default torch is not wanted: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL ?= fashion-unet
DEMO ?= demo
DEMO_OPTIONS ?= --bits 2.04 --space examples/demo.json --samples 0 --flips 0 --objective psnr --images 8 --front 1
JOBS ?= 2
TERRAIN := adaptive-terrain-diffusion==0.4.2
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
SANITIZED_TESTS ?= $(addprefix kernels/,backends/test_lut backends/test_decode backends/test_grouped backends/test_native_weights test_arranged test_fake_quant test_functions test_attention test_direct test_additive_search test_scalar_search)
BUILD_TOOLS ?= $(SANITIZED)/tools
PIP_FLAGS := --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test check docs sanitize arm fuzz gpu cuda clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/aquabit run $(MODEL) --out $(DEMO) $(DEMO_OPTIONS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Mutated inputs for everything that reads, CASES of each kind; what is not refused in a sentence, or is another number, is listed.
CASES ?= 10000
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/robustness.py --cases $(CASES)

# The site, in an environment of its own with what the extra `docs` names; the pages that follow from the program are in docs/ already.
DOCS_BIN := build/docs-venv/bin
docs:
	test -x $(DOCS_BIN)/sphinx-build || $(PYTHON) -m venv build/docs-venv
	$(DOCS_BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt $$($(DOCS_BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	$(DOCS_BIN)/sphinx-build --fail-on-warning --quiet --builder html -c docs . build/docs
	echo '<meta http-equiv="refresh" content="0; url=docs/index.html">' > build/docs/index.html

# A copy of the package around an extension of its own. Python runs without its site module, whose editable install would find the package
# here instead; sys.path is handed over by hand. Exceptions need libstdc++ loaded before the sanitizers' runtime looks for it.
sanitize: $(INSTALLED)
	test -d $(BUILD_TOOLS)/nanobind || $(BIN)/python -m pip install $(PIP_FLAGS) --target $(BUILD_TOOLS) cmake nanobind
	PYTHONPATH=$(BUILD_TOOLS) $(BIN)/python -m cmake -S . -B $(SANITIZED)/cmake -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DAQUABIT_OPTIMIZE=-O1 -DCMAKE_CXX_FLAGS="$(SANITIZERS)"
	PYTHONPATH=$(BUILD_TOOLS) $(BIN)/python -m cmake --build $(SANITIZED)/cmake --parallel 2
	rm -rf $(SANITIZED)/tree && mkdir $(SANITIZED)/tree
	cp -R aquabit tests pyproject.toml $(SANITIZED)/tree
	rm -f $(SANITIZED)/tree/aquabit/kernels/_native*
	cp $(SANITIZED)/cmake/_native* $(SANITIZED)/tree/aquabit/kernels
	paths=$$($(BIN)/python -c 'import sys; print(":".join(p for p in sys.path if p))') && cd $(SANITIZED)/tree && \
		PYTHONPATH=$$PWD:$$paths PYTHONDONTWRITEBYTECODE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		OMP_NUM_THREADS=1 AQUABIT_REQUIRE_NATIVE=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(abspath $(BIN)/python) -S -m pytest -p no:cacheprovider $(SANITIZED_TESTS:%=tests/%.py) $(PYTEST_ARGS)

# Tests, kernels and whole models on a GPU, each part with a time of its own. GPU_OPTIONS: --again. What the extra `cuda` brings is
# in the environment of `make test` already.
gpu: | cuda $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py all $(GPU_OPTIONS)

cuda:
	@command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | grep -q . || \
		{ echo "make gpu needs a CUDA device, and nvidia-smi finds none here" >&2; exit 1; }

arm: $(INSTALLED)
	PYTHON=$(abspath $(BIN)/python) .ci/arm

# Installed from the source tree, so Python files are seen at once; the extension is built again when one of its sources changes.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard $(addprefix aquabit/kernels/native/,*.cpp *.h */*.cpp */*.h))
	@echo "Installing aquabit and its dependencies into $(VENV) (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps $(TERRAIN) # without onnxruntime-gpu, which it asks for
	@touch $@

clean:
	rm -rf $(VENV) build dist
