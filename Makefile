# Two commands: `make srcd` trains and reports, `make test` checks everything. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SIZE ?= paper
SEED ?= 0
OUT ?= runs/srcd-$(SIZE)-seed$(SEED)
BIN := .venv/bin

.PHONY: srcd test slow lint results bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

srcd: .venv/installed
	$(BIN)/cramlab run srcd --size $(SIZE) --seed $(SEED) --out $(OUT) --resume
	$(BIN)/cramlab report $(OUT) --out $(OUT)/report.html

test: lint
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python --level error
	$(BIN)/lint-imports

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# Every record behind README and docs; about half an hour on two cores.
results: .venv/installed
	for seed in 0 1 2; do $(BIN)/cramlab run srcd --size small --seed $$seed --out runs/results/srcd/small --resume || exit 1; done
	$(BIN)/cramlab run srcd --size paper --seed 0 --out runs/results/srcd/paper --resume
	$(BIN)/python tools/collect_results.py runs/results results

# Speed and memory of routed execution against dense; refuses to time anything while a parity test fails.
bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/execution.py

clean:
	rm -rf .venv
