"""The process that this package runs in: its environment, memory and output, and the secrets that output must not show."""
