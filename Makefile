# The verbs of this project. `make run` and `make test` are all a newcomer needs; each installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/local.yaml
PORT ?= 3000
HOST ?= 0.0.0.0

.PHONY: install run test test-slow lint format serve report dashboard bench bench-growth bench-gpu image image-train stack-local stack-docker stack-kubernetes clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

run: install
	$(BIN)/python run.py finetune --config $(CONFIG)

test: install
	$(BIN)/pytest --cov --cov-report=term

test-slow: install
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: install
	@test -f outputs/latest/bento.txt || { echo "There is no Bento yet; make run builds one." >&2; exit 1; }
	exec $(BIN)/python -m bentoml serve "$$(cat outputs/latest/bento.txt)" --host $(HOST) --port $(PORT)

report:
	@test -f outputs/latest/report.html || { echo "There is no report yet; make run writes one." >&2; exit 1; }
	@realpath outputs/latest/report.html
	@if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then \
		$(PYTHON) -m webbrowser "file://$$(realpath outputs/latest/report.html)"; fi

dashboard: install
	$(BIN)/zenml login --local

# ONLY=train,decode measures some groups of rows alone; an idle machine gives figures worth having.
bench: install
	$(BIN)/python -m benchmarks.run $(if $(ONLY),--only $(ONLY))

bench-growth: install
	$(BIN)/python -m benchmarks.growth

# On a machine with CUDA.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu

# BASE_IMAGE=, TORCH_INDEX= (its CUDA indices too) and BUILD_IMAGE= choose what they are made from: see the Dockerfiles.
image: install
	@$(BIN)/python run.py image service

image-train: install
	@$(BIN)/python run.py image steps

# Where steps run, from stacks/; safe to repeat. The last one is told ARTIFACT_STORE, REGISTRY and KUBERNETES_CONTEXT.
stack-local stack-docker stack-kubernetes: stack-%: install
	$(BIN)/python -m stacks.register $*

clean:
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
