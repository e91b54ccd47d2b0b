# make demo   the main job: a PyTorch checkpoint in, fine-tuned on 8 replicas, and home again
# make test   lint, types, tests
# make lowest, make newest-torch, make newest   the tests with other versions: docs/versions.md
# make release-check   sdist and wheel, and what the wheel alone does with each extra, in fresh environments
# make docs   the site in site/, strictly, its notebooks executed; make docs-serve shows it, the notebooks as they stand
# make fuzz   other random examples than the suite's, and twenty times as many; SEED=... repeats a run
# All set up .venv first, and again only when pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Compiling takes longer than running in nearly every test. XLA ends at flags that it does not know: lanes.py tries these,
# and passes those on that the XLA at hand accepts.
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false

ifndef SEED
SEED := $(shell $(PYTHON) -c 'import secrets; print(secrets.randbelow(2**32))')
endif

.PHONY: demo test lowest newest-torch newest release-check docs docs-serve fuzz lint types clean

demo: $(READY)
	$(BIN)/python examples/finetune.py $(OPTIONS)

test: lint types
	QUICK="$(QUICK)" $(BIN)/python lanes.py locked $(OPTIONS)

lowest newest-torch newest release-check: $(READY)
	QUICK="$(QUICK)" $(BIN)/nox -s $@ -- $(OPTIONS)

fuzz: $(READY)
	@echo "make fuzz SEED=$(SEED)"
	JAXNORM_FUZZ=20 XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(BIN)/python -m pytest -q -n 2 --dist worksteal -m hypothesis \
		--hypothesis-seed=$(SEED) $(OPTIONS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(BIN)/mkdocs build --strict $(OPTIONS)

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 DOCS_EXECUTE=false $(BIN)/mkdocs serve $(OPTIONS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	sys.exit(sys.version_info < (3, 11) and "jaxnorm needs Python 3.11, this is " + v + ": make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .nox build dist out site
