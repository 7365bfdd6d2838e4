# make test        test suite without a GPU: first all CPU tests, then the Triton kernels in Triton's interpreter;
#                  both parts always run, and the target fails if either fails
# make demo        train a small model on photographs, fused and eager -> out/demo/report.png, report.json
# make bench       CPU benchmark table
# make test-long   tests marked long
# make test-timing tests that assert times; they need a machine without other load
# make aot-all     compile every Triton and CUDA kernel for every width, dtype and architecture, and check budgets
# make gpu-check   checks that need a GPU, with the system's Python and without network -> out/gpu-check
# make env-gpu     Python 3.12, PyTorch 2.11 and Triton 3.6 -> .venv-gpu (about 3 GB to download)
# make test-gpu-env tests of the ops and backends in .venv-gpu
# make lint        style and type checks
# make docs        pages, API reference and results as HTML -> out/docs/index.html; fails on broken links
# make wheels      source distribution and a checked wheel per CPython of this machine -> out/wheels
# make aarch64     CPU module for 64-bit Arm, cross-compiled and run under qemu (Debian, as root)
# make sanitize    CPU module and emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, threads of
#                  the CPU module under ThreadSanitizer, on a short list of cases
#
# The other targets than gpu-check and those of .venv-gpu create and use .venv. Each installs the pinned packages that
# it needs (requirements/) if they are missing or a pin has changed; demo, bench and lint need few, the others all.
# PYTHON=/path/to/python3 selects the interpreter (3.10 or later), ARGS="..." adds arguments:
# make test ARGS="-k pixel_decoder", make demo ARGS=--short, make bench ARGS="pixel_decoder --quick".

VENV := .venv
RUN  := $(VENV)/bin/python

# First Python on PATH that is new enough and can create virtual environments.
USABLE := import sys, venv, ensurepip; assert sys.version_info >= (3, 10)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
            $$p -c '$(USABLE)' 2>/dev/null && { echo $$p; break; }; done)

# Interpreter for gpu-check; it must have PyTorch.
GPU_PYTHON ?= python3

# Environment of env-gpu, and the Python that it is created with.
GPU_VENV       := .venv-gpu
GPU_ENV_PYTHON ?= python3.12

# Two processes share the tests; they and their children use one thread unless a test sets another number. Threads that
# wait sleep, since there can be more of them than cores.
PYTEST    := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest -q -n 2 --dist worksteal --durations=25
# Exit status of pytest if ARGS selects no test.
NO_TESTS  := 5
LEFT_OUT  := not gpu and not long and not timing and not aot_all and not sanitize and not aarch64

NATIVE_SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: env-gpu test-gpu-env test sanitize test-long test-timing aot-all demo bench gpu-check lint docs wheels aarch64 env env-demo \
        clean
.DELETE_ON_ERROR:

test: env
	@status=0; \
	$(PYTEST) -m "$(LEFT_OUT)" $(ARGS) || status=$$?; \
	TRITON_INTERPRET=1 $(PYTEST) -m "interpret and $(LEFT_OUT)" $(ARGS) || test $$? -eq $(NO_TESTS) || status=1; \
	exit $$status

test-long: env
	$(RUN) -m pytest -q -m "long and not gpu" $(ARGS)

test-timing: env
	$(RUN) -m pytest -q -m timing $(ARGS)

sanitize: env
	$(RUN) -m pytest -q -m sanitize tests/sanitize $(ARGS)

aarch64: env
	$(RUN) -m pytest -q -m aarch64 tests/aarch64 $(ARGS)

# The tests compile all CUDA kernels.
aot-all: env
	@status=0; \
	$(PYTEST) -m aot_all || status=$$?; \
	$(RUN) -m benchmarks static --everywhere --backend triton $(ARGS) || status=$$?; \
	exit $$status

demo: env-demo
	$(RUN) python/demo.py $(ARGS)

bench: $(if $(filter static training,$(ARGS)),env,$(VENV)/.native)
	$(RUN) -m benchmarks $(ARGS)

lint: $(VENV)/.demo-installed $(VENV)/.lint-installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	git ls-files '*.c' '*.cpp' '*.cu' '*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(RUN) -m mypy

docs: env $(VENV)/.docs-installed
	$(RUN) -m sphinx -q -W --keep-going -c docs . out/docs $(ARGS)

wheels: $(VENV)/.demo-installed $(VENV)/.wheels-installed
	$(RUN) -m wheels $(ARGS)

gpu-check:
	@$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

env-gpu: $(GPU_VENV)/.installed

$(GPU_VENV)/.installed: requirements/gpu.txt
	$(GPU_ENV_PYTHON) -m venv --clear $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install -r $<
	@touch $@

test-gpu-env: env-gpu
	DECO_KERNELS_BUILD=cpu $(GPU_VENV)/bin/python setup.py build_ext --inplace
	@$(MAKE) -o env test RUN=$(GPU_VENV)/bin/python ARGS="tests/ops tests/backends $(ARGS)"

env: env-demo $(VENV)/.triton-installed $(VENV)/.evaluation-installed

env-demo: $(VENV)/.native $(VENV)/.photographs-installed

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.10 with venv on PATH; install one (on Debian and Ubuntu" \
	  "also python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(USABLE)' || { echo "make: PYTHON=$(PYTHON) must be Python >= 3.10 with venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Installed without dependencies.
ALONE := photographs triton evaluation

$(VENV)/.%-installed: requirements/%.txt $(VENV)/.created
	$(RUN) -m pip install $(if $(filter $*,$(ALONE)),--no-deps) -r $<
	@touch $@

$(VENV)/.test-installed $(VENV)/.lint-installed: $(VENV)/.demo-installed
$(VENV)/.triton-installed $(VENV)/.evaluation-installed $(VENV)/.docs-installed: $(VENV)/.test-installed

# Editable install; the native module is then built in place, which recompiles only changed sources.
$(VENV)/.package: pyproject.toml setup.py $(VENV)/.demo-installed
	DECO_KERNELS_BUILD=none $(RUN) -m pip install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.native: $(NATIVE_SOURCES) $(VENV)/.package
	DECO_KERNELS_BUILD=cpu $(RUN) setup.py build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build out deco_kernels/*.so *.egg-info
