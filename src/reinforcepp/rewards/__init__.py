"""Reward sources: trained models, Python functions, servers and rules, and their weighted sum."""
