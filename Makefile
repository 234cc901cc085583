# Set-up and checks, the same for people and for CI. Everything goes into .venv; a step that is done
# isn't done again until pyproject.toml or constraints.txt change, so a repeat needs no network.
#
#   make demo    install, then train, test and report on handwritten digits
#   make test    install what tests need, run them all
#   make long    the tests that take longest and have their like in make test
#   make check   format, lint, types (with what serving inherits from), import ladder
#   make gpu     tests and benchmarks on an NVIDIA card, in ten minutes, with the packages that are there:
#                installs nothing and needs no network; make gpu GPU_PYTHON=python3.12 DATA=folder AIRBENCH=file
#   make proto   compile the messages of gRPC, after their text has changed
#   make clean   remove what make made; data, caches and runs stay
#
# Another Python: make PYTHON=python3.12

SHELL := /bin/sh
ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(ENOUGH)' 2>/dev/null && echo $$python && exit; done; echo python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	--constraint constraints.txt

# Processes that run tests beside each other, a file each: most tests compute with one thread, or wait.
TESTERS ?= 2

# For `make gpu`, which runs where torch was put by others: their Python, and a folder of data.
GPU_PYTHON ?= python3
DATA ?= ../shared/data

.PHONY: demo test long check gpu proto clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/suanli run digits

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

long: .venv/installed-test
	$(BIN)/python -m pytest -m long

check: .venv/installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) benchmarks/gpu.py $(DATA) $(if $(AIRBENCH),--airbench $(AIRBENCH))

proto: .venv/installed-test
	$(BIN)/python -m grpc_tools.protoc --proto_path=src/suanli/serving \
		--descriptor_set_out=src/suanli/serving/messages.binpb inference.proto health.proto

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist src/*.egg-info
	find $(wildcard src tests benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/made:
	@$(PYTHON) -c '$(ENOUGH)' || { \
		echo 'suanli needs Python 3.11 or later, and "$(PYTHON)" is not. Install one, or name it: make PYTHON=/path/to/python3.12' >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/made pyproject.toml constraints.txt
	@echo 'Installing into .venv; torch is large, so this can take minutes the first time.'
	$(INSTALL) setuptools
	$(INSTALL) --editable .
	@touch $@

# timm can't be imported without torchvision, which would replace torch by one with CUDA: so it comes without what it asks
# for, and models/timm_import.py makes it work beside any torch.
.venv/installed-test: .venv/installed
	$(INSTALL) --editable '.[test,tensorboard,engines,serve,pretrained]'
	$(INSTALL) --no-deps timm torchvision
	@touch $@

.venv/installed-check: .venv/installed
	$(INSTALL) --editable '.[check,serve]'
	@touch $@
