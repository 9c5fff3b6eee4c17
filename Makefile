# Needs Python 3.11, pip and make; everything else goes into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
PROMPT ?= If you want to keep a secret,

.PHONY: demo test lint docs check clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py "$(PROMPT)"

test: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict --site-dir build/site

check: lint docs
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[fhe,linear,server,client,page]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[fhe,ckks,linear,sweep,cluster,server,client,page,train,docs,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
