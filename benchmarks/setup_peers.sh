#!/usr/bin/env bash
# Puts TRL 1.12.0, the last release with a PPO trainer, aside for benchmarks/peers.py; it runs on the installed
# transformers and torch, so it comes without its dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
target=build/trl-1.12.0
[ -d "$target/trl" ] || "${PYTHON:-python}" -m pip install --quiet --no-deps --target "$target" trl==1.12.0
