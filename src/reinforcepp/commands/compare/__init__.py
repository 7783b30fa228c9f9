"""Compare two models on the same prompts, with shared sampling seeds and one judge."""
