"""Check a data file before training: rules, reports and a cleaned copy."""
