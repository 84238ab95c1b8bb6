# Two commands do everything on a machine with git, make and Python >= 3.11: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types format animals clean

demo: .venv/run
	$(BIN)/sppnet demo --out out

test: .venv/test lint types
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# The detector inside the package; DATA is a VOC folder with the split train. More than an hour on 2 cores.
animals: .venv/run
	mkdir -p src/sppnet/data out
	$(BIN)/sppnet detect train $(DATA) --split train --classes cat,cow,dog,horse,person,sheep --scale-rule released \
		--scales 240,360,540,810 --layer fc7 --tune-after 4 --out out/animals.safetensors
	$(BIN)/sppnet detect compress out/animals.safetensors --fc6 80 --fc7 80 \
		--out src/sppnet/data/animals.safetensors

clean:
	rm -rf .venv out build dist
