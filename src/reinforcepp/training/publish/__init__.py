"""Trained models for other people: the model card, and uploads to the Hugging Face Hub."""
