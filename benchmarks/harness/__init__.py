"""Measuring: what is run, checked and timed, on which machine, and how results are stored."""
