"""Argument types and error handling shared by the programs."""
