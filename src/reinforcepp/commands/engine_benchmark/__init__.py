"""`test_reinforce.py`: rollout engines measured against plain generation."""
