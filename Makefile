.PHONY: demo test test-fast soak results check fix docs
PYTHON ?= python3.11
BIN := .venv/bin

# The stamp is newer than pyproject.toml once everything that it names is installed.
# DS_BUILD_OPS=0: nothing of DeepSpeed is compiled at install time; on a CPU nothing is later either.
.venv/stamp: pyproject.toml
	test -x $(BIN)/python || $$(command -v $(PYTHON) || command -v python3) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# KEEP=1 leaves the endpoint up.
demo: .venv/stamp
	$(BIN)/python -m pipelines.demo $(if $(KEEP),--keep)
test: .venv/stamp
	$(BIN)/pytest -m "not gpu and not soak"
test-fast: .venv/stamp
	$(BIN)/pytest -m "not ray and not gpu and not slow and not soak"
soak: .venv/stamp
	$(BIN)/pytest -m soak
# What the papers' methods do on the real data of the folder DATA: 40 minutes; what is interrupted goes on where it was.
results: .venv/stamp
	$(BIN)/python benchmarks/real_data.py $(DATA) --figures build/figures
	$(BIN)/python benchmarks/results.py build/figures
check: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
fix: .venv/stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
# The generated parts of the README.
docs: .venv/stamp
	$(BIN)/python -m tests.house.readme
