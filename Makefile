PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
TESTS_4X := $(addprefix tests/test_,models.py weights.py hooks.py losses.py losses_outputs.py losses_attention.py)
TESTS_4X += $(addprefix tests/test_,presets.py presets_outputs.py rmct.py f2c.py adapters.py relora.py updaterank.py)
TESTS_4X += $(addprefix tests/test_,states.py lens.py training.py training_targets.py training_resume.py organism.py)
TESTS_4X += $(addprefix tests/test_,steering.py erasure.py similarity.py planted.py probe.py attention.py patching.py)
TESTS_4X += $(addprefix tests/test_,patching_engine.py patching_known.py calibrate.py recording.py)

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

# What the documents show, each from one command.
figures: compare
	$(BIN)/ctlens doses --threat sycophancy --seeds 3 --out runs/doses --resume
	$(BIN)/ctlens organism leak --seeds 3 --out runs/leak
	$(BIN)/ctlens organism card --out ORGANISM.md
	$(BIN)/python -c "from ctlens import losses; print(losses.presets.page(losses.table()), end='')" > LOSSES.md
	cp runs/compare/figures/sycophancy-residual-last.png runs/compare/figures/cross-threat.png figures/
	cp runs/compare/figures/attack-strength.png runs/compare/results.csv figures/
	cp runs/doses/figures/pairs.png figures/doses-pairs.png
	cp runs/doses/figures/steps.png figures/doses-steps.png
	cp runs/doses/doses.csv runs/leak/leak.csv runs/leak/leak.png figures/

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
