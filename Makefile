# make serve     create the environment, build the demo encoder if absent, serve it on port 8000
# make test      every test that this machine can run
# make lowest    some of them on the lowest versions that are promised
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install serve test test-service test-others test-tools check format programs bench-cpu bench-products bench-http bench-front-ends bench-mixed bench-overload bench-bulk bench-ray soak fuzz bench-simulate bench-gpu bench-train bench-quantization bench-billions bench-build-memory trace peers fidelity-table build docs container-test monitoring-test chart-test audit clean

install: $(INSTALLED)

# torch first: its exact version decides what the rest resolves against.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llm2vec-service needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	@echo "installing into $(VENV), which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bulk,demo,dev,clients,docs,eval,otel,ray,train]'
	@touch $@

serve: install
	$(BIN)/llm2vec-service serve

build: install
	$(BIN)/llm2vec-service build --recipe demo

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	$(BIN)/pytest

# All tests in two parts of about the same work, to run side by side. The first times what servers do, so the second is
# nice to it; together in the second are those of the encoder that takes a minute to build.
OTHERS := $(addprefix tests/,bench clients deploy e2e/test_demo.py fidelity gpu model_store)

test-service: install
	$(BIN)/pytest $(addprefix --ignore=,$(OTHERS))

test-others: install
	nice $(BIN)/pytest $(OTHERS)

# A telling part of the tests on the lowest versions that pyproject.toml promises, in an environment of their own.
LOWEST_VENV := build/lowest-venv
LOWEST_PINS := tests/lowest-constraints.txt
LOWEST_TESTS := $(addprefix tests/model_store/,test_attention.py test_build.py test_merged_linear.py test_on_device.py test_rope.py test_cpu_linear.py test_pooling.py test_recipe.py test_sources.py test_tokenizer.py test_verify.py) \
	$(addprefix tests/service/,test_access.py test_api.py test_cohere.py test_cors.py test_hostile.py test_metrics.py test_ollama.py test_settings.py test_tei.py) \
	$(addprefix tests/e2e/test_server.py::test_,vectors_over_http_are_the_encoder_s sigterm_answers_what_was_accepted_and_ends_with_0 eval_against_the_server) \
	$(addprefix tests/e2e/test_limits.py::test_,a_large_header_is_refused what_is_no_http_gets_400 a_request_smuggled_behind_two_lengths_is_refused)

.PHONY: lowest
# Old packages use what newer ones deprecate, which is no fault of this code.
lowest: $(LOWEST_VENV)/.installed
	$(LOWEST_VENV)/bin/pytest -W default::DeprecationWarning $(LOWEST_TESTS)

# After make install, as both write the metadata of this project here; its dependencies can come at the same time.
$(LOWEST_VENV)/.installed: $(LOWEST_VENV)/.dependencies pyproject.toml | $(INSTALLED)
	$(LOWEST_VENV)/bin/pip install --quiet --constraint $(LOWEST_PINS) --editable .
	@touch $@

$(LOWEST_VENV)/.dependencies: $(LOWEST_PINS)
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/pip install --quiet --requirement $<
	@touch $@

# Each prints what it measures and ends with one JSON object; --save, by SAVE=--save, keeps it in bench/results/.
bench-cpu: install
	$(BIN)/python -m bench.cpu $(SAVE)

bench-products: install
	$(BIN)/python -m bench.products $(SAVE)

bench-http: install
	$(BIN)/python -m bench.http_path $(SAVE)

# Needs about six cores.
bench-front-ends: install
	$(BIN)/python -m bench.http_path --front-ends 1 2 4 --clients 2 --connections 64 --cases 640/base64/1 $(SAVE)

bench-mixed: install
	$(BIN)/python -m bench.mixed $(SAVE)

bench-overload: install
	$(BIN)/python -m bench.overload $(SAVE)

# Draws build/trace.png; MODEL=DIR for an encoder of your own.
trace: install
	$(BIN)/python -m bench.trace $(if $(MODEL),--model $(MODEL)) $(SAVE)

# Ten minutes; see tests/faults/soak.py.
soak: install
	mkdir -p build
	SOAK_SECONDS=600 SOAK_FIGURES=build/soak.json $(BIN)/pytest tests/faults/test_soak.py -k everybody -s
	$(BIN)/python -m bench.report soak build/soak.json $(SAVE)

# Programs without which some tests skip: Chromium for the playground, Prometheus with promtool for the dashboard and the
# alerts, podman for the compose files. On Debian and its like, as root.
programs:
	apt-get update
	apt-get install --yes --no-install-recommends chromium prometheus podman

# All that tests need beside `make install`, and can have meanwhile.
test-tools: programs build/chart-venv/.installed $(LOWEST_VENV)/.dependencies

# Many more cases than `make test` tries: 105,000, and 1,000 for each operation of the OpenAPI document.
fuzz: install
	FUZZ_EXAMPLES=15000 $(BIN)/pytest tests/faults/test_fuzz.py --timeout 1800
	FUZZ_EXAMPLES=1000 $(BIN)/pytest tests/clients/test_openapi.py

bench-simulate: install
	$(BIN)/python -m bench.simulate $(SAVE)

# Half an hour and more for the demo encoder on two cores; LIMIT=2000 for a short one.
bench-bulk: install
	$(BIN)/python -m bench.bulk $(if $(LIMIT),--limit $(LIMIT)) $(SAVE)

# Needs the extra ray.
bench-ray: install
	mkdir -p build
	$(BIN)/python -m tests.service.ray_replicas --out build/ray_replicas.json
	$(BIN)/python -m bench.report ray_replicas build/ray_replicas.json $(SAVE)
	$(BIN)/python -m bench.ray_serve $(SAVE)

# On a machine with a GPU, at most nine minutes; see bench/gpu/__main__.py.
bench-gpu: install
	$(BIN)/python -m bench.gpu --out build/bench-gpu $(SAVE)

# Training steps, packed and padded in turn, on the demo encoder (make build).
bench-train: install
	$(BIN)/python -m bench.train $(SAVE)

# int8 beside bfloat16, in some ten minutes; fp8's vectors, emulated.
bench-quantization: install
	$(BIN)/python -m bench.quantization $(SAVE)

# 1.3 and 8 billion parameters on a CPU, by a few of their layers.
bench-billions: install
	$(BIN)/python -m bench.billions $(SAVE)

# Memory that the build of a 1.3B model takes, in some minutes and gigabytes.
bench-build-memory: install
	$(BIN)/python -m bench.build_memory $(SAVE)

# The environments of what bench-cpu compares with, where they are installed: some minutes, some gigabytes.
peers:
	bench/make_peers.sh

fidelity-table: install
	$(BIN)/python -m tests.fidelity.table --save

# A static site, with nothing in it that is loaded from elsewhere. Warnings are errors.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/site
	@echo build/site/index.html

container-test: install
	docker/container-test.sh

# Alerts, and the dashboard against the shape that Grafana publishes and a Prometheus that scrapes a server.
monitoring-test: install
	@command -v prometheus >/dev/null && command -v promtool >/dev/null || { echo "monitoring-test needs prometheus and promtool: make programs" >&2; exit 1; }
	$(BIN)/pytest tests/deploy/test_alerts.py tests/deploy/test_dashboard.py tests/deploy/test_panels.py

# The chart as Helm renders it, against Kubernetes' schemas. The tools have an environment of their own.
CHART_VENV := build/chart-venv

chart-test: install $(CHART_VENV)/.installed
	$(BIN)/pytest tests/deploy/test_chart.py

$(CHART_VENV)/.installed: tests/deploy/chart-requirements.txt
	$(PYTHON) -m venv $(CHART_VENV)
	$(CHART_VENV)/bin/pip install --quiet --requirement $<
	@touch $@

# Known vulnerabilities of what is installed, and what that is as CycloneDX JSON. The tools have an environment of their own.
AUDIT_VENV := build/audit-venv

audit: install $(AUDIT_VENV)/.installed
	$(AUDIT_VENV)/bin/cyclonedx-py environment --output-format JSON --output-file build/sbom.cdx.json $(BIN)/python
	@echo "build/sbom.cdx.json: what is installed in $(VENV)"
	$(BIN)/pip freeze --exclude-editable | grep '==' | sed 's/+[a-z0-9.]*$$//' >build/audit-requirements.txt
	rm -f build/audit.json
	-$(AUDIT_VENV)/bin/pip-audit --no-deps --disable-pip --progress-spinner off --requirement build/audit-requirements.txt --format json --output build/audit.json
	$(PYTHON) .ci/audit.py build/audit.json

$(AUDIT_VENV)/.installed:
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/pip install --quiet 'pip-audit>=2.7' 'cyclonedx-bom>=5'
	@touch $@

# The official library pins an old transformers, so it gets an environment of its own.
GOLDEN_VENV := build/golden-venv
GOLDEN_PINS := tests/fidelity/golden-constraints.txt

.PHONY: golden
golden: install $(GOLDEN_VENV)/.installed
	$(GOLDEN_VENV)/bin/python -m tests.fidelity.generate
	$(BIN)/python -m tests.model_store.training.official train
	$(GOLDEN_VENV)/bin/python -m tests.model_store.training.official vectors

$(GOLDEN_VENV)/.installed: $(GOLDEN_PINS)
	$(PYTHON) -m venv $(GOLDEN_VENV)
	$(GOLDEN_VENV)/bin/pip install --quiet --constraint $(GOLDEN_PINS) torch
	$(GOLDEN_VENV)/bin/pip install --quiet --constraint $(GOLDEN_PINS) llm2vec transformers peft
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
