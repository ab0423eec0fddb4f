PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# A process a core, each on one thread (`tests/conftest.py`); idle ones take over what is left of the slowest.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist worksteal
TESTS_4X := $(addprefix tests/,analysis/attention/test_diff.py analysis/base/test_recording.py analysis/base/test_states.py)
TESTS_4X += $(addprefix tests/,analysis/directions/test_erasure.py analysis/directions/test_steering.py)
TESTS_4X += $(addprefix tests/,analysis/exchange/test_mediation.py analysis/exchange/test_transplant.py)
TESTS_4X += $(addprefix tests/,analysis/outputs/test_logit_lens.py analysis/patching/test_attribution.py)
TESTS_4X += $(addprefix tests/,analysis/patching/test_known_circuit.py analysis/patching/test_organism.py)
TESTS_4X += $(addprefix tests/,analysis/patching/test_patch.py analysis/patching/test_suffix.py analysis/probing/test_probe.py)
TESTS_4X += $(addprefix tests/,analysis/residual/test_similarity.py analysis/test_planted.py analysis/weights/test_graft.py)
TESTS_4X += $(addprefix tests/,analysis/weights/test_update_rank.py losses/test_attention_losses.py losses/test_f2c.py)
TESTS_4X += $(addprefix tests/,losses/test_losses.py losses/test_output_losses.py losses/test_output_presets.py)
TESTS_4X += $(addprefix tests/,losses/test_presets.py losses/test_rmct.py models/test_architectures.py)
TESTS_4X += $(addprefix tests/,models/test_continuations.py models/test_export.py models/test_generation.py)
TESTS_4X += $(addprefix tests/,models/test_hooks.py models/test_loading.py models/test_lora.py models/test_scoring.py)
TESTS_4X += $(addprefix tests/,models/test_weights.py organism/test_organism.py organism/test_relora.py)
TESTS_4X += $(addprefix tests/,training/test_calibrate.py training/test_checkpoint.py training/test_live.py)
TESTS_4X += $(addprefix tests/,training/test_targets.py training/test_trainer.py)
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
	$(BIN)/ctlens organism card --out docs/organism.md
	$(BIN)/python -c "from ctlens import losses; print(losses.presets.page(losses.table()), end='')" > docs/losses.md
	$(BIN)/python -c "from ctlens import support; print(support.page(support.support()), end='')" > docs/models.md
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
