# `make help` lists what there is. Each target sets up what it needs; a second run reinstalls nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PAGE   := book/_build/html/index.html
FAST   := not slow and not full
# The group no-deps of pyproject.toml, which says why (a test compares them); older versions of pip know no groups.
NO_DEPS := torchattacks

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PLATFORM_DIRS := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup book test check pages sweep plan status notebooks freeze clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sort | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## make the environment .venv (the other targets do this by themselves)

# The stamp is touched last, so an interrupted set-up is taken up again. Source files are not among its
# prerequisites: the package is installed in place, and what it needs is named in these two files.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else \
	  f"khnb needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[book,test,sweep]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(NO_DEPS)
	@touch $@

book: $(READY) ## build the book, strictly, and print the page to open
	rm -rf book/_build
	$(BIN)/jupyter-book build book/ -W -n --keep-going
	@test -f $(PAGE)
	@echo
	@echo "The book is built. Open $(CURDIR)/$(PAGE)"

test: $(READY) ## pass the tests that take minutes
	$(BIN)/python -m pytest -q -m '$(FAST)'

pages: $(READY) ## look at every built page in a headless browser, all other hosts blocked
	$(BIN)/python -m pytest -q -m page

check: test book $(READY) ## all that CI runs: every test, the book, every page in a browser
	$(BIN)/python -m pytest -q -m 'not ($(FAST))'

GRID   ?= E11
PRESET ?= smoke

sweep: $(READY) ## compute what the store lacks of a grid: make sweep GRID=E08+E12 PRESET=smoke|laptop|thesis
	$(BIN)/python -m khnb.sweeps run $(GRID) $(PRESET) $(SWEEP)

plan: $(READY) ## say what that costs, and compute nothing
	$(BIN)/python -m khnb.sweeps plan $(GRID) $(PRESET) $(SWEEP)

status: $(READY) ## say how far it is
	$(BIN)/python -m khnb.sweeps status $(GRID) $(PRESET) $(SWEEP)

define WITHOUT_OUTPUTS
import sys, nbformat
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    for key in ("widgets", "papermill"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)
endef
export WITHOUT_OUTPUTS

notebooks: $(READY) ## bring each notebook and its py:percent file in step, without outputs
	$(BIN)/python -m jupytext --quiet --set-kernel python3 --sync notebooks/*.py
	$(BIN)/python -c "$$WITHOUT_OUTPUTS" notebooks/*.ipynb
	@touch notebooks/*.py

freeze: $(READY) ## write the versions of .venv into constraints.txt
	@head -n 3 constraints.txt > constraints.tmp
	@$(BIN)/python -m pip freeze --exclude-editable >> constraints.tmp
	@mv constraints.tmp constraints.txt

clean: ## remove the built book and the environment
	rm -rf book/_build $(VENV) khnb.egg-info .pytest_cache .hypothesis
