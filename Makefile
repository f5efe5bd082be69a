# `make demo` and `make test` are all that a fresh machine needs: each makes .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-failed test-turn test-all test-lab check format docs clean

demo: $(VENV)/installed
	$(BIN)/rarelens demo --out demo

test: $(VENV)/installed-test
	tests/sealed.sh $(BIN)/python -m pytest -m "not long and not lab" -n 2 --dist loadfile

# What failed last, each by itself: does it fail without other tests beside it?
test-failed: $(VENV)/installed-test
	tests/sealed.sh $(BIN)/python -m pytest -m "not long and not lab" --last-failed --last-failed-no-failures none

# A share of the long tests, another one with each TURN.
test-turn: $(VENV)/installed-test
	tests/sealed.sh $(BIN)/python -m pytest -m "long and not soak" --turn $(TURN)

test-all: $(VENV)/installed-test
	tests/sealed.sh $(BIN)/python -m pytest -m "not lab"

test-lab: $(VENV)/installed-test
	$(BIN)/python -m pytest -m lab -x -s tests/lab

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed
	$(BIN)/rarelens settings --markdown > docs/configuration.md

clean:
	rm -rf $(VENV) demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
