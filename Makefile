# `make` alone lists the targets. Needs Python 3.10 or newer; another one than python3: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make the environment .venv, with the tested versions

$(VENV)/.installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minVQ needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: install  ## DQ-VAE and DQ-Transformer on the embedded dataset, end with new images (5 minutes on 2 cores)
	$(BIN)/python train_stage1.py --config configs/quickstart/demo_dqvae.yaml --resume auto
	$(BIN)/python train_stage2.py --config configs/quickstart/demo_dq_transformer.yaml --resume auto
	$(BIN)/python evaluate.py --run runs/demo_dqvae --images 100 --features efficientnet_lite2 --without lpips --markdown

test: install  ## run the tests, one process per core (5 to 12 minutes on 2 cores)
	$(BIN)/python -m pytest -n logical --dist loadgroup

lint: install  ## check the style
	$(BIN)/ruff check .

clean:  ## remove the environment and caches, but not runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache `find . -name __pycache__ -not -path './.venv/*'`
