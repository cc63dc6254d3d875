# Everything a newcomer needs: `make reproduce`, `make test`. Both set up `.venv` first.
PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
SWEEP ?= sweeps/tiny.yaml
RUNS ?= runs
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup reproduce attribution test test-slow test-slurm soak check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(wildcard $(CONSTRAINTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11"; echo; echo "hint: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@# One command, so that the constraint holds for whatever depends on torch. Empty CONSTRAINTS: no limit.
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

reproduce: setup
	@$(BIN)/packcli sweep $(SWEEP) --runs $(RUNS)

# Which of the things that packing changes does it: on the toy, one at a time, ten seeds (docs/why.md).
attribution: setup
	@$(BIN)/packcli sweep sweeps/attribution_tiny.yaml --runs $(RUNS)
	@$(BIN)/packcli report sweeps/attribution_tiny.yaml --runs $(RUNS) --format ladder --figures $(RUNS)/figures

test: setup
	@$(BIN)/python -m pytest -n 2

test-slow: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m 'slow and not soak' --durations=12

# Starts a SLURM of four nodes on this machine; as root it installs what is missing. `-rs`: why tests were skipped.
test-slurm: setup
	@$(BIN)/python -m pytest -m 'slurm and not soak' -rs --durations=12

# What CI leaves out: real time limits, nodes taken away. Needs what `make test-slurm` needs. Then the fuzzers, at
# length; the last lines say how many inputs they tried.
soak: setup
	@$(BIN)/python -m pytest -m soak -rs --durations=0
	@HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest tests/test_fuzz.py --timeout=3600

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
