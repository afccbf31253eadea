# The commands a newcomer types.  Needs python3 (3.10+, venv), a C++17 compiler, make and git; everything else comes
# through pip into .venv.
PYTHON ?= python3
PORT   ?= 8080

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.tbq-installed
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake ggml_tbq patches python -type f -not -name '*.pyc' -not -name '*.md')

.PHONY: demo test serve install clean
.DEFAULT_GOAL := demo

demo: $(STAMP)  # build, ask a model with a tbq4_0 cache something over llama-server's API, print, stop
	@$(BIN)/python -m tbq.demo --cache build/models

test: $(STAMP)  # everything
	@$(BIN)/python cmake/install.py $(VENV) --tests
	@$(BIN)/python -m pytest $(TESTS)

serve: $(STAMP)  # llama-server on PORT, until Ctrl-C; with the web UI where npm can build it
	@$(BIN)/python cmake/web_ui.py build/ui
	@$(BIN)/python -m tbq.demo --cache build/models --serve --port $(PORT) --ui build/ui/dist

install: $(STAMP)  # build and install into .venv

$(STAMP): $(SOURCES)
	@$(PYTHON) cmake/install.py $(VENV)
	@touch $@

clean:  # everything that was built or downloaded
	rm -rf build $(VENV)
