"""Model loading, LoRA, tokenization, chat templates, log-probabilities and precision."""
