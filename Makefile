.PHONY: check lint test format
BIN := .venv/bin

check: lint test  ## what has to pass before a commit

lint:  ## style, format and types
	bash scripts/lint.sh

test:
	bash scripts/test.sh

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
