"""The commands of the `reinforcepp` program."""
