# Two commands for everyone: make demo, make test. Each sets everything up first; a second call takes seconds.
#
#   TORCH=2.15.0               another torch version (environment and build beside the default one's)
#   HALFSTEP_CUDA=on|off       default: on where there is a GPU
#   CUDA_ARCHITECTURES=90a-real  default: those of this machine's GPUs
#   PYTHON=python3.12          another Python

PYTHON ?= python3
TORCH ?= 2.11.0
HALFSTEP_CUDA ?= auto
CUDA_ARCHITECTURES ?=

BIN := .venv-$(TORCH)/bin
CXX_FILES := $(shell git ls-files -- '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null | grep -v golden_trajectories)

.PHONY: help setup tools demo test test-cpp test-python bench format check-format lint clean

help:
	@echo "make demo    train a small network in mixed precision and compare it with fp32"
	@echo "make test    run all tests"
	@echo "make bench   measure against torch (a GPU shows more)"
	@echo "make format  format all code      make lint  look for mistakes      make clean  remove builds"

setup:
	@$(PYTHON) tools/bootstrap.py --torch $(TORCH) --cuda $(HALFSTEP_CUDA) --architectures "$(CUDA_ARCHITECTURES)"

tools:
	@$(PYTHON) tools/bootstrap.py --torch $(TORCH) --only-tools

demo: setup
	@$(BIN)/python examples/digits.py

test: test-cpp test-python

test-cpp: setup
	@$(BIN)/ctest --test-dir build/latest --output-on-failure -j 2

test-python: setup
	@HALFSTEP_BUILD=build/latest $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: setup
	@$(BIN)/python bench/gradients.py
	@$(BIN)/python bench/scaler_path.py
	@$(BIN)/python bench/reductions.py
	@$(BIN)/python bench/train_step.py
	@$(BIN)/python bench/losses.py
	@$(BIN)/python bench/adaptive.py
	@$(BIN)/python bench/monitoring.py
	@$(BIN)/python bench/scopes.py
	@$(BIN)/python bench/lowered.py
	@$(BIN)/python bench/shrink.py

format: tools
	@$(BIN)/clang-format -i $(CXX_FILES)
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix .

check-format: tools
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lint: setup
	@clang-tidy -p build/latest $(filter csrc/%.cpp torch_ops/%.cpp,$(CXX_FILES))

clean:
	rm -rf build python_shim/halfstep/torch-* python_shim/*.egg-info dist
