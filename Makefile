# SGLANG: what the patch is built against and tested on: a release number, a git
# checkout or an installed package folder. It is copied; nothing outside this folder
# is changed.
SGLANG ?= 0.5.12.post1
PYTHON ?= python3
# VENV= (empty) runs in the caller's environment, as on a GPU host.
VENV ?= .venv
# PEERS: a folder with SGLang 0.5.13's fp8_quantize.py and mla_kv_pack_quantize_fp8.py.
PEERS ?=
OUT ?= bench-results

READY := $(if $(VENV),$(VENV)/.ready)
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
SOURCES := conftest.py prefill_patch python test
BENCH = $(RUN) test/bench.py --sglang $(SGLANG) $(if $(PEERS),--peers $(PEERS))

.PHONY: run test lint docs compile-check bench bench-check clean

# Patch a real SGLang, run its own prefill code and print how exact the result is.
run: $(READY)
	@$(RUN) test/demo.py --sglang $(SGLANG)

test: $(READY)
	$(RUN) -m pytest -n 2 --cov --cov-report=term --sglang $(SGLANG)

# Compile every kernel for every GPU family and read the machine code; needs no GPU.
compile-check: $(READY)
	$(RUN) test/bench.py --sglang $(SGLANG) --compile-check

# On a GPU: tables, CSV and plots in OUT; QUICK=1 for a minute's worth.
bench: $(READY)
	@$(if $(VENV),$(PIP) install '.[bench]')
	$(BENCH) --out $(OUT) $(if $(QUICK),--quick)

# On a GPU: fail where a quick run is slower than the committed table.
bench-check: $(READY)
	$(BENCH) --quick --check docs/bench/mla_fp8_prefill.csv

# What is generated from the tests.
docs: $(READY)
	$(RUN) test/batch_cases.py --sglang $(SGLANG) > .build/batches.md
	cp .build/batches.md docs/batches.md

lint: $(READY)
	@$(PIP) install '.[lint]'
	$(RUN) -m isort --check $(SOURCES)
	$(RUN) -m black --check $(SOURCES)
	$(RUN) -m ruff check --select=F401 $(SOURCES)

clean:
	rm -rf .venv .build build *.egg-info

$(VENV)/.ready: setup.cfg
	@echo "Setting up $(VENV) with torch and what SGLang imports: 2 GB, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable '.[sglang,test]'
	@$(PIP) install --no-deps torchvision==0.28.0
	@touch $@
