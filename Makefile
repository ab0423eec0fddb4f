PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# A process a core, each on one thread (`tests/conftest.py`); idle ones take over what is left of the slowest.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist worksteal
TESTS_4X := $(addprefix tests/test_,models.py weights.py hooks.py losses.py losses_outputs.py losses_attention.py)
TESTS_4X += $(addprefix tests/test_,presets.py presets_outputs.py rmct.py f2c.py adapters.py relora.py updaterank.py)
TESTS_4X += $(addprefix tests/test_,states.py lens.py training.py training_targets.py training_resume.py organism.py)
TESTS_4X += $(addprefix tests/test_,steering.py erasure.py similarity.py planted.py probe.py attention.py patching.py)
TESTS_4X += $(addprefix tests/test_,patching_engine.py patching_known.py patching_organism.py attribution.py calibrate.py)
TESTS_4X += $(addprefix tests/test_,architectures.py huggingface.py recording.py live.py transplants.py grafts.py mediators.py)
TESTS_4X += $(addprefix tests/test_,decoding.py scoring.py continuations.py)
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
STRIP := --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec

.PHONY: install compare test test-4x check figures drawings lab notebooks strip install-4x clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,export]'
	touch $@

compare: install
	$(BIN)/ctlens compare --out runs/compare --resume

test: install
	$(BIN)/pytest $(PARALLEL)

# What the documents show, each from one command.
figures: compare
	$(BIN)/ctlens doses --threat sycophancy --seeds 3 --out runs/doses --resume
	rm -rf runs/leak
	$(BIN)/ctlens organism leak --seeds 3 --out runs/leak
	$(BIN)/ctlens organism card --out ORGANISM.md
	$(BIN)/python -c "from ctlens import losses; print(losses.presets.page(losses.table()), end='')" > LOSSES.md
	$(BIN)/python -c "from ctlens import support; print(support.page(support.support()), end='')" > MODELS.md
	$(BIN)/python figures/draw.py runs

# The same pictures from the data that lie beside them, without a study.
drawings: install
	$(BIN)/python figures/draw.py

# The newest TransformerLens 4.x, with everything else as pinned, and the tests of what depends on it.
test-4x: install-4x
	.venv-4x/bin/pytest $(PARALLEL) $(TESTS_4X)

install-4x: .venv-4x.txt
	$(MAKE) install VENV=.venv-4x CONSTRAINTS=.venv-4x.txt

.venv-4x.txt: constraints.txt
	sed 's/^transformer-lens==.*/transformer-lens>=4,<5/' $< > $@

$(VENV)/notebook: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[notebook]'
	touch $@

lab: $(VENV)/notebook
	$(BIN)/jupyter lab notebooks

# Two at a time, one thread each; three minutes are the most that a notebook may take.
notebooks: $(VENV)/notebook
	printf '%s\n' $(NOTEBOOKS) | OMP_NUM_THREADS=1 xargs -n 1 -P 2 timeout 180 $(BIN)/pytest --nbmake --durations=1 -p no:cacheprovider

# Takes outputs and counts out of notebooks that were run and saved.
strip: $(VENV)/notebook
	$(BIN)/jupyter nbconvert --log-level WARN --inplace --clear-output $(STRIP) $(NOTEBOOKS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .venv-4x .venv-4x.txt runs
