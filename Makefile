.PHONY: check lint types test format
BIN := .venv/bin

check: lint types test  ## what has to pass before a commit

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy avllm

test:
	bash scripts/test.sh

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
