"""Parts of ablate.py."""
