# make demo   set up, train on the embedded digits, sample, and say where the pictures are
# make demo-text   the same with captions: pictures of two digits, and whether they are as their captions say
# make test   set up and run the tests
# make lint   ruff and mypy
# ACCEL=cuda12, cuda13 or tpu chooses the build of jax (default: CPU).

PYTHON ?= python3
VENV ?= .venv
ACCEL ?=
RUN ?= runs/digits
TEXT_RUN ?= runs/digits_text

comma := ,
BIN := $(VENV)/bin
# Without ACCEL jax has no accelerator: say so, and it does not look for one.
export JAX_PLATFORMS ?= $(if $(ACCEL),,cpu)

.PHONY: demo demo-text test lint clean

demo: $(VENV)/.installed-$(ACCEL)
	$(BIN)/python train.py --train.workdir $(RUN)
	$(BIN)/python sample.py --workdir $(RUN) --num-samples 1000 --steps 12 --cfg-scale 1.25 --batch-size 250 --out $(RUN)/samples.png --npz $(RUN)/samples.npz
	$(BIN)/python evaluate.py --npz $(RUN)/samples.npz
	@echo "Pictures: $(RUN)/samples.png; samples during training: $(RUN)/samples/"

demo-text: $(VENV)/.installed-$(ACCEL)
	$(BIN)/python train.py --config configs/digits_text.py --train.workdir $(TEXT_RUN)
	$(BIN)/python sample.py --workdir $(TEXT_RUN) --prompts dit_jax/assets/digits_text_prompts.txt --num-samples 500 --steps 16 --cfg-scale 2 --batch-size 250 --grid-count 25 --out $(TEXT_RUN)/samples.png --npz $(TEXT_RUN)/samples.npz
	$(BIN)/python evaluate.py --npz $(TEXT_RUN)/samples.npz
	@echo "Pictures: $(TEXT_RUN)/samples.png; samples during training: $(TEXT_RUN)/samples/"

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
	$(BIN)/pip install -q -c requirements-test.txt -e ".[test,interop,text,bucket$(if $(ACCEL),$(comma)$(ACCEL))]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"PYTHON is {v[0]}.{v[1]}; expected Python 3.11 or newer, for example: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) runs data build *.egg-info .cache
