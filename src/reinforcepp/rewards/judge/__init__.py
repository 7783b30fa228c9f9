"""Judges: language models behind OpenAI-compatible servers that score answers by a rubric, or compare two answers."""
