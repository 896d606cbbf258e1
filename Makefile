PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false

# Threads that spin while they wait lose their turn to any other busy program; a step then takes 20 times as long
export OMP_WAIT_POLICY ?= PASSIVE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-docs test-app fuzz matrix docs notebooks bench lint clean

demo: $(BIN)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/vpt-peft demo --output_dir out/demo

# The constraints pin torch to a release whose plain wheel is small; the package itself allows a range.
$(BIN)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(BIN)/.demo: $(BIN)/.torch setup.cfg pyproject.toml
	$(PIP) -e ".[demo]"
	touch $@

$(BIN)/.installed: $(BIN)/.torch setup.cfg pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@

test: $(BIN)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-docs: $(BIN)/.installed
	$(BIN)/python -m pytest -q -n 2 -m docs

# Gradio pins packages of its own, so the page is tested in an environment of its own
APP := .venv-app/bin
$(APP)/.installed: constraints.txt setup.cfg
	$(PYTHON) -m venv .venv-app
	$(APP)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(APP)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[app]" playwright pytest
	touch $@

test-app: $(APP)/.installed
	$(APP)/python -m pytest -q tests/app

docs: $(BIN)/.installed
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet --site-dir out/site

# In place, with their pictures; NAMES=6 runs the sixth alone
NAMES ?= [0-9]
notebooks: $(BIN)/.installed
	$(BIN)/python scripts/run_notebooks.py $(foreach name,$(NAMES),notebooks/$(name)*.ipynb)

# New cases each time, of configurations, adapter folders, images and sequences of PEFT's calls
CASES ?= 20000
fuzz: $(BIN)/.installed
	VPT_PEFT_FUZZ=$(CASES) $(BIN)/python -m pytest -q -n 4 tests/test_fuzz_*.py

# Versions of transformers and PEFT, each in an environment of its own; pyenv's Pythons beside
matrix: $(BIN)/.installed
	PATH="$$PATH:$$(ls -d $$HOME/.pyenv/versions/3.1*/bin 2>/dev/null | paste -sd:)" $(BIN)/nox

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks.cost

lint: $(BIN)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-app .nox out build dist *.egg-info
