"""The report of one run, or of several compared, as one page that opens offline."""
