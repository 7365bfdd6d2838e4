"""What only a GPU can show, for `make gpu-check`."""
