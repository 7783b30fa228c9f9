"""A conversation on the terminal, from which preference pairs come."""
