"""Rollout engines: one protocol, one module per engine."""
