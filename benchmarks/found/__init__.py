"""Faults that were found on real models and data: inputs of each kind, and checks through commands and the public API."""
