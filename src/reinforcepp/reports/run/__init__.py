"""The report of one run, or of several compared: one page that opens offline."""
