"""Environments: episodes of several turns, in which the policy and a program write in turn."""
