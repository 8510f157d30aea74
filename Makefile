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
GPUS ?= 0
JOBS ?= 2
ONLY ?=

# What SGLang imports and does not run here.
IMPORTED := apache-tvm-ffi fastapi opentelemetry-api uvicorn xgrammar
READY := $(if $(VENV),$(VENV)/.ready)
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
PYTEST := $(RUN) -m pytest -n $(JOBS) --dist worksteal
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
SOURCES := *.py prefill_patch python test
BENCH = $(RUN) test/tools/bench.py --sglang $(SGLANG) $(if $(PEERS),--peers $(PEERS))

.PHONY: run test coverage test-releases new-release lint docs compile-check bench bench-check e2e accuracy clean

# Patch a real SGLang, run its own prefill code and print how exact the result is.
run: $(READY)
	@$(RUN) test/tools/demo.py --sglang $(SGLANG)

# The tests; fetches the attention kernels of one release, 120 MB.
test: $(READY)
	$(PYTEST) --sglang=$(SGLANG)

# The same, and what of the patch and its builder they run; half as long again.
coverage: $(READY)
	$(PYTEST) --sglang=$(SGLANG) --cov --cov-report=term

# What depends on the release, every batch included, on all of them: a quarter of an hour.
# Fetches their wheels, 10 MB each, and those of the attention kernels that they pin, 320 MB.
test-releases: $(READY)
	$(PYTEST) --every-release test/unit/test_releases.py test/unit/test_real_kernel.py

# Try the patch on a release that it does not know, and print what breaks.
new-release: $(READY)
	$(RUN) test/tools/new_release.py $(SGLANG)

# Compile every kernel for every GPU family and read the machine code; needs no GPU.
compile-check: $(READY)
	$(RUN) test/tools/compile_check.py --sglang $(SGLANG)

# On a GPU: tables, CSV and plots in OUT; QUICK=1 for a minute's worth.
bench: $(READY)
	@$(if $(VENV),$(PIP) install '.[bench]')
	$(BENCH) --out $(OUT) $(if $(QUICK),--quick)

# On a GPU: fail where a quick run is slower than the committed table.
bench-check: $(READY)
	$(BENCH) --quick --check docs/bench/mla_fp8_prefill.csv

# On a GPU: real servers, patched against unpatched, as OUT/README.md. GPUS=0,1 with the
# two-GPU part; ONLY="compare load" for some sections; QUICK=1 for a few minutes' worth.
e2e: OUT = e2e-results
e2e: $(READY)
	PYTHONPATH=test/tools:test/support:test:.:$$PYTHONPATH $(RUN) -m e2e --sglang $(SGLANG) --gpus $(GPUS) \
		--out $(OUT) $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

# On a GPU: the error against float64 of q, k, v, cache row and attention, as the table
# of docs/accuracy.md. QUICK=1 needs no GPU.
accuracy: $(READY)
	$(RUN) test/tools/accuracy.py --sglang $(SGLANG) $(if $(QUICK),--quick)

# The table of batches, when every release has passed it.
docs: test-releases
	$(RUN) test/support/batch_cases.py --sglang $(SGLANG) > .build/batches.md
	cp .build/batches.md docs/batches.md

lint: $(READY)
	$(RUN) -m isort --check $(SOURCES)
	$(RUN) -m black --check $(SOURCES)
	$(RUN) -m ruff check --select=F401 $(SOURCES)

clean:
	rm -rf .venv .build build *.egg-info

$(VENV)/.ready: setup.cfg
	@echo "Setting up $(VENV) with torch and what SGLang imports: 2 GB, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable '.[sglang,test]'
	@$(PIP) install --no-deps torchvision==0.28.0 $(IMPORTED)
	@touch $@
