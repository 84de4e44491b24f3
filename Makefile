# make demo   set up, train on the embedded digits, sample, and say where the pictures are
# make test   set up and run the tests
# make lint   ruff and mypy
# ACCEL=cuda12, cuda13 or tpu chooses the build of jax (default: CPU).

PYTHON ?= python3
VENV ?= .venv
ACCEL ?=
RUN ?= runs/digits

comma := ,
BIN := $(VENV)/bin
# Without ACCEL jax has no accelerator: say so, and it does not look for one.
export JAX_PLATFORMS ?= $(if $(ACCEL),,cpu)

.PHONY: demo test lint clean

demo: $(VENV)/.installed-$(ACCEL)
	$(BIN)/python train.py --train.workdir $(RUN)
	$(BIN)/python sample.py --workdir $(RUN) --num-samples 1000 --steps 12 --cfg-scale 1.25 --batch-size 250 --out $(RUN)/samples.png --npz $(RUN)/samples.npz
	$(BIN)/python evaluate.py --npz $(RUN)/samples.npz
	@echo "Pictures: $(RUN)/samples.png; samples during training: $(RUN)/samples/"

test: $(VENV)/.installed-test-$(ACCEL)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-test-$(ACCEL)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/.installed-$(ACCEL): pyproject.toml requirements.txt | $(BIN)/python
	$(BIN)/pip install -q -c requirements.txt -e ".$(if $(ACCEL),[$(ACCEL)])"
	@touch $@

$(VENV)/.installed-test-$(ACCEL): pyproject.toml requirements.txt requirements-test.txt | $(BIN)/python
	$(BIN)/pip install -q -c requirements-test.txt -e ".[test,interop,text$(if $(ACCEL),$(comma)$(ACCEL))]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"PYTHON is {v[0]}.{v[1]}; expected Python 3.11 or newer, for example: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) runs data build *.egg-info .cache
