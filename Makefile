# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: demo test check fix docs bench goldens clean

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; this is %d.%d. Try: make PYTHON=python3.12 demo" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv

.venv/base.stamp: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(RUN) pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/train.stamp: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@# torch first and alone: the pinned CPU or CUDA build, whichever this machine's pip finds
	$(RUN) pip install -q --disable-pip-version-check -c constraints.txt torch
	$(RUN) pip install -q --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/train.stamp
	$(RUN) pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

demo: .venv/train.stamp
	@$(BIN)/python -m ollama_forge demo

test: .venv/dev.stamp
	$(RUN) pytest -n 2 --dist loadfile tests

check: .venv/dev.stamp
	$(RUN) ruff check src tests bench scripts
	$(RUN) ruff format --check src tests bench scripts
	$(RUN) mypy
	$(RUN) pytest -q tests/test_layers.py tests/test_docs.py

fix: .venv/dev.stamp
	$(RUN) ruff check --fix src tests bench scripts
	$(RUN) ruff format src tests bench scripts

docs: .venv/base.stamp
	$(BIN)/python scripts/write_cli_docs.py

bench: .venv/dev.stamp
	$(BIN)/python bench/run.py

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
