# Every target makes .venv and installs what it needs when absent.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BENCH  := .bench-venv

.PHONY: demo test lint bench-cpu clean

demo: $(VENV)/.installed          ## train DeltaNet and Mamba on parity, with eigenvalues in [0,1] and in [-1,1]
	$(BIN)/statetrack demo

test: $(VENV)/.installed-test     ## the whole suite, CPU only (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-test     ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench-cpu: $(BENCH)/.installed    ## our CPU ops beside the peers', in one run, about ten minutes
	$(BENCH)/bin/python benchmarks/ops_cpu.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"statetrack needs Python >= 3.11, found {v.major}.{v.minor}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[test,lint]'
	touch $@

# Of fla-core and mamba-ssm only one source file each is read, so their archives are not installed.
$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/peers.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install -q -c constraints.txt -e '.[cpu]' -r benchmarks/peers.txt setuptools
	$(BENCH)/bin/pip download -q --no-deps -d $(BENCH)/peers fla-core==0.6.0
	MAMBA_SKIP_CUDA_BUILD=TRUE $(BENCH)/bin/pip download -q --no-deps --no-build-isolation --no-binary :all: \
		-d $(BENCH)/peers mamba-ssm==2.2.6.post3
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) build *.egg-info .pytest_cache .ruff_cache .hypothesis
