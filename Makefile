# Everything sets itself up: python3 with venv, git and make are enough; a C++ compiler makes it faster.
# PYTHON picks the interpreter; ARGS replaces what a session runs, for example
#   make test-trl ARGS="-m pytest tests/trl -k resume"
PYTHON ?= python3
nox = .venv/bin/nox -s $(1) $(if $(ARGS),-- $(ARGS))

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test test-full test-core test-wheel test-install test-trl test-verl test-openrlhf docs lint typecheck bench-variance bench-staleness bench-kernel bench-host-terms bench-hosts bench-overhead bench-collectives bench-study bench-default bench-report bench-smoke gpu-bundle clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/complete  ## train under five regularisers, draw the curves into out/demo (10 min on 2 cores)
	$(call nox,demo)

demo-llm: .venv/complete  ## a real language model under four regularisers, into out/demo-llm (a few minutes on a GPU)
	$(call nox,demo_llm)

test: .venv/complete  ## lint, every test, every benchmark at its smallest size: what CI runs
	$(call nox,lint core trl verl openrlhf bench_smoke)

test-full: .venv/complete  ## the same with the slow tests, older hosts, vLLM, the built wheel and fresh installations
	$(call nox,lint core_full wheel install trl_full trl_vllm verl_full verl_vllm openrlhf_full)

test-core: .venv/complete  ## tests that need no host framework
	$(call nox,core)

test-wheel: .venv/complete  ## the tests of the core against the built wheel
	$(call nox,wheel)

test-install: .venv/complete  ## a fresh environment per host, installed as the docs say; runs the host's examples
	$(call nox,install)

test-trl: .venv/complete  ## tests against the newest TRL
	$(call nox,trl)

test-verl: .venv/complete  ## tests against veRL: real Ray workers and runs on the CPU (4 min on 2 cores)
	$(call nox,verl)

test-openrlhf: .venv/complete  ## tests against OpenRLHF: real Ray actors, runs with vLLM on the CPU (6 min on 2 cores)
	$(call nox,openrlhf)

docs: .venv/complete  ## build the documentation into out/site; fails on a broken link (1 min)
	$(call nox,docs)

lint: .venv/complete  ## ruff and mypy
	$(call nox,lint)

bench-variance: .venv/complete  ## bias and variance of every estimator, against exact enumeration
	$(call nox,bench_variance)

bench-staleness: .venv/complete  ## why a weighted KL can run away on stale data, and what stops it, in one state (5 min)
	$(call nox,bench_staleness)

bench-kernel: .venv/complete  ## the exact KL against its peers, time and memory (a quiet machine, please)
	$(call nox,bench_kernel)

bench-host-terms: .venv/complete  ## sampled terms against the hosts' own expressions
	$(call nox,bench_host_terms)

bench-hosts: .venv/complete  ## every spec in every host: coefficients, losses and gradients against the core (5 min on 2 cores)
	$(call nox,bench_hosts)

bench-overhead: .venv/complete  ## a step under a spec against a step under the host's own KL (a quiet machine, please)
	$(call nox,bench_overhead)

bench-collectives: .venv/complete  ## the communication that the plugin adds, counted and on paper
	$(call nox,bench_collectives)

bench-study: .venv/complete  ## published claims in real RL runs, resumable (hours; ARGS="--dry-run" says how many)
	$(call nox,bench_study)

bench-default: .venv/complete  ## choose the default spec on stale data, resumable (an hour; ARGS="--dry-run" says how many runs)
	.venv/bin/nox -s trl -- -m benchmarks.study.stale $(ARGS)

bench-report: .venv/complete  ## all results under out/bench on one page
	$(call nox,bench_report)

bench-smoke: .venv/complete  ## every benchmark at its smallest size (some minutes)
	$(call nox,bench_smoke)

gpu-bundle: .venv/complete  ## all that the GPU stages need where there is no network, into out/gpu-bundle (95 MiB)
	$(call nox,gpu_bundle)

clean:  ## remove environments, builds and outputs
	rm -rf .venv .nox build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp comes last, so that an interrupted installation is never taken for a complete one.
.venv/complete: constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt nox
	touch $@
