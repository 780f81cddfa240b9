# Both set-up targets make .venv themselves; the second time they do nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KIT ?= tiny
# A test has one thread, so a process a core; a process takes up to 2 GB.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow coverage mutants fuzz lint format typecheck ablations ablations-full doctor clean theory tasks bench scaling gpt2 results results-smollm2 moves equal-time blanks peers right-side

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## aligned text from the shipped kit, beside the base model's (no network, no GPU)
	$(BIN)/python -m dia_lightning predict

test: $(VENV)/.installed  ## the test suite but what takes minutes
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

coverage: $(VENV)/.installed  ## the test suite, and the lines that it does not run
	$(BIN)/python -m pytest $(PARALLEL) --cov=dia_lightning --cov-report=term-missing:skip-covered

mutants: $(VENV)/.installed  ## change the code of the samplers in one place at a time: does a test fail? ARGS="--sample 100" or a file
	$(BIN)/python tests/mutants.py $(ARGS)

fuzz: $(VENV)/.installed  ## random options, files and texts, 100,000 cases
	$(BIN)/python -m pytest $(PARALLEL) tests/reliability/test_fuzz.py --hypothesis-profile=fuzz

bench: $(VENV)/.installed  ## ratios of docs/performance.md, and seconds and network calls of the exact kernels
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/kernels.py

scaling: $(VENV)/.installed  ## one process against two, and the tables of docs/scaling.md (10 minutes)
	$(BIN)/python benchmarks/scaling.py

gpt2: $(VENV)/.installed  ## steps of GPT-2 small's configurations on random weights, and the batches that fit a GPU (10 minutes)
	$(BIN)/python benchmarks/gpt2.py

lint: $(VENV)/.installed  ## ruff: lint and format, changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed  ## ruff: mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed  ## mypy --strict on the package
	$(BIN)/mypy

tasks: $(VENV)/.installed  ## run the offline tasks and remake the tables of docs/tasks.md
	$(BIN)/python benchmarks/tasks.py

theory: $(VENV)/.installed  ## remake the plots and tables of docs/theory.md
	$(BIN)/python benchmarks/theory.py

results: $(VENV)/.installed  ## compare all methods on the tiny kit and remake the tables of docs/results.md (40 minutes)
	$(BIN)/python benchmarks/results.py

results-smollm2: $(VENV)/.installed  ## the same on SmolLM2, with its spans and texts (needs the extra smollm2; an hour)
	$(BIN)/python benchmarks/results.py --smollm2
	$(BIN)/python benchmarks/smollm2.py

moves: $(VENV)/.installed  ## effective samples of exact moves by position and second (hours; goes on where it was; ARGS="--minutes 60")
	$(BIN)/python benchmarks/moves.py --doc $(ARGS)

equal-time: $(VENV)/.installed  ## reward, log p_θ and distinct-2 of the methods at equal seconds (hours; goes on where it was)
	$(BIN)/python benchmarks/equal_time.py --doc $(ARGS)

blanks: $(VENV)/.installed  ## problems with fixed pieces: valid share, distance from the truth, reward (hours; goes on where it was)
	$(BIN)/python benchmarks/blanks.py --doc $(ARGS)

# Without their dependencies, whose ranges would fetch gigabytes of CUDA packages.
.venv-peers/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps genlm-control==0.4.1 genlm-backend==0.3.1 genlm-bytes==0.2.0 genlm-grammar==0.2.0 arsenal==3.1.3
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt transformers accelerate vaderSentiment matplotlib scipy pandas nltk regex numba ipython json-stream jsonschema frozendict interegular lark graphviz sentencepiece protobuf
	@touch $@

peers: $(VENV)/.installed .venv-peers/.installed  ## genlm-control and this package side by side (hours; goes on where it was)
	$(BIN)/python benchmarks/peers/compare.py --doc $(ARGS)

right-side: $(VENV)/.installed  ## what the right side is worth and what proposals make of it, in docs/results.md (KIT=tiny: 5 minutes)
	$(BIN)/python benchmarks/right_side.py $(KIT)

ablations: $(VENV)/.installed  ## the ablation grid and its report, in runs/ablations; KIT=gpt2 for another kit
	$(BIN)/python -m dia_lightning study configs/ablations/*.yaml --out runs/ablations --kit $(KIT) $(ARGS)

ablations-full: $(VENV)/.installed  ## those, and drafts, cuts and moves of the population
	$(BIN)/python -m dia_lightning study configs/ablations/*.yaml configs/ablations/full/*.yaml --out runs/ablations --kit $(KIT) $(ARGS)

doctor: $(VENV)/.installed  ## who owns the script `lightning`, and which versions are installed
	$(BIN)/python -m dia_lightning.lab.doctor

clean:  ## remove the environment and everything that runs wrote
	rm -rf $(VENV) .venv-peers runs
