"""The forecast of a training step on several nodes, and the benchmark of its model (benchmarks/scaling.py)."""
