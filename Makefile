# make reproduce            set up, then draw every figure of tier quick from nothing (2 cores, no download)
# make reproduce TIER=small DATA=folder     the same on real images; DATA holds cifar10/train-*.tar.gz
# make reproduce SEED=7     the same with other seeds: of the runs, and of the images that are rendered
# make figures TIER=small   redraw from the committed checkpoints, no training
# make evaluate TIER=medium DATA=folder     evaluate the committed weights again, no training; results replace those beside them
# make export TIER=small      keep small checkpoints of a tier's runs beside its figures
# make test                 every notebook and every test
# make report             build report/index.html from whatever is there: findings, claims, figures, notebooks, API
# make lab                  JupyterLab on nbs/
# make dry                  what `make reproduce` would run, how long that is planned to take, and why
# make setup                only the environment, in .venv
SHELL  := /bin/sh
TIER   ?= quick
DATA   ?= data
SEED   ?=
CORES  ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
export TIER SEED
reproduce figures evaluate dry export: export DATA := $(DATA)
## a value reaches the shell as a variable of the environment, so that quotes and the like in it are not read as commands
RUN     = JEPA_NB_PARENT=$$PPID exec .venv/bin/python -m jepa_nb.cli reproduce --tier "$$TIER" --cores "$(CORES)" --data "$$DATA" $${SEED:+--seed "$$SEED"}

.PHONY: help setup reproduce figures evaluate export dry report test lab
.DEFAULT_GOAL := help
help:
	@sed -n 's/^# //p' Makefile
setup:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; say: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@exec "$(PYTHON)" workflow/setup.py
## PPID and exec: make is the launcher's parent and the launcher knows it, so that it ends when make is killed, and everything below with it
reproduce: setup
	@$(RUN)
figures: setup
	@$(RUN) --committed
evaluate: setup
	@$(RUN) --evaluate
export: setup
	@$(RUN) export
dry: setup
	@$(RUN) --dry
report: setup
	@exec .venv/bin/python -m jepa_nb.cli report
test: setup
	@"$(PYTHON)" workflow/setup.py interop
	@exec .venv/bin/python -m pytest -n "$(CORES)" --dist worksteal
lab: setup
	@exec .venv/bin/jupyter lab --ServerApp.ip=127.0.0.1 nbs
