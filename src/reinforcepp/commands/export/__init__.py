"""A trained model for others: a plain folder with a card, on this disk or on the hub."""
