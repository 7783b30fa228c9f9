"""Rollout and reward workers on a Ray cluster."""
