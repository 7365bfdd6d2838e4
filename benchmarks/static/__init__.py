"""Compiled kernels: what they use, their modelled times and budgets, and their times on a GPU beside these."""
