"""Tools: Python functions that the policy calls in its messages."""
