# Needs python3 (3.10 or newer), a C++ compiler, make and a package index. Everything is installed into .venv.
#   make demo    the main job on real data, with a table and four plots
#   make test    every test
# LT_KERNELS_BUILD=cuda builds the CUDA C++ kernels too, where torch has CUDA and nvcc is there.
# TORCH_INDEX chooses where torch comes from, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for the CPU-only build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lt_kernels
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal
LT_KERNELS_BUILD ?= cpu
SOURCES := $(shell find csrc -type f 2>/dev/null)
QUICK := tests/test_imports.py tests/test_limits.py tests/test_typing.py tests/ops/test_registry.py tests/ops/test_bad_input.py tests/kernels/test_launches.py
FORMATTED := $(SOURCES) $(wildcard tests/emulator/*.h tests/emulator/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help setup demo check test lint format bench results report docs aot cuda clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make setup    virtual environment with pinned dependencies, and the extension in place (what changed is built again)
setup: $(STAMP).torch
	@$(MAKE) --no-print-directory $(if $(findstring jobserver,$(MAKEFLAGS)),,--jobs=2) $(STAMP).dependencies $(STAMP).extension

$(STAMP).python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 is %d.%d: 3.10 or newer is needed (make PYTHON=...)" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(STAMP).torch: constraints.txt | $(STAMP).python
	$(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools wheel ninja
	touch $@

# timm comes without torchvision, whose PyPI build is for CUDA: beside a CPU torch it fails on import, and so does
# whatever looks for it (transformers, Lightning). The tests give timm a stand-in (tests/standins).
$(STAMP).dependencies: pyproject.toml constraints.txt $(STAMP).torch
	LT_KERNELS_BUILD=none $(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps timm
	touch $@

$(STAMP).extension: setup.py $(SOURCES) $(STAMP).torch
	LT_KERNELS_BUILD=$(LT_KERNELS_BUILD) $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

## make demo     train on long-tailed digits, measure throughput, write plots to output/
demo: setup
	$(BIN)/lt-kernels demo

## make test     every test: on the CPU, with fewer instructions, Triton interpreted, CUDA emulated
test: setup
	$(PYTEST)
	for engine in default avx2 interpreter emulator; do \
	    $(PYTEST) --engine=$$engine tests/kernels tests/ops || exit 1; \
	done

## make check    lint and the quick tests, in about a minute
check: lint
	$(PYTEST) --quiet $(QUICK)

## make lint     ruff, clang-format, mypy, import-linter, and that generated tables and figures are up to date
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/report.py --check

## make format   apply what ruff would change
format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

## make bench    benchmarks of a few cases, and whether they have become slower than the committed results say
bench: setup
	$(BIN)/python -m pytest benchmarks -m "not slow" --quiet --benchmark-columns=min,median,stddev,rounds
	$(BIN)/python benchmarks/compare.py

## make results  measure everything on this machine, save under benchmarks/results/, regenerate tables and figures
results: setup
	$(BIN)/lt-kernels bench --save
	$(BIN)/python benchmarks/report.py

## make report   regenerate tables and figures from the saved results
report: setup
	$(BIN)/python benchmarks/report.py

## make docs     the documentation as a web site in site/
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

## make aot      compile changed Triton kernels, and a part of the others; compare with the tables (no GPU needed)
aot: setup
	$(BIN)/python -m tools.machine_code --check

## make cuda     the same for the CUDA C++ kernels, for every GPU architecture (needs nvcc, no GPU)
cuda: setup
	$(BIN)/python -m tools.machine_code.cuda --check

## make clean    remove what was built; keep .venv
clean:
	rm -rf build dist site output *.egg-info lt_kernels/*.so $(STAMP).extension
