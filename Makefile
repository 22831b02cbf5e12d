# Two commands for everyone: make demo, make test. Each sets everything up first; a second call takes seconds.
#
#   TORCH=2.15.0               another torch version (environment and build beside the default one's)
#   HALFSTEP_CUDA=on|off       default: on where there is a GPU
#   CUDA_ARCHITECTURES=90a-real  default: those of this machine's GPUs
#   PYTHON=python3.12          another Python
#   TF=auto|on|off             whether `make test` tests the TensorFlow door; auto: if TensorFlow installs
#   TENSORFLOW=2.20.0          another TensorFlow version      TF_PYTHON=python  build for the TensorFlow of that Python

PYTHON ?= python3
TORCH ?= 2.11.0
HALFSTEP_CUDA ?= auto
CUDA_ARCHITECTURES ?=
TF ?= auto
TENSORFLOW ?= 2.21.0
TENSORFLOW_OTHER := 2.20.0
TF_PYTHON ?=

BIN := .venv-$(TORCH)/bin
TF_BIN := $(if $(filter 2.21.0,$(TENSORFLOW)),.venv-tf,.venv-tf-$(TENSORFLOW))/bin
TF_TESTS := TF_CPP_MIN_LOG_LEVEL=2
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder
TF_OTHER_TESTS := $(addprefix tests/tf_ops/test_,tensorflow_ops.py tensorflow_library.py loss_scale_optimizer.py)
CXX_FILES := $(shell git ls-files -- '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null | grep -v golden_trajectories)

.PHONY: help setup setup-tf tools demo demo-tf test test-cpp test-python test-tf test-tf-slow test-tf-auto bench bench-tf format check-format lint clean

help:
	@echo "make demo    train a small network in mixed precision and compare it with fp32"
	@echo "make test    run all tests"
	@echo "make bench   measure against torch (a GPU shows more)"
	@echo "make setup-tf, demo-tf, test-tf, bench-tf    the same for the TensorFlow door"
	@echo "make format  format all code      make lint  look for mistakes      make clean  remove builds"

setup:
	@$(PYTHON) tools/bootstrap.py --torch $(TORCH) --cuda $(HALFSTEP_CUDA) --architectures "$(CUDA_ARCHITECTURES)"

tools:
	@$(PYTHON) tools/bootstrap.py --torch $(TORCH) --only-tools

demo: setup
	@$(BIN)/python examples/digits.py

test: test-cpp test-python test-tf-auto

test-cpp: setup
	@$(BIN)/ctest --test-dir build/latest --output-on-failure -j 2

# Two at a time, since most tests keep one processor busy, in the order of the files: the long ones are not among the last.
# PYTEST_ARGS="-n 0 --pdb" is for looking into one.
test-python: setup
	@HALFSTEP_BUILD=build/latest $(BIN)/python -m pytest $(TWO_AT_A_TIME) $(PYTEST_ARGS)

setup-tf:
	@$(PYTHON) tools/bootstrap.py --tensorflow $(TENSORFLOW) --tensorflow-python "$(TF_PYTHON)"

demo-tf: setup-tf
	@$(TF_BIN)/python examples/tensorflow_digits.py

# The second run is of the same library in another minor version of TensorFlow.
test-tf: setup-tf
	@$(PYTHON) tools/bootstrap.py --tensorflow $(TENSORFLOW_OTHER) --only-tools
	@$(TF_TESTS) $(TF_BIN)/python -m pytest tests/tf_ops -m "not slow" $(TWO_AT_A_TIME) $(PYTEST_ARGS)
	@$(TF_TESTS) .venv-tf-$(TENSORFLOW_OTHER)/bin/python -m pytest $(TF_OTHER_TESTS) $(TWO_AT_A_TIME) $(PYTEST_ARGS)

# Trains in float16 on the CPU, for a minute or for a quarter of an hour, as the processor is.
test-tf-slow: setup-tf
	@$(TF_TESTS) $(TF_BIN)/python -m pytest tests/tf_ops -m slow $(PYTEST_ARGS)

# 3 says that TensorFlow could not be installed.
test-tf-auto:
ifeq ($(TF),on)
	@$(MAKE) test-tf
else ifeq ($(TF),auto)
	@$(PYTHON) tools/bootstrap.py --tensorflow $(TENSORFLOW); code=$$?; \
	if [ $$code = 0 ]; then $(MAKE) test-tf; \
	elif [ $$code = 3 ]; then echo "[halfstep] TensorFlow does not install here: the tests of its door are left out"; \
	else exit $$code; fi
endif

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
	@$(BIN)/python bench/int8_models.py
	@$(BIN)/python bench/shrink.py

bench-tf: setup-tf
	@$(TF_BIN)/python bench/tensorflow_step.py

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
	rm -rf build python_shim/halfstep/*-[0-9]* python_shim/*.egg-info dist
