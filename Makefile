# Every target makes and uses .venv (speed: .venv-peers) by itself; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: install demo test test-gpu test-all check speed results tables clean

install: .venv/installed
demo: install
	$(BIN)/python experiments/quickstart.py --out results/quickstart/demo --overwrite
# Two processes of one thread each: the tests are small, and threads would only wait for one another. The tests of a file share
# what they import and prepare.
test: .venv/tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
test-gpu: .venv/tested
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m gpu -n 4
test-all: .venv/tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"
check: .venv/checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
speed: .venv-peers/installed
	.venv-peers/bin/python experiments/speed.py --data-root $(or $(DATA),data)
# The reference runs that are not there yet, in hours; stopped, it goes on where it was. Then the tables of them.
results: .venv/installed
	$(BIN)/python -m experiments.tools.results --data-root $(or $(DATA),data)
	$(MAKE) tables
tables: .venv/installed
	$(BIN)/toolkit table --into README.md results/README.md
clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache .mypy_cache *.egg-info

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e .
	touch $@
.venv/tested: .venv/installed requirements-learn2learn.txt
	$(BIN)/python -m pip install --quiet -e ".[test]" -r requirements-learn2learn.txt
	touch $@
.venv-peers/installed: setup.cfg pyproject.toml requirements-learn2learn.txt requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -e . -r requirements-learn2learn.txt
	.venv-peers/bin/python -m pip install --quiet -r requirements-peers.txt
	touch $@
.venv/checked: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
