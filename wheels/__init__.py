"""`make wheels`: source distribution and wheels of this machine's Pythons, and their check. Needs no PyTorch."""
