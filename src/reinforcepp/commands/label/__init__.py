"""The command ``label``: collect human feedback in a browser, and its export, import and agreement."""
