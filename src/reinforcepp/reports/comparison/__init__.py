"""The report on two models compared on the same prompts."""
