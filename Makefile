# Everything runs in .venv, made on first use from constraints.txt. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEXT := .venv-next
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The sessions of the tests, and the processes that they start, read the same files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo compare-digits test test-slow test-next lint docs format bench gpu clean

help:
	@echo "make demo    train scikit-learn's digits with ARAT, evaluate, write a report"
	@echo "make compare-digits  every method and the ablation on the digits, three seeds: 40 minutes"
	@echo "make test    the tests for every change, four minutes; WORKERS=N processes (default 2)"
	@echo "make test-slow  all others that need no GPU"
	@echo "make test-next  the fast tests on a newer PyTorch and Triton, in $(NEXT): 6 GB more"
	@echo "make lint    ruff, mypy and codespell"
	@echo "make docs    the documentation as a site, in build/site; a broken link is an error"
	@echo "make bench   speed of the step and of the loaders beside what else one would run"
	@echo "make gpu     tests and benchmarks that need a GPU"
	@echo "make clean   remove the environment and caches; runs/ stays"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else "Python 3.10 to 3.13 is needed, got " + sys.version.split()[0] + "; set PYTHON=")'
	@echo "installing PyTorch with CUDA and all else into $(VENV): 3.3 GB to download, 6 GB on disk, several minutes, the last ones silent"
	$(PYTHON) -m venv $(VENV)
ifeq ($(shell uname -sm),Linux x86_64)
	$(BIN)/python -m pip install --require-hashes --only-binary :all: -r constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .
else
	sed -e '/--hash/d' -e 's/ [\]$$//' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --constraint $(VENV)/constraints.txt --editable '.[dev]'
endif
	@touch $@

demo: install
	$(BIN)/arat-fast train digits --out runs/demo-$$(date +%Y%m%d-%H%M%S)

# Goes on where it was stopped; OUT= chooses the folder of the runs.
OUT ?= runs/compare-digits
compare-digits: install
	$(BIN)/arat-fast compare digits --out $(OUT) --jobs 2 --budget work --ablation \
	  --variant "arat+swa: --objective.name arat --average.kind swa --average.every 3" \
	  --train.epochs 12 --train.eval-every 0 --average.kind none --eval.max-samples 200

# One thread a process: the small networks of the tests do not scale, and the processes do. Each
# process keeps to a stretch of files, whose fixtures it makes once, until the other has none left.
test test-slow: export OMP_NUM_THREADS := 1
test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests/kernels/interpreter

# EXHAUSTIVE=1: every place of a crash, 300 mutations of each file, each kernel for each GPU and all
# bits, not a share: hours.
test-slow: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow tests/kernels/interpreter

test-next: export OMP_NUM_THREADS := 1
test-next: $(NEXT)/.installed
	$(NEXT)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"
	TRITON_INTERPRET=1 $(NEXT)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests/kernels/interpreter

$(NEXT)/.installed: pyproject.toml setup.py constraints.txt constraints-next.txt
	$(PYTHON) -m venv $(NEXT)
	sed -e '/--hash/d' -e 's/ [\]$$//' constraints.txt \
	  | grep -vF "$$(sed 's/==.*/==/' constraints-next.txt)" > $(NEXT)/constraints.txt
	$(NEXT)/bin/python -m pip install --quiet --only-binary :all: --constraint $(NEXT)/constraints.txt \
	  --constraint constraints-next.txt --editable '.[dev]'
	@touch $@

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

# The notice that it leaves out is Material's, on MkDocs 2.
docs: export NO_MKDOCS_2_WARNING := 1
docs: install
	$(BIN)/mkdocs build --strict --site-dir build/site

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# OPTIONS= goes to the training step; --quick takes minutes.
bench: install
	$(BIN)/python -m benchmarks.step $(OPTIONS)
	$(BIN)/python -m benchmarks.data

gpu: install
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf $(VENV) $(NEXT) .mypy_cache .pytest_cache .ruff_cache .hypothesis build ./*.egg-info
