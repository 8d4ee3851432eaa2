# Two commands do everything on a fresh machine, and each makes .venv by itself:
#   make demo    train the twelve rungs of the ladder, print the table, write the report
#   make test    pass the tests
# And make bench measures ours beside its peers, with what more BENCH says, as in BENCH="--quick --nanogpt ../nanoGPT".
PY ?= python3
BIN := .venv/bin

demo: .venv/ok
	$(BIN)/classiclm demo

test: .venv/ok
	$(BIN)/python -m pytest -n 2 -q

test-slow: .venv/ok
	$(BIN)/python -m pytest -n 2 -q -m slow

bench: .venv/ok
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks $(BENCH)

lint: .venv/ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ok
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ok: pyproject.toml constraints.txt
	$(PY) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: demo test test-slow bench lint format
