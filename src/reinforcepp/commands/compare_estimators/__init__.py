"""Compare advantage estimators: same model, reward, prompts and steps, with several seeds."""
