# make demo    creates .venv, installs fedlens, trains on digits and keeps every client's local model
# make test    creates .venv, installs the development tools, runs every test
# make soak    what `make test` does in seconds, for minutes: a thousand kills, ten thousand damaged ledgers
# make test-extras    and the tests of the extra `tensorflow`, in an environment of its own: .venv-extras
# make check   linters and types
# make bench   fedlens against the hand-written reference
# make bench-peers    and against PyTorch, pfl, FedJAX and Flower, in environments of their own under .bench/
# make bench-claims   fedlens against itself: devices, first rounds, ragged cohorts, a million clients
# make clean   removes .venv, .venv-extras, .bench and caches
# PYTHON=...   names the interpreter; without it the newest of 3.13, 3.12, 3.11 is taken

.DEFAULT_GOAL := help
.PHONY: help demo test test-extras soak check bench bench-peers bench-claims clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed
DEVELOPMENT := $(VENV)/.development
EXTRAS := .venv-extras
EXTRAS_READY := $(EXTRAS)/.ready

help:
	@sed -n 's/^# //p' Makefile

# A .venv that uv made has no pip: give it one.
$(READY):
	@if [ ! -x $(BIN)/python ]; then \
		python=$$(tools/find-python $(PYTHON)) || exit 1; \
		"$$python" -m venv $(VENV) || exit 1; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	@touch $@

$(INSTALLED): pyproject.toml | $(READY)
	@echo "Installing fedlens into $(VENV); the first time takes a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEVELOPMENT): pyproject.toml | $(READY)
	@echo "Installing fedlens and its development tools into $(VENV); the first time takes a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[shakespeare]" --group dev
	@touch $@ $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/fedlens run digits

test: $(DEVELOPMENT)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

soak: $(DEVELOPMENT)
	$(BIN)/python -m pytest -m soak --numprocesses 2 --dist load
# It sees what is in .venv, and holds only what an extra adds: TensorFlow changes no version that the other tests run on.
# Nothing is compiled ahead: tests import a small part of what comes with it.
$(EXTRAS_READY): pyproject.toml | $(DEVELOPMENT)
	@echo "Installing the extra tensorflow into $(EXTRAS); the first time takes a minute"
	@$(BIN)/python -m venv --clear --without-pip $(EXTRAS)
	@$(BIN)/python -c "import sysconfig as s; print(s.get_path('purelib'))" \
		> $$($(EXTRAS)/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/base.pth
	@$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[tensorflow]"
	@touch $@

test-extras: $(EXTRAS_READY)
	$(EXTRAS)/bin/python -m pytest -m tensorflow

check: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEVELOPMENT)
	$(BIN)/python benchmarks/compare.py

bench-peers: $(DEVELOPMENT)
	$(BIN)/python benchmarks/compare.py --peers

bench-claims: $(DEVELOPMENT)
	$(BIN)/python benchmarks/claims.py

clean:
	rm -rf $(VENV) $(EXTRAS) .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
