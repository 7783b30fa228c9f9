"""Two models side by side: the same prompts, the same random numbers, one judge, and how sure the outcome is."""
