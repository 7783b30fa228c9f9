"""The plot of benchmarks/scaling.py."""


def plot(result, path):
    pass
