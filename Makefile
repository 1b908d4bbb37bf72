# make demo: install what a federation on this machine needs, and run one.
# make test: install the development tools too, and run the tests.
# Both need only Python 3.11 or newer with its venv module, and a way to the package registry.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/site.installed
	$(BIN)/fedmermed-server simulate configs/demo.toml

test: .venv/dev.installed
	$(BIN)/python -m pytest

check: .venv/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/flwr build --app . && rm -f ./*.fab

.venv/%.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv
