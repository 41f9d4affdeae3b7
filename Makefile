# make demo: protect a photo. make test: all tests. make check: lint. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXAMPLE := spaces_demo/examples/coffee
OUT := demo_output

.PHONY: demo test check style clean

demo: $(VENV)/.demo
	$(BIN)/unseg protect $(EXAMPLE).png --masks $(EXAMPLE)_mask.png -o $(OUT)/coffee_protected.png --overwrite
	$(BIN)/unseg inspect $(EXAMPLE).png $(OUT)/coffee_protected.png --mask $(EXAMPLE)_mask.png \
		--picture $(OUT)/comparison.png

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
