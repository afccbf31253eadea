# SPDX-License-Identifier: MIT
# The commands a newcomer types.  Needs python3 (3.10+, venv), a C++17 compiler, make and git; everything else comes
# through pip into .venv.
PYTHON ?= python3
PORT   ?= 8080
TESTS  ?= tests

VENV    := .venv
BIN     := $(VENV)/bin
SERVER  := build/.installed-server
STAMP   := build/.installed
SOURCES := CMakeLists.txt pyproject.toml $(shell find bench cmake ggml_tbq patches python tools -type f -not -name '*.pyc' -not -name '*.md')
INSTALL := tools/install.py $(VENV)
# Only what checks the code: it needs neither a compiler nor the package.
LINT    := .venv-lint
C_FILES  = $(shell find bench cmake ggml_tbq tests -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

.PHONY: demo test serve bench install cuda vulkan wheel dist bump lint format help clean
.DEFAULT_GOAL := demo

demo: $(SERVER)  # build llama-server, ask a small model one question, print the answer and the size of the cache, stop
	@$(BIN)/python -m tbq.cli.demo --cache build/models

serve: $(SERVER)  # run llama-server on PORT until Ctrl-C, with the web UI where npm can build it
	@$(BIN)/python tools/web_ui.py build/ui
	@$(BIN)/python -m tbq.cli.demo --cache build/models --serve --port $(PORT) --ui build/ui/dist

install: $(STAMP)  # build all programs of llama.cpp, and install them into .venv

test: $(STAMP)  # run all tests; TESTS=tests/test_x.py: a part; MODEL_D128=GGUF: also on a second model, head size 128
	@$(BIN)/python $(INSTALL) --tests
	@$(BIN)/python -m pytest -c pyproject.toml $(if $(MODEL_D128),--model-d128=$(MODEL_D128)) $(TESTS)

bench: $(STAMP)  # measure the kernels, compared with ggml's own types, and attention alone
	@$(BIN)/python $(INSTALL) --bench

cuda:  # build and install with CUDA; CUDAARCHS=90: for one architecture instead of this machine's
	@$(PYTHON) $(INSTALL) --cuda

vulkan:  # build and install with Vulkan, for GPUs of AMD, Intel and others
	@$(PYTHON) $(INSTALL) --vulkan

wheel: $(SERVER)  # build a wheel for machines without a compiler, in dist/; ARCH=aarch64: for arm64; CUDA=1: its CUDA backend
	@$(BIN)/python tools/wheel.py $(if $(ARCH),--arch $(ARCH)) $(if $(CUDA),--cuda "$(CUDAARCHS)")

dist: $(SERVER)  # build the sdist, the wheels, the programs as .tar.gz and their checksums, in dist/
	@$(BIN)/python tools/wheel.py --dist

bump:  # carry the patch series to another llama.cpp, PIN="llama-cpp-python==X"; CONTINUE=1, ABORT=1, TRIAL=1: docs/guide/bump.md
	@$(PYTHON) tools/patch_series.py bump $(if $(PIN),"$(PIN)") $(if $(FOLDER),--folder "$(FOLDER)") \
		$(if $(COMMIT),--commit "$(COMMIT)") $(if $(TRIAL),--trial) $(if $(CONTINUE),--continue) $(if $(ABORT),--abort)

lint: $(LINT)/.installed  # check form, spelling, types and generated files; needs no build
	@$(LINT)/bin/ruff check --quiet
	@$(LINT)/bin/ruff format --check --quiet
	@$(LINT)/bin/clang-format --dry-run -Werror $(C_FILES)
	@$(LINT)/bin/codespell
	@$(LINT)/bin/mypy --exclude _vendor --exclude tbq/hf/ --exclude tbq/vllm/
	@$(PYTHON) tools/tables.py --check

format: $(LINT)/.installed  # format everything, and correct what ruff can
	@$(LINT)/bin/ruff check --fix-only --quiet
	@$(LINT)/bin/ruff format --quiet
	@$(LINT)/bin/clang-format -i $(C_FILES)

help:  # list these commands
	@sed -n 's/^\([a-z]*\):.*  # \(.*\)/\1 \2/p' Makefile | while read -r name text; do printf 'make %-8s %s\n' "$$name" "$$text"; done

# pip knows dependency groups since 25.1
$(LINT)/.installed: pyproject.toml
	@echo "Installing what checks the code into $(LINT) (about 350 MB)"
	@$(PYTHON) -m venv $(LINT)
	@$(LINT)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=25.1"
	@$(LINT)/bin/python -m pip install --disable-pip-version-check --quiet --group lint
	@touch $@

# What was built and installed is written down by install.py, with the time of the start, so that an edit during the build
# is built by the next make.
$(SERVER): $(SOURCES)
	@$(PYTHON) $(INSTALL) --server

$(STAMP): $(SOURCES)
	@$(PYTHON) $(INSTALL)

# A checkout that was moved: the scripts of its environment name the old folder.
ifneq ($(wildcard build/.where),)
ifneq ($(shell cat build/.where),$(CURDIR))
.PHONY: moved
$(SERVER) $(STAMP): | moved
moved:
	@$(PYTHON) $(INSTALL) --moved
endif
endif

ifeq ($(wildcard $(BIN)/tbq),)
.PHONY: $(SERVER) $(STAMP)
endif

clean:  # remove everything that was built or downloaded
	rm -rf build $(VENV) $(LINT)
