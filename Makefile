# Every target with a ## comment is listed by `make help`.
PYTHON ?= python3
KERNELS := packages/codegemm-kernels
SOURCES := $(CURDIR)/$(KERNELS)/src:$(CURDIR)/packages/codegemm-runtime/src:$(CURDIR)/packages/codegemm-quant/src:$(CURDIR)/packages/codegemm-eval/src

.DEFAULT_GOAL := help
.PHONY: help inplace

help:  ## List the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

inplace:  ## Build the compiled module into the source tree with what PYTHON has (no network), and print the PYTHONPATH
	@python="$$($(PYTHON) -c 'import sys; print(sys.executable)')" && pybind11="$$($(PYTHON) -m pybind11 --cmakedir)" && \
	  cmake -S $(KERNELS) -B $(KERNELS)/build/inplace $(if $(shell command -v ninja),-G Ninja) -DCMAKE_BUILD_TYPE=Release \
	  "-DPython_EXECUTABLE=$$python" "-Dpybind11_DIR=$$pybind11" \
	  $(if $(CODEGEMM_CUDA),-DCODEGEMM_CUDA=$(CODEGEMM_CUDA)) \
	  $(if $(CODEGEMM_CUDA_ARCHITECTURES),'-DCODEGEMM_CUDA_ARCHITECTURES=$(CODEGEMM_CUDA_ARCHITECTURES)') >&2
	@cmake --build $(KERNELS)/build/inplace --parallel >&2
	@cmake --install $(KERNELS)/build/inplace --prefix $(KERNELS)/src >&2
	@echo "export PYTHONPATH=$(SOURCES)"
