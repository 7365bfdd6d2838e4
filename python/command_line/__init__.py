"""Error handling shared by the programs."""
