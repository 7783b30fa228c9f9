"""Where rewards come from: reward models, Python functions, servers and rules, and any weighted sum of them."""
