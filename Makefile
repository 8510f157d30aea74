# SGLANG: what the patch is built against and tested on: a release number, a git
# checkout or an installed package folder. It is copied; nothing outside this folder
# is changed.
SGLANG ?= 0.5.12.post1
PYTHON ?= python3
# VENV= (empty) runs in the caller's environment, as on a GPU host.
VENV ?= .venv

READY := $(if $(VENV),$(VENV)/.ready)
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
PIP := $(RUN) -m pip --quiet --disable-pip-version-check

.PHONY: run test lint clean

# Patch a real SGLang, run its own prefill code and print how exact the result is.
run: $(READY)
	@$(RUN) test/demo.py --sglang $(SGLANG)

test: $(READY)
	$(RUN) -m pytest -n 2 --cov --cov-report=term --sglang $(SGLANG)

lint: $(READY)
	@$(PIP) install '.[lint]'
	$(RUN) -m isort --check .
	$(RUN) -m black --check .
	$(RUN) -m ruff check --select=F401 .

clean:
	rm -rf .venv .build build *.egg-info

$(VENV)/.ready: setup.cfg
	@echo "Setting up $(VENV) with torch and what SGLang imports: 2 GB, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable '.[sglang,test]'
	@$(PIP) install --no-deps torchvision==0.28.0
	@touch $@
