PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
TESTS_4X := $(addprefix tests/test_,models.py weights.py hooks.py losses.py training.py organism.py)

.PHONY: install compare test test-4x check figures clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,export]'
	touch $@

compare: install
	$(BIN)/ctlens compare --out runs/compare --resume

test: install
	$(BIN)/pytest

# What the README shows, from a fresh default study.
figures: compare
	cp runs/compare/figures/sycophancy-residual-last.png runs/compare/results.csv figures/

# The newest TransformerLens 4.x, with everything else as pinned, and the tests of what depends on it.
test-4x:
	$(MAKE) install VENV=.venv-4x CONSTRAINTS=.venv-4x.txt
	.venv-4x/bin/pytest $(TESTS_4X)

.venv-4x.txt: constraints.txt
	sed 's/^transformer-lens==.*/transformer-lens>=4,<5/' $< > $@

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .venv-4x .venv-4x.txt runs
