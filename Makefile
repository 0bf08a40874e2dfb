# `make demo` and `make test` do all of their own set-up; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: install demo test test-fast test-arm arm-tools lint chromium bench-quality bench-speed kernels-report bench-cpu sanitize clean help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Python files that are scripts, not part of the distribution.
SCRIPTS := setup.py $(wildcard deploy/*.py) $(wildcard benchmarks/*.py) $(wildcard benchmarks/gpu/*.py)
# Least per cent of the three packages' lines that tests run in their own process.
COVERAGE := 93
PIP = $(BIN)/python -m pip install --progress-bar off
PIP_PROGRESS := awk '/^(Collecting|Processing) / && ++n % 20 == 0 {print "install:   " n " found"} \
  /^Installing collected/ {print "install:   writing .venv"} {fflush()}'

# Nothing of the caller's shell reaches in: other packages, other install targets, vLLM switches.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV MYPYPATH PYTEST_ADDOPTS
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_REQUIRE_VIRTUALENV
unexport $(filter VLLM_%,$(.VARIABLES))
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

install: $(STAMP) ## make .venv with everything that demo and test need (3.9 GB)

# A set-up that was cut short leaves half-written packages which pip takes for whole ones.
$(STAMP): pyproject.toml setup.py deploy/constraints.txt deploy/vllm-metapackage/pyproject.toml
	@if [ -e .venv/.incomplete ]; then \
	  echo "install: the last set-up was cut short, starting afresh"; rm -rf .venv; fi
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "install: $(PYTHON) is not Python 3.11 to 3.13; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@if [ ! -x $(BIN)/pip ]; then echo "install: making .venv"; rm -rf .venv; \
	  $(PYTHON) -m venv .venv >/dev/null || { echo "install: no ensurepip, using $(PYTHON)'s own pip"; \
	    $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }; fi
	@touch .venv/.incomplete
	@echo "install: $$(grep -c == deploy/constraints.txt) packages, some minutes the first time (details: .venv/install.log)"
	@$(PIP) --no-compile --no-deps -r deploy/constraints.txt 2>.venv/install.log | $(PIP_PROGRESS) || { \
	  grep -h ^ERROR .venv/install.log; \
	  echo "install: if pip does not find torch ...+cpu, see 'CPU' in deploy/README.md"; exit 1; }
	@echo "install: compiling Python files"
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true # some packages carry templates, not Python
	@echo "install: vllm-precalib, editable, and its C++ libraries (a minute or two)"
	@$(PIP) -qq --no-deps --no-build-isolation ./deploy/vllm-metapackage
	@$(PIP) -v --no-warn-conflicts --no-build-isolation -c deploy/constraints.txt -e '.[demo,test]' 2>&1 | \
	  tee -a .venv/install.log | sed -n 's/^ *vllm-precalib: /install: /p; /^ *error/Ip'
	@rm .venv/.incomplete; touch $@
	@echo "install: done"

demo: $(STAMP) ## quantize a real model, serve it in vLLM, ask it, measure it
	@$(BIN)/python deploy/demo.py

# PRECALIB_NO_SKIP: what set-up brings may not be missing (tests/README.md, "Skips").
test: lint chromium arm-tools ## lint, types and the whole test suite, with its coverage
	@PRECALIB_NO_SKIP=1 COVERAGE_FILE=.venv/.coverage OMP_NUM_THREADS=1 $(BIN)/pytest --cov --cov-fail-under=$(COVERAGE)

test-fast: $(STAMP) ## tests without engines, real models, compilers and interpreted kernels
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow and not engine and not gpu'

# The tests of `precalib report` look at it in a browser. Without one they skip; in CI they fail.
chromium: ## a browser for the tests, with apt-get where there is none and we may
	@if ! command -v chromium chromium-browser google-chrome >/dev/null; then \
	  as_root=; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
	  if command -v apt-get >/dev/null && $$as_root true 2>/dev/null; then \
	    echo "chromium: installing it, for the tests of the report"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    { $$as_root apt-get -qq update && $$as_root apt-get -qq install -y --no-install-recommends \
	      -o DPkg::Lock::Timeout=300 chromium; } >/dev/null 2>&1 \
	      || echo "chromium: could not be installed; the tests of the report in a browser will skip (in CI: fail)"; \
	  else echo "chromium: not there; the tests of the report in a browser will skip (in CI: fail)"; fi; fi

# The Arm kernels are tested in an emulator. Without one their tests skip, in CI as well.
ARM_TOOLS = (command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static qemu-aarch64) >/dev/null || [ "$$(uname -m)" = aarch64 ]
arm-tools:
	@$(ARM_TOOLS) || echo "test: no Arm compiler and emulator, the tests of the Arm kernels will skip (make test-arm)"

test-arm: $(STAMP) ## tests of the Arm kernels, in an emulator on other processors
	@if ! { $(ARM_TOOLS); }; then \
	  as_root=; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
	  if command -v apt-get >/dev/null && $$as_root true 2>/dev/null; then \
	    echo "test-arm: installing g++-aarch64-linux-gnu and qemu-user-static"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    { $$as_root apt-get -qq update && $$as_root apt-get -qq install -y --no-install-recommends \
	      -o DPkg::Lock::Timeout=300 g++-aarch64-linux-gnu qemu-user-static; } >/dev/null 2>&1 || true; fi; fi
	@{ $(ARM_TOOLS); } || { \
	  echo "test-arm: install a cross-compiler and qemu's user mode: apt-get install g++-aarch64-linux-gnu qemu-user-static"; exit 1; }
	@PRECALIB_NO_SKIP=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels/backends/arm

.PHONY: test-families
test-families: $(STAMP) ## quantize and serve a tiny model of every family, write docs/supported-models.md (15 minutes)
	@$(BIN)/python tests/helpers/family_suite.py all build/families

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy $(SCRIPTS)

PEER_OPTIONS = $(if $(PEERS),--peers-python $(PEERS)) $(if $(LIBLLAMA),--libllama $(LIBLLAMA)) \
  $(if $(CALIBRATION),--calibration $(CALIBRATION))

# MODEL=gemma3 needs Gemma's packages, which are no part of .venv (docs/quality.md).
MODEL ?= smollm2
QUALITY_SOURCE = demo-output/$(if $(filter gemma3,$(MODEL)),gemma-3-270m,SmolLM2-135M-Instruct)
QUALITY_NAME = $(if $(filter smollm2,$(MODEL)),quality,quality-$(MODEL))

bench-quality: $(STAMP) ## KL against effective bits, beside other methods: make bench-quality TEXT=file.txt [MODEL=gemma3]
	@test -n "$(TEXT)" || { echo "bench-quality: name a text file: make bench-quality TEXT=file.txt"; exit 1; }
	@$(BIN)/python deploy/gguf_checkpoint.py $(MODEL) $(QUALITY_SOURCE)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py $(QUALITY_SOURCE) --text $(TEXT) \
	  --out benchmarks/results --name $(QUALITY_NAME) --resume $(PEER_OPTIONS) $(if $(TASKS),--tasks $(TASKS))

bench-cpu: $(STAMP) ## products and serving on this CPU, beside bfloat16 and other 4-bit ways
	@$(BIN)/python benchmarks/cpu_linear.py
	@$(BIN)/python deploy/gguf_checkpoint.py smollm2 demo-output/SmolLM2-135M-Instruct
	@$(BIN)/python benchmarks/cpu_serving.py demo-output/SmolLM2-135M-Instruct

LOAD_MINUTES ?= 10
LOAD_OUT ?= benchmarks/results
.PHONY: load
load: $(STAMP) ## 200 clients, good and bad, on a served model and on its original: make load [LOAD_MINUTES=10 LOAD_OUT=…]
	@$(BIN)/python deploy/gguf_checkpoint.py smollm2 demo-output/SmolLM2-135M-Instruct
	@test -e demo-output/SmolLM2-135M-Instruct-balanced-4/config.json || \
	  $(BIN)/precalib quantize demo-output/SmolLM2-135M-Instruct demo-output/SmolLM2-135M-Instruct-balanced-4
	@$(BIN)/python benchmarks/load.py demo-output/SmolLM2-135M-Instruct-balanced-4 \
	  demo-output/SmolLM2-135M-Instruct --minutes $(LOAD_MINUTES) --out $(LOAD_OUT) \
	  --serve-flags="--max-model-len 1024 --enforce-eager"

# Of which ISAs, all by default: make sanitize ISAS="avx2 amx"
ISAS ?=
sanitize: $(STAMP) ## tests of the compiled CPU kernels under AddressSanitizer and UBSan: make sanitize [ISAS="avx2 …"]
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python tests/kernels/backends/x86/rebuilt_suite.py --sanitize --software-tiles $(if $(ISAS),--isas $(ISAS))

.PHONY: races soak nightly
races: $(STAMP) ## concurrent calls of the compiled CPU kernels under ThreadSanitizer: make races [ISAS="avx2 …"]
	@OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/races.py $(ISAS)

SOAK_MINUTES ?= 60
soak: $(STAMP) ## an hour of served chats at a modest rate, whose memory must stay flat: make soak [SOAK_MINUTES=60 LOAD_OUT=…]
	@$(BIN)/python deploy/gguf_checkpoint.py smollm2 demo-output/SmolLM2-135M-Instruct
	@test -e demo-output/SmolLM2-135M-Instruct-balanced-4/config.json || \
	  $(BIN)/precalib quantize demo-output/SmolLM2-135M-Instruct demo-output/SmolLM2-135M-Instruct-balanced-4
	@$(BIN)/python benchmarks/load.py demo-output/SmolLM2-135M-Instruct-balanced-4 --name soak \
	  --minutes $(SOAK_MINUTES) --out $(LOAD_OUT) --clients 8 --pause 8 --serve-flags="--max-model-len 1024 --enforce-eager"

nightly: sanitize races soak ## what takes hours: sanitizers, concurrent calls, a soak, then an hour of damaged checkpoints
	@OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR $(BIN)/python tests/fuzz/fuzz.py --cases 1000000000 \
	  --minutes $(FUZZ_MINUTES) --state build/fuzz/nightly.json # new cases every night

dist: $(STAMP) ## source archive and wheel of the commit, byte for byte the same every time, in build/dist
	@$(BIN)/python deploy/dist.py build/dist

sbom: ## bill of materials of the environment that is tested, build/sbom.json
	@mkdir -p build; $(PYTHON) deploy/sbom.py >build/sbom.json; echo "sbom: build/sbom.json"

lock: .venv-audit/.installed ## hashes of all files of deploy/constraints.txt, in deploy/constraints.lock (torch's by hand)
	@.venv-audit/bin/uv pip compile deploy/constraints.txt --no-deps --generate-hashes --python-version 3.11 	  --no-header --no-annotate -o deploy/constraints.lock --quiet

# A release with a known vulnerability: a mirror may answer without them, or not at all.
AUDIT_PROBE := https://pypi.org/pypi/pip/23.2.1/json
audit: .venv-audit/.installed ## known vulnerabilities of the pinned packages, with pip-audit (needs PyPI's JSON API)
	@.venv-audit/bin/python -c 'import json, sys; from urllib.request import urlopen; \
	  sys.exit(not json.load(urlopen("$(AUDIT_PROBE)", timeout=30))["vulnerabilities"])' 2>/dev/null || { \
	  echo "audit: $(AUDIT_PROBE) does not tell of vulnerabilities; run this where PyPI itself can be reached"; exit 1; }
	@.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r <(grep -v +cpu deploy/constraints.txt)

.venv-audit/.installed:
	@$(PYTHON) -m venv --clear .venv-audit
	@.venv-audit/bin/python -m pip install --quiet uv==0.13.9 pip-audit==2.10.1
	@touch $@

FUZZ_CASES ?= 100000
FUZZ_MINUTES ?= 60
fuzz: $(STAMP) ## damaged checkpoints, 100,000 cases or an hour; goes on where it stopped: make fuzz [FUZZ_CASES=… FUZZ_MINUTES=…]
	@OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR $(BIN)/python tests/fuzz/fuzz.py --cases $(FUZZ_CASES) --minutes $(FUZZ_MINUTES)

FUZZ_NATIVE_MINUTES ?= 20
fuzz-native: $(STAMP) ## random tensors for the C++ code, under sanitizers, 20 minutes; goes on: make fuzz-native [FUZZ_NATIVE_MINUTES=… ISAS=…]
	@$(BIN)/python tests/fuzz/native.py --minutes $(FUZZ_NATIVE_MINUTES) $(if $(ISAS),--isas $(ISAS))

KILLS ?= 100
KILL_MINUTES ?= 60
kill: $(STAMP) ## `precalib quantize` killed at random moments and resumed: make kill [KILLS=… KILL_MINUTES=… KILL_WAYS="ray …" KILL_SOURCE=MODEL]
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/kill.py --kills $(KILLS) --minutes $(KILL_MINUTES) \
	  $(if $(KILL_WAYS),--ways $(KILL_WAYS)) $(if $(KILL_SOURCE),--source $(KILL_SOURCE))

bench-speed: $(STAMP) ## seconds to quantize, recipe by recipe
	@$(BIN)/python benchmarks/quantize_speed.py

kernels-report: $(STAMP) ## compile every GPU kernel for every chip, fail on new spills, count costs (half an hour)
	@TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python benchmarks/gpu/cost_model.py --check
	@TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python benchmarks/gpu/cost_model.py

gpu-acceptance: ## tests, times and tuning of the GPU kernels on a machine with torch, Triton, pytest and a GPU
	@$(PYTHON) benchmarks/gpu/acceptance.py --out build/gpu-acceptance

VLLM ?= 0.33.*
VLLM_WHEEL = build/vllm-wheel
vllm-contract: $(STAMP) ## the plugin against the Python files of another vLLM's CUDA wheel (0.4 GB): make vllm-contract [VLLM=0.33.*]
	@rm -rf $(VLLM_WHEEL) && mkdir -p $(VLLM_WHEEL)
	@$(BIN)/pip download -q --no-deps --only-binary=:all: --python-version 3.12 --abi abi3 \
	  $(addprefix --platform manylinux_2_,28_x86_64 31_x86_64 35_x86_64) -d $(VLLM_WHEEL) 'vllm==$(VLLM)'
	@$(BIN)/python deploy/vllm_contract.py $(VLLM_WHEEL)/*.whl --unpack $(VLLM_WHEEL)/unpacked
	@PYTHONPATH=$(CURDIR)/$(VLLM_WHEEL)/unpacked OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not engine' tests/vllm_precalib \
	  -k 'not dense-dtype0' # needs a compiled operator

.PHONY: docs gpu-acceptance fuzz fuzz-native kill dist sbom lock audit vllm-contract
docs: .venv-docs/.installed ## the documentation site, in build/docs; links are checked
	@.venv-docs/bin/python docs/check_links.py
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "docs: build/docs/index.html"

.venv-docs/.installed: docs/requirements.txt
	@$(PYTHON) -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --no-deps -r docs/requirements.txt
	@touch $@

clean: ## remove .venv, caches and the demo's output
	rm -rf .venv .venv-docs .venv-audit demo-output build deploy/vllm-metapackage/build *.egg-info deploy/*/*.egg-info \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
