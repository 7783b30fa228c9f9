"""The comparison of two models: statistics, text and page."""
