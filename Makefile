# Every command of this project. A newcomer needs `make run` and `make test`; each target installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/local.yaml
PORT ?= 3000
HOST ?= 127.0.0.1
OUTPUTS := $(or $(GPT2_INSTRUCT_OUTPUTS),outputs)

.PHONY: help install run test test-slow test-kubeflow chaos lint audit hashes licenses format serve report dashboard bench bench-growth gpu-check image image-train stack-local stack-docker stack-kubernetes stack-kubeflow experiment clean

help:  ## show this list
	@sed -nE 's/^([a-z -]+):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r names text; do \
		printf '%-15s %s\n' "$${names%% *}" "$$text"; done

install: .venv/.installed  ## install everything into .venv; targets that need it do so themselves

# Creates a virtual environment. One of another Python version, for example of a failed first attempt, is cleared before.
define venv
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else \
		"$(PYTHON) is Python %d.%d, but 3.11, 3.12 or 3.13 is needed; choose one: make $(MAKECMDGOALS) PYTHON=python3.13" % v[:2])'
	$(PYTHON) -m venv $$([ "$$($(1)/bin/python -V 2>&1)" = "$$($(PYTHON) -V)" ] || echo --clear) $(1)
endef

.venv/.installed: pyproject.toml constraints.txt setup.py gpt2core/inference/native.c $(wildcard gpt2core/inference/*.h)
	$(call venv,.venv)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

run: install  ## run the whole pipeline with CONFIG (configs/local.yaml)
	$(BIN)/python run.py finetune --config "$(CONFIG)"

test: install  ## run the quick tests
	$(BIN)/pytest --cov --cov-report=term

test-slow: install  ## run the slow tests
	$(BIN)/pytest -m slow

# kfp conflicts with protobuf and click-option-group in constraints.txt, so its tests run in a separate environment.
test-kubeflow: .venv-kubeflow/.installed  ## run the tests that need kfp, in .venv-kubeflow
	.venv-kubeflow/bin/pytest tests/stacks -k kubeflow

.venv-kubeflow/.installed: pyproject.toml constraints.txt
	$(call venv,.venv-kubeflow)
	grep -vE '^(protobuf|click-option-group)==' constraints.txt > .venv-kubeflow/constraints.txt
	.venv-kubeflow/bin/pip install --quiet --disable-pip-version-check -c .venv-kubeflow/constraints.txt \
		-e '.[pipeline,serve,deploy,test,kubeflow]'
	touch $@

# Inject faults into runs of configs/dev.yaml and print the effects; KILLS=1 is the short form (docs/reliability.md).
chaos: install  ## inject faults into runs, and print the effects
	$(BIN)/python -m tests.chaos --kills $(or $(KILLS),5)

lint: install  ## check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Check the pinned dependencies for known vulnerabilities; needs PyPI's advisories, so CI does not depend on it.
audit: install  ## check the pinned dependencies for known vulnerabilities
	$(BIN)/uv tool run pip-audit --strict --no-deps --disable-pip -r constraints.txt

# Run after changing bentos/requirements.txt, pyproject.toml or constraints.txt: writes the hashes of all files on the index for
# the images of service and steps, for every platform. Not torch and its CUDA libraries, whose wheels come from TORCH_INDEX.
COMPILE := uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11 \
	--python-platform linux
hashes: install  ## write the hashes of the packages in the images
	grep == bentos/requirements.txt | grep -v ^torch== | $(BIN)/$(COMPILE) - --no-deps -o bentos/requirements-hashed.txt
	echo torch | $(BIN)/$(COMPILE) pyproject.toml --extra pipeline --extra serve --extra deploy bentos/requirements.txt \
		-c constraints.txt --excludes /dev/stdin -o requirements-hashed.txt

licenses: install  ## list the licenses of the dependencies
	@$(BIN)/python -m tests.test_licenses

format: install  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: install  ## serve the newest run on PORT (3000)
	@test -f "$(OUTPUTS)/latest/bento.txt" || { echo "There is no Bento yet; build one with: make run" >&2; exit 1; }
	exec $(BIN)/python -m bentoml serve "$$(cat "$(OUTPUTS)/latest/bento.txt")" --host $(HOST) --port $(PORT)

report:  ## open the report of the newest run
	@test -f "$(OUTPUTS)/latest/report.html" || { echo "There is no report yet; write one with: make run" >&2; exit 1; }
	@realpath "$(OUTPUTS)/latest/report.html"
	@if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then \
		$(PYTHON) -m webbrowser "file://$$(realpath "$(OUTPUTS)/latest/report.html")"; fi

dashboard: install  ## open ZenML's dashboard
	$(BIN)/zenml login --local

# Compare with other implementations. Use an idle machine. ONLY=train,decode measures only these groups.
# Peers that cannot be installed are skipped, and their rows say so.
bench: install  ## compare with other implementations; ONLY=train,decode measures those groups
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt ctranslate2
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt openvino-genai nncf
	$(BIN)/python -m benchmarks.run $(if $(ONLY),--only $(ONLY))

bench-growth: install  ## draw scaling curves
	$(BIN)/python -m benchmarks.growth

# Test and measure on a CUDA device, in under 8 minutes. Installs nothing: PYTHON must have torch, transformers, peft,
# tiktoken, safetensors and pytest. DEVICE=cpu is a dry run at the smallest size; ONLY=tests,training runs those stages.
gpu-check:  ## test and measure on a CUDA device
	$(PYTHON) -m benchmarks.gpu $(if $(DEVICE),--device $(DEVICE)) $(if $(ONLY),--only $(ONLY))

# BASE_IMAGE, BUILD_IMAGE and TORCH_INDEX (an index of CUDA wheels for a GPU image) are explained in the Dockerfiles.
image: install  ## build the image of the newest run
	@$(BIN)/python run.py image service

image-train: install  ## build the image of the steps
	@$(BIN)/python run.py image steps

# Register a stack of stacks/ and make it the active one; safe to repeat. stack-kubernetes reads ARTIFACT_STORE, REGISTRY
# and KUBERNETES_CONTEXT from the environment, stack-kubeflow KUBEFLOW_HOST instead of KUBERNETES_CONTEXT.
stack-local stack-docker stack-kubernetes stack-kubeflow: stack-%: install  ## register a stack and make it active (also stack-docker, -kubernetes, -kubeflow)
	$(BIN)/python -m stacks.register $*

# NAME is a file of configs/experiments; SCALE=full needs a GPU and the weights of gpt2.
experiment: install  ## run the sweep NAME of configs/experiments
	$(BIN)/python run.py sweep --config configs/experiments/$(NAME).yaml --set sweep.scale=$(or $(SCALE),small)

clean:  ## remove outputs/ and caches
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
