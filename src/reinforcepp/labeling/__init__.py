"""Collect human feedback in a browser: the queue of units, the web application, and the quality of the votes."""
