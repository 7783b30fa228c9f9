"""The command ``chat``: a conversation in the terminal that can record preference pairs."""
