# The commands a newcomer types.  Needs python3 (3.10+, venv), a C++17 compiler, make and git; everything else comes
# through pip into .venv.
PYTHON ?= python3
PORT   ?= 8080
TESTS  ?= tests

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := build/.installed
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake ggml_tbq patches python -type f -not -name '*.pyc' -not -name '*.md')

.PHONY: demo test serve bench install cuda clean
.DEFAULT_GOAL := demo

demo: $(STAMP)  # build, ask a model with a tbq4_0 cache something over llama-server's API, print, stop
	@$(BIN)/python -m tbq.demo --cache build/models

test: $(STAMP)  # everything; TESTS=tests/test_x.py: a part; MODEL_D128=GGUF: also on a second model, head size 128
	@$(BIN)/python cmake/install.py $(VENV) --tests
	@$(BIN)/python -m pytest -c pyproject.toml $(if $(MODEL_D128),--model-d128=$(MODEL_D128)) $(TESTS)

serve: $(STAMP)  # llama-server on PORT, until Ctrl-C; with the web UI where npm can build it
	@$(BIN)/python cmake/web_ui.py build/ui
	@$(BIN)/python -m tbq.demo --cache build/models --serve --port $(PORT) --ui build/ui/dist

bench: $(STAMP)  # dot product, dequantize and quantize beside ggml's own types; attention by itself
	@$(BIN)/python cmake/install.py $(VENV) --bench

install: $(STAMP)  # build and install into .venv

cuda:  # the same with the CUDA backend; CUDAARCHS=90 for one architecture instead of this machine's
	@mkdir -p build && touch $(STAMP).new
	@$(PYTHON) cmake/install.py $(VENV) --cuda
	@mv $(STAMP).new $(STAMP)

# The time of the stamp is that of the start, so that an edit during the build is built by the next make.
$(STAMP): $(SOURCES)
	@mkdir -p $(@D) && touch $@.new
	@$(PYTHON) cmake/install.py $(VENV)
	@mv $@.new $@

ifeq ($(wildcard $(BIN)/tbq),)
.PHONY: $(STAMP)
endif

clean:  # everything that was built or downloaded
	rm -rf build $(VENV)
