#!/bin/sh
# Checks this package on a GPU in up to 12 minutes: engine, trainings, rates and tests. See benchmarks/gpu_check/__main__.py.
#   scripts/gpu_check.sh                  results as JSON in runs/gpu_check, a table in the terminal
#   scripts/gpu_check.sh FOLDER           results in FOLDER
#   scripts/gpu_check.sh --wheels WHEELS  first installs the wheels in WHEELS for this run, without a network
#   scripts/gpu_check.sh --device cpu     tries the code on a CPU, with tiny shapes
# PYTHON chooses the interpreter; the default is .venv/bin/python, or python3 without it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
exec "$python" "$root/benchmarks/gpu_check" "$@"
