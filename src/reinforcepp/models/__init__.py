"""Model folders, LoRA, tokenization, chat templates, log-probabilities and precision."""
