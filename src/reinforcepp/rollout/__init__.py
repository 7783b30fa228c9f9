"""Rollout engines: one protocol, one module for each engine."""
