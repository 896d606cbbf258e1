PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint bench clean

# The constraints pin torch to a release whose plain wheel is small; the package itself allows a range.
$(BIN)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/vpt-peft demo --output_dir out/demo

test: $(BIN)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(BIN)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks.cost

clean:
	rm -rf $(VENV) out build dist *.egg-info
