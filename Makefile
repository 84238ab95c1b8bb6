# Two commands do everything on a machine with git, make and Python >= 3.11: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long check coverage lint types types-of-tests types-of-benchmarks format docs page wheel backbone imagenet pyramid animals clean

# Tests run in a process for each core; each process keeps to one core (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8

# Python keeps the bytecode of what it loads here, whatever the environment says: the installation left it out.
demo: .venv/run
	PYTHONDONTWRITEBYTECODE= $(BIN)/sppnet demo --out out

# Checks that need nothing of each other go on side by side; what each prints comes as a whole.
test: .venv/test
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target check
	$(PYTEST)

# The tests of the server, its page and a cluster, with those that `make test` leaves out, visibly.
test-long: .venv/test
	SPPNET_TEST_LONG=1 $(PYTEST) tests/cluster tests/serve

check: lint types types-of-tests types-of-benchmarks docs

# The share of lines that the tests run: in all, and of every file below 95 %. Apart from `make test`, which it makes
# a fifth slower before Python 3.12. Compiled functions do not count: numba runs them, unseen.
coverage: .venv/test
	$(PYTEST) --cov --cov-report=
	$(BIN)/coverage report | awk 'NR <= 2 || $$1 == "TOTAL" || $$NF + 0 < 95'

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy
	$(BIN)/mypy examples

types-of-tests: .venv/test
	$(BIN)/mypy --cache-dir .mypy_cache/tests --config-file tests/mypy.ini tests

types-of-benchmarks: .venv/test
	$(BIN)/mypy --cache-dir .mypy_cache/benchmarks --config-file benchmarks/mypy.ini benchmarks

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without bytecode of everything that comes with the packages: a seventh of the space, and of the time. Python
# writes that of what is used when it is first used.
.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	touch $@

.venv/test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# The site, in site/; a warning is an error, and nothing is fetched.
docs: .venv/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

# The page of `sppnet serve`, from web/ into the package; needs Node 20 or newer, which users do not: it is committed.
page:
	cd web && npm ci && npm run check && npm test && npm run build

# The wheel, in dist/, and what must be in it.
wheel: .venv/test
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m zipfile --list dist/*.whl | awk '/py.typed|models.(animals|imagenet).safetensors|models.(efficientnet|pyramid)-lite0.onnx|static.index.html/' \
		| wc -l | grep -qx ' *6'

# The backbone inside the package, of timm's network and the weights of its package.
backbone: .venv/test
	$(BIN)/python -c 'from sppnet.features.making import make_backbone as make; \
		make("tf_efficientnet_lite0", called="efficientnet-lite0").save("src/sppnet/models/efficientnet-lite0.onnx")'

# The classifier inside the package, on that backbone: its last layer from the same weights.
imagenet: .venv/test
	$(BIN)/python -c 'from sppnet.classification.imagenet import write_imagenet as write; \
		write("src/sppnet/models/imagenet.safetensors")'

# The network with a pyramid inside the package; DATA is a VOC folder with the split train. About an hour on 2 cores.
pyramid: .venv/test
	$(BIN)/python benchmarks/pyramid.py $(DATA) --split train --out src/sppnet/models/pyramid-lite0.onnx

# The detector inside the package, on that network, which has seen the same photos: so nothing is measured on them, and
# the windows stay where they are.
animals: .venv/test
	$(BIN)/python -c 'from sppnet import Detector, read_dataset; \
		Detector("pyramid-lite0", scales=(256,), ridge=1e9, folds=0).fit(read_dataset("$(DATA)", "train"), \
			classes="cat,cow,dog,horse,person,sheep".split(",")).save("src/sppnet/models/animals.safetensors")'

clean:
	rm -rf .venv out build dist site
