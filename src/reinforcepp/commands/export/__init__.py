"""The commands ``export`` and ``push``: a trained model as a plain folder with a card, or on the Hugging Face Hub."""
