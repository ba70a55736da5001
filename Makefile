# `make run` and `make test` set everything up by themselves, on a CPU machine and on a CUDA machine alike.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out
# Under a CPU interpreter Triton kernels run without a GPU; a CUDA machine compiles them.
INTERPRET := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 0 || echo 1)

CHECK_PYTHON = $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] <= (3, 13) else f"sparsediff needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}; set PYTHON=python3.12, say")'

# A quarter of an hour on two cores from a fresh clone, set-up included, is the limit of what runs at every change.
TESTS := not gpu and not slow

.PHONY: test-all setup run demo test matrix browser gpu lint fmt wheel check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

run: setup
	$(BIN)/sparsediff compare --out $(OUT)

demo: setup
	$(BIN)/sparsediff demo $(ARGS)

# Pages are tested in Chromium.  Without one, root gets Debian's; anybody else is told, and those tests skip.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null 2>&1 && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  echo "installing Chromium for the tests of pages"; \
	  { apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core; } >/dev/null 2>&1 && exit 0; \
	fi; \
	echo "no Chromium: tests of pages will skip. Install it (Debian: apt-get install chromium fonts-dejavu-core) to run them."

test: setup browser
	# One thread a worker: two workers of two threads on two cores wait for each other.
	OMP_NUM_THREADS=1 TRITON_INTERPRET=$(INTERPRET) $(BIN)/python -m pytest -m "$(TESTS)" -n auto --maxprocesses 8 $(ARGS)

# With the tests that take longest, some of them of whole pages.
test-all: TESTS := not gpu
test-all: test

# The conformance tests in the oldest diffusers that is promised, in the newest and in a pre-release where there is one, each in
# an environment of its own (RELEASES="0.39.0 0.40.0" for others): some gigabytes and a quarter of an hour each.
matrix:
	$(CHECK_PYTHON)
	TRITON_INTERPRET=$(INTERPRET) $(PYTHON) tests/support/diffusers_matrix.py $(RELEASES)

gpu: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)

fmt: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

wheel: setup
	rm -rf build dist && $(BIN)/python -m pip wheel --no-deps -w dist .

check: lint test

clean:
	rm -rf build dist $(OUT) *.egg-info
