# One command each. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXPERIMENT ?= sample
ONLY =
VARIANT =
PROFILE =
GPU =
# The one door to the graph: it asks every node's record what is done, and ends all that it started.
DO = @exec $(shell command -v setpriv > /dev/null && echo setpriv --pdeathsig TERM) python -m bandmask.run
OF = "$(EXPERIMENT)" --variant="$(VARIANT)"
export PATH := $(abspath $(BIN)):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help install demo run plan status thesis thesis-plan test test-slow test-notebooks test-slurm same notebooks lint format site lab viewer bench lock clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(STAMP): requirements.lock models.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d; try: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of requirements.lock into $(VENV) (about 7.5 GB with CUDA libraries; minutes) ..."
	@awk '/^[^ ]/ {uv = /^uv==/} uv' requirements.lock > $(VENV)/uv.lock  # the pin of uv, with its hashes
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock || { \
	  echo "uv could not; pip, which may know another index, goes on ..."; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r models.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -q bandmask
	@touch $@

install: $(STAMP) ## make .venv from the lock file

demo: $(STAMP) ## real images lose bands; and the whole job from scratch on the embedded scene: tables and a report
	$(DO) graph sample
	$(DO) graph mini

run: $(STAMP) ## an experiment: make run EXPERIMENT=eurosat; a file of your own; a variant: EXPERIMENT=thesis VARIANT=moco; on a cluster: PROFILE=profiles/slurm GPU=1
	$(DO) graph $(OF) --profile="$(PROFILE)" $(if $(GPU),--gpu $(GPU))

plan: $(STAMP) ## what would run and why, without running it
	$(DO) plan $(OF)

status: $(STAMP) ## how far it is: done, running, stalled, failed, to do
	$(DO) status $(OF)

thesis: $(STAMP) ## the whole grid of the thesis, with its data and weights; `make thesis-plan` lists it
	$(DO) graph thesis --variant=all --profile="$(PROFILE)" $(if $(GPU),--gpu $(GPU))

thesis-plan: $(STAMP) ## every run of that grid, and how it stands
	$(DO) plan thesis --variant=all

PYTEST = OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --ignore tests/browser tests

test: $(STAMP) ## every property, every notebook, the viewer in a browser
	@$(PYTEST) -m "not slow"
	@python -m pytest tests/browser  # alone: a browser that waits for a starved kernel gives up
	@$(MAKE) --no-print-directory test-notebooks

test-slow: $(STAMP) ## what takes longer: kills, whole graphs, real EuroSAT, memory, several processes; then Slurm
	@$(PYTEST) -m slow
	@$(MAKE) --no-print-directory test-slurm

test-notebooks: $(STAMP) ## every notebook, in two chains: those that stand on the small encoder, and the others
	@export BANDMASK_OUTPUTS=$$(mktemp -d); log=$$BANDMASK_OUTPUTS/chain.log; \
	export OMP_NUM_THREADS=$$((($$(getconf _NPROCESSORS_ONLN) + 1) / 2)); \
	check() { python -m pytest --nbval-lax --nbval-cell-timeout=900 -p no:cacheprovider "$$@"; }; \
	check notebooks/00*.ipynb notebooks/0[3-7]*.ipynb > $$log 2>&1 & chain=$$!; \
	check notebooks/0[1289]*.ipynb notebooks/1*.ipynb notebooks/voila; status=$$?; \
	wait $$chain || status=$$?; cat $$log; rm -rf "$$BANDMASK_OUTPUTS"; exit $$status

test-slurm: $(STAMP) ## the graph on a real two-node Slurm, one node lost (needs slurm-wlm, munge, root)
	@python -m pytest tests/slurm

same: $(STAMP) ## the same figures as another commit? make same REF=47b73a7
	@python tests/slow/same.py $(REF)

notebooks: $(STAMP) ## run the notebooks whose code changed, and keep their figures in git: make notebooks ONLY="01 04"
	@python notebooks/keep.py $(ONLY)

lint: $(STAMP) ## ruff, types, import directions, what notebooks keep
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports
	@python notebooks/keep.py --check

format: $(STAMP) ## let ruff format
	@ruff check --fix . && ruff format .

viewer: $(STAMP) ## bands switched off on real images, as a page on localhost: make viewer EXPERIMENT=eurosat
	@cd notebooks/voila && EXPERIMENT=$(if $(filter file,$(origin EXPERIMENT)),mini,$(EXPERIMENT)) voila viewer.ipynb  # with voila.json beside it

site: $(STAMP) ## the book of notebooks, API and findings: outputs/site/index.html
	@sphinx-build -q -W -c docs -b html . outputs/site && echo outputs/site/index.html

lab: $(STAMP) ## JupyterLab on localhost
	@jupyter lab --ip=127.0.0.1 $$([ "$$(id -u)" != 0 ] || echo --allow-root) notebooks

bench: $(STAMP) ## throughput of reading, masking and training
	@python benchmarks/throughput.py

lock: $(STAMP) ## pin the dependencies anew
	@uv pip compile pyproject.toml --extra dev --extra models --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --no-emit-index-url --no-emit-find-links --no-header --quiet -o requirements.lock
	@sed -i '1i # Every package `make` installs, pinned and with checksums, for Python 3.11 and later. Made by `make lock`.' requirements.lock

clean: ## remove .venv; outputs/ stays
	@rm -rf $(VENV)
