# Each target makes the environments that it needs. They require python3 with venv, git and make. Some tests and
# benchmarks are faster with a C++ compiler. PYTHON sets the interpreter. ARGS replaces the command of a session:
#   make test-trl ARGS="-m pytest tests/trl -k resume"
PYTHON ?= python3
nox = .venv/bin/nox -s $(1) $(if $(ARGS),-- $(ARGS))

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test test-full test-core test-wheel test-install test-trl test-verl test-openrlhf coverage docs lint typecheck bench-variance bench-staleness bench-kernel bench-host-terms bench-hosts bench-overhead bench-collectives bench-study bench-default bench-top-k bench-report bench-smoke gpu-bundle clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/complete  ## train a tiny model under five regularisers and draw the curves into out/demo (10 min on 2 cores)
	$(call nox,demo)

demo-llm: .venv/complete  ## train a real language model under four regularisers; writes out/demo-llm (a few minutes on a GPU)
	$(call nox,demo_llm)

test: .venv/complete  ## run all that CI runs: lint, the tests, and most benchmarks at their smallest size
	$(call nox,environments lint core trl verl openrlhf bench_smoke)

test-full: .venv/complete  ## run lint and all tests: also slow ones, older hosts, vLLM, the built wheel, fresh installations, and the coverage
	$(call nox,lint core_full wheel install trl_full trl_vllm verl_full verl_vllm verl_megatron openrlhf_full bench_smoke_full coverage)

test-core: .venv/complete  ## run the tests that need no host framework
	$(call nox,core)

test-wheel: .venv/complete  ## run the tests of the core against the built wheel
	$(call nox,wheel)

test-install: .venv/complete  ## install each host into a fresh environment as the docs say, and run its examples
	$(call nox,install)

test-trl: .venv/complete  ## run the tests against the newest TRL
	$(call nox,trl)

test-verl: .venv/complete  ## run the tests against veRL, with real Ray workers and runs on the CPU (4 min on 2 cores)
	$(call nox,verl)

test-openrlhf: .venv/complete  ## run the tests against OpenRLHF, with real Ray actors and vLLM on the CPU (6 min on 2 cores)
	$(call nox,openrlhf)

coverage: .venv/complete  ## print the branch coverage of all targets together (ARGS="verl report" runs one again, then prints)
	$(call nox,coverage)

docs: .venv/complete  ## build the documentation into out/site; fails on a broken link (1 min)
	$(call nox,docs)

lint: .venv/complete  ## run ruff and mypy
	$(call nox,lint)

bench-variance: .venv/complete  ## measure bias and variance of every estimator against exact enumeration
	$(call nox,bench_variance)

bench-staleness: .venv/complete  ## show in one state why a weighted KL can diverge on stale data, and what prevents it (5 min)
	$(call nox,bench_staleness)

bench-kernel: .venv/complete  ## measure time and memory of the exact KL and of its peers (needs an otherwise idle machine)
	$(call nox,bench_kernel)

bench-host-terms: .venv/complete  ## measure the sampled terms against the hosts' own expressions
	$(call nox,bench_host_terms)

bench-hosts: .venv/complete  ## compare coefficients, losses and gradients of every spec in every host with the core (5 min on 2 cores)
	$(call nox,bench_hosts)

bench-overhead: .venv/complete  ## time a step under a spec and under the host's own KL (needs an otherwise idle machine)
	$(call nox,bench_overhead)

bench-collectives: .venv/complete  ## count the communication that the plugin adds, and derive it
	$(call nox,bench_collectives)

bench-study: .venv/complete  ## test published claims in real RL runs; can be resumed (hours; ARGS="--dry-run" says how many)
	$(call nox,bench_study)

bench-default: .venv/complete  ## choose the default spec on stale data; can be resumed (1 h; ARGS="--dry-run" shows the number of runs)
	.venv/bin/nox -s trl -- -m benchmarks.study.stale $(ARGS)

bench-top-k: .venv/complete  ## choose the default k of exact@loss/top:<k> in a real language model (ARGS="--device cuda" uses a GPU)
	$(call nox,bench_top_k)

bench-report: .venv/complete  ## put all results under out/bench on one page
	$(call nox,bench_report)

bench-smoke: .venv/complete  ## run every benchmark at its smallest size (some minutes)
	$(call nox,bench_smoke bench_smoke_full)

gpu-bundle: .venv/complete  ## collect the files that the GPU stages need on a machine without a network; writes out/gpu-bundle (95 MiB)
	$(call nox,gpu_bundle)

clean:  ## remove environments, builds and outputs
	rm -rf .venv .nox build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp is written last, so that an interrupted installation does not count as complete.
.venv/complete: constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt nox
	touch $@
