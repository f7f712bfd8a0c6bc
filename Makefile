# Everything a person or CI runs. `make serve` and `make test` set up what they need on a bare Debian 12 with Python 3.11.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: serve roll test e2e check reference load bench bench-batching bench-cpu bench-peers bench-reload simulate mutate train lock clean

serve: .venv/serve.done  ## serve models/ on http://127.0.0.1:8000
	@echo 'Ask it, from another terminal:'
	@echo '  curl --data-binary @models/digits/samples/7.png http://127.0.0.1:8000/classify'
	$(BIN)/python -m asgi_app --models models

roll:  ## replace the workers of supervisord.conf or circus.ini, with ENGINE=1 the engine too, with ENGINE=in-place without a second
	$(BIN)/python deploy/roll.py $(if $(ENGINE),--engine$(if $(filter in-place,$(ENGINE)),-in-place))

test: .venv/dev.done  ## every test, the end-to-end ones included
	$(BIN)/python -m pytest

e2e: .venv/dev.done  ## only those that start real servers
	$(BIN)/python -m pytest -m e2e

check: .venv/dev.done  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reference: .venv/dev.done  ## install the real Triton that tests/differential compares with: Debian 12, root, two minutes
	$(BIN)/python -m tests.differential.triton

load: .venv/dev.done  ## locust against a server it starts; fails if a request failed
	$(BIN)/python -m bench.load

bench: .venv/dev.done  ## this app and uvicorn answering a constant; one engine behind 1, 2 and 4 workers; five minutes
	$(BIN)/python -m bench.http
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.inherited_socket

bench-batching: .venv/dev.done  ## the queue alone: microseconds a request by step; and sequences of mixed lengths
	$(BIN)/python -m bench.batching
	$(BIN)/python -m bench.ragged

bench-cpu: .venv/dev.done  ## options of models on the CPU, and what the server leaves of the model alone; fifteen minutes, needs g++
	$(BIN)/python -m bench.cpu

bench-peers: .venv/dev.done  ## Triton, mosec, LitServe, MLServer, BentoML and Ray Serve beside this app: docs/benchmarks.md; forty minutes
	$(BIN)/python -m bench.peers --output docs/benchmarks.md --pictures docs/img --raw bench/results/peers.json

bench-reload: .venv/dev.done  ## whether models that come and go leave memory behind: a thousand times each; ten minutes
	$(BIN)/python -m bench.reload --out docs/img

simulate: .venv/dev.done  ## draw docs/img anew: our policy and its peers' on a virtual clock; fails if ours is behind
	$(BIN)/python -m bench.simulate --out docs/img --check
	$(BIN)/python -m bench.simulate --experiment goodput --noise 0.3 --policy ours ours-fair enqueue-tuned --check

mutate: .venv/dev.done .venv/mutate.done  ## replace every comparison of batching/pending.py: docs/mutation.md knows who survives
	rm -rf .venv/mutate && mkdir -p .venv/mutate/tests
	cp -r batching pyproject.toml .venv/mutate && cp -r tests/__init__.py tests/batching .venv/mutate/tests
	cd .venv/mutate && export PATH="$(CURDIR)/$(BIN):$$PATH" && mv tests/batching/mutation.toml . \
	&& cosmic-ray init mutation.toml mutants.sqlite && cr-filter-operators mutants.sqlite mutation.toml \
	&& cosmic-ray baseline mutation.toml \
	&& cosmic-ray exec mutation.toml mutants.sqlite && cr-report --surviving-only --show-diff mutants.sqlite

train: .venv/train.done  ## fit models/digits again
	$(BIN)/python models/digits/train.py

lock: ## write requirements.lock anew from pyproject.toml
	rm -rf .venv/lock && $(PYTHON) -m venv .venv/lock
	.venv/lock/bin/pip install -q torch==2.13.0
	.venv/lock/bin/pip install -q -e '.[dev,mutate,train]'
	.venv/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
	rm -rf .venv/lock

clean:
	rm -rf .venv *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'needs Python 3.11 or newer'; exit 1; }
	$(PYTHON) -m venv .venv || { echo 'apt install python3-venv, then again'; rm -rf .venv; exit 1; }

# torch first and alone: pinned, so that no other requirement brings another one; and not -q, it takes a while.
.venv/serve.done: requirements.lock pyproject.toml | .venv/bin/python
	$(BIN)/pip install torch==2.13.0 -c requirements.lock
	$(BIN)/pip install -q -c requirements.lock -e .
	@touch $@

.venv/%.done: .venv/serve.done
	$(BIN)/pip install -q -c requirements.lock -e '.[$*]'
	@touch $@
