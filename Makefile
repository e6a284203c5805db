# Set-up, demo, tests, benchmark. Every target that needs the virtual environment makes it first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLAIN := $(VENV)/.plain
STAMP := $(VENV)/.installed

.PHONY: help demo demo-control seeds controlled-study reports rewards test test-fast test-long docs gpu lint format wheel bench assets clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          fine-tune the bundled generator with the bundled reward, print the before/after table (about ten minutes with installation)"
	@echo "make demo-control  the same run with lambda_r = 0, to compare with"
	@echo "make seeds         the demo with three training seeds, side by side (about 15 minutes on 2 cores; goes on where it was stopped)"
	@echo "make controlled-study  tune the bundled heads by labels, by controls and by label-free baselines: eight arms with three training seeds (CONTROLLED_STUDY_ARGS='--rewards=1 --label-sets=1': the short form; resumes where it was stopped)"
	@echo "make reports       what tuning changed, better or not, and why: four pages from a run and its control (a quarter of an hour on 2 cores)"
	@echo "make rewards       train rewards of depth, points and thumbs, tune by each, one table beside the bundled one (about a quarter of an hour on 2 cores)"
	@echo "make test          make lint, then make test-fast (about 10 minutes on 2 idle cores)"
	@echo "make test-fast     the fast tests alone, on 2 processes (PYTEST_ARGS='-n 4 -k words': other flags of pytest)"
	@echo "make test-long     the slow tests, on 1 process"
	@echo "make docs          the documentation as a site, build/docs/index.html; warnings are errors (a minute)"
	@echo "make gpu           all that a machine with a GPU has to show, on one page: runs/gpu/gpu.md (DEVICE=cpu KIMG=0.032 BENCH_ARGS=--quick: a rehearsal)"
	@echo "make lint          formatting (ruff format), ruff check, one assignment a line (tests/style.py), plain terms (tests/language.py), types (mypy); a minute, seconds the second time"
	@echo "make format        format every Python file with ruff format"
	@echo "make wheel         source distribution and wheel into dist/, and a check that the wheel holds every file of assets/"
	@echo "make bench         speed of every fast path against plain EG3D (about 35 minutes; BENCH_ARGS=--quick: half a minute)"
	@echo "make assets        regenerate everything in assets/ (about three and a half hours on 2 cores, reckoned from its parts; the generators are made with one thread)"

$(VENV): $(STAMP)

$(PLAIN): pyproject.toml constraints.txt
	@echo "== Making $(VENV) and installing the project with pinned versions (one to two minutes)"
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f'Python 3.11 or later is needed, got {v[0]}.{v[1]}; run make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[label]'
	@touch $(PLAIN)

$(STAMP): $(PLAIN)
	@echo "== Adding what tests, pages and reports need (one to two minutes)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(PLAIN)
	@echo "== train.py --reward=sigma --lambda-r=10: tune the bundled generator with the bundled reward"
	$(BIN)/python train.py --reward=sigma --lambda-r=10

demo-control: $(PLAIN)
	@echo "== train.py --reward=sigma --lambda-r=0: the control run"
	$(BIN)/python train.py --reward=sigma --lambda-r=0

seeds: $(STAMP)
	@echo "== The demo with training seeds 0, 1 and 2, into runs/seeds"
	$(BIN)/eg3d-rlhf report seeds $(SEEDS_ARGS)

controlled-study: $(STAMP)
	@echo "== Labels, controls and label-free baselines, with three training seeds each, into runs/controlled-study"
	$(BIN)/eg3d-rlhf report controlled-study $(CONTROLLED_STUDY_ARGS)

reports: $(STAMP)
	@echo "== The demo run and its control where missing, then evaluation, attribution, embedding and a small sweep, into runs/reports"
	$(BIN)/eg3d-rlhf report all $(REPORTS_ARGS)

rewards: $(STAMP)
	@echo "== Every reward on the bundled heads: trained, tuned by, and compared, into runs/rewards"
	$(BIN)/eg3d-rlhf report rewards $(REWARDS_ARGS)

test: lint test-fast

test-fast: $(STAMP)
	@echo "== Fast tests on 2 processes"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist=loadfile -m "not long and not gpu" $(PYTEST_ARGS)

test-long: $(STAMP)
	@echo "== Slow tests"
	$(BIN)/python -m pytest -m "long" $(PYTEST_ARGS)

docs: $(STAMP)
	@echo "== The documentation as a site, notebooks run"
	$(BIN)/sphinx-build -q -E -W --keep-going docs build/docs
	@echo "build/docs/index.html"

GPU_PARTS = "-m torch_utils.build" \
  "-m pytest -q -rs tests/torch_utils/cuda tests/torch_utils/test_cuda_check.py tests/training/test_batches.py" \
  "train.py --reward=sigma --lambda-r=10 --device=$(DEVICE) --kimg=$(KIMG) --no-summary --outdir=runs/gpu/training" \
  "-m benchmarks --device=$(DEVICE) --outdir=runs/gpu $(BENCH_ARGS)"

gpu: DEVICE = cuda
gpu: KIMG = 0.4
gpu: BENCH_ARGS = --torch-compile
gpu: $(STAMP)
	@echo "== Compilation, tests, training and benchmark on this machine's GPU, into runs/gpu"
	@mkdir -p runs/gpu
	@for part in $(GPU_PARTS); do echo "## $$part"; $(BIN)/python $$part || echo "**FAILED**"; done 2>&1 | tee runs/gpu/gpu.md
	@! grep -q "FAILED" runs/gpu/gpu.md

lint: $(STAMP)
	@echo "== Formatting, ruff check, one assignment a line, plain terms, types (a minute the first time)"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m tests.style
	$(BIN)/python -m tests.language
	$(BIN)/mypy

format: $(STAMP)
	@echo "== ruff format: lines of at most 110 columns"
	$(BIN)/ruff format .

# The wheel is built from the source distribution, which holds only what MANIFEST.in names: hence the check.
wheel:
	@echo "== Source distribution and wheel, into dist/"
	rm -rf dist build/packaging
	$(PYTHON) -m venv build/packaging
	build/packaging/bin/python -m pip install -q --disable-pip-version-check build twine
	build/packaging/bin/python -m build
	build/packaging/bin/twine check --strict dist/*
	@git ls-files assets | $(PYTHON) -c "import glob, sys, zipfile; held = zipfile.ZipFile(*glob.glob('dist/*.whl')).namelist(); \
	  lost = [name for name in sys.stdin.read().split() if f'eg3d_rlhf/{name}' not in held]; \
	  sys.exit(f'The wheel lacks {lost}. Check MANIFEST.in and setup.py.' if lost else 0)"
	@ls -l dist

bench: $(STAMP)
	@echo "== Every fast path against the straightforward one, into benchmarks/results"
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

assets: $(STAMP)
	@echo "== 1/9 heads of people: basis, pool of points, generator (about two hours)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[assets]'
	$(BIN)/python -m builders.build people
	@echo "== 2/9 features of the shape Frechet distance"
	$(BIN)/python -m builders.shapes
	@echo "== 3/9 feature network of the Frechet distance"
	$(BIN)/python -m builders.features
	@echo "== 4/9 labels"
	$(BIN)/python -m builders.build labels
	@echo "== 5/9 rewards"
	$(BIN)/python -m builders.build rewards
	@echo "== 6/9 control run"
	$(BIN)/python -m builders.build control
	@echo "== 7/9 the toy flow of Circular-DPO"
	$(BIN)/python -m builders.toy_flow
	@echo "== 8/9 the learned prior of score distillation"
	$(BIN)/python -m builders.view_prior
	@echo "== 9/9 networks that find faces (from wheels, 40 MB)"
	$(BIN)/python -m builders.face

# Targets of version 0.1 under their old names (eg3d_rlhf/core/renamed.py); to be removed at 1.0.
.PHONY: proof zoo
proof: NEW = controlled-study
zoo: NEW = rewards
proof zoo:
	@echo "make $@: is named $(NEW) now. Run make $(NEW)." >&2
	@exit 2

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
