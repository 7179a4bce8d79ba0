# make demo      run three notebooks on the shipped model and write one page of what they found
# make lab       open JupyterLab on the notebooks
# make test      run the tests, several at a time (ARGS='-k steering' picks some; JOBS=0: one by one)
# make check     format, lint and types
# make gallery   pages of every run, to hand to colleagues
# make docs      pages from the docstrings, opened offline
# make bench     one table against peers, in one run (ARGS='--quick' or '--only capture')
#
# Each sets up .venv by itself when requirements.lock or pyproject.toml changed. Needs Python 3.11 or newer and pip.
# Paths are relative or quoted: the project may live in a folder with spaces in its name.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin/python
JOBS ?= auto
PIP := $(BIN) -m pip --disable-pip-version-check --quiet install
STAMP := .venv/installed
KERNELS := $(wildcard kernels/workbench_kernels/__init__.py)

# A home directory that can't be written to: caches, settings and kernels go into .venv instead.
ifneq ($(shell test -d "$$HOME" && test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.venv/home
endif

# A folder that was moved or copied: its .venv still points to the old place.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): moved
endif

# Threads that spin while they wait slow a busy machine down by ten times and more.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo lab test check gallery docs bench moved

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: export HF_HUB_OFFLINE := 1
demo: $(STAMP)
	@$(BIN) -m workbench.cli run notebooks/00_start_here.ipynb
	@$(BIN) -m workbench.cli run notebooks/10_hftp.ipynb
	@$(BIN) -m workbench.cli run notebooks/90_compose.ipynb
	@echo
	@$(BIN) -m workbench.cli runs report 00_start_here 10_hftp 90_compose
	@echo
	@echo "next: make lab      or: .venv/bin/workbench run notebooks/10_hftp.ipynb -p seed=1"

lab: $(STAMP)
	@$(BIN) -m workbench.cli lab

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	@$(BIN) -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal $(ARGS)

check: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
check: $(STAMP)
	@$(BIN) -m ruff format --check .
	@$(BIN) -m ruff check .
	@$(BIN) -m pyright --pythonpath $(BIN)

gallery: $(STAMP)
	@$(BIN) -m workbench.cli runs gallery --all --out runs/gallery

docs: $(STAMP)
	@$(BIN) docs/reference/build.py

bench: $(STAMP)
	@$(BIN) -m bench $(ARGS)

$(STAMP): requirements.lock pyproject.toml $(KERNELS)
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer was found. Install one, or name it: make PYTHON=..." >&2; exit 2; }
	@echo "setting up .venv (once; minutes, as PyTorch is large)"
	@rm -f $(STAMP)
	@"$(PYTHON)" -m venv .venv || { "$(PYTHON)" -m venv --without-pip .venv && "$(PYTHON)" -m pip --python $(BIN) install pip; }
	@mkdir -p "$$HOME"
	@$(PIP) --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@printf '%s\n' "$(CURDIR)" > $(STAMP)
