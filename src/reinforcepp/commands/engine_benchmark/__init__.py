"""``test_reinforce.py``: compare rollout engines with the ``generate`` method of transformers."""
