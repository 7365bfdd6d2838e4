"""Types of command-line arguments, for `argparse`."""

import argparse

MOST_THREADS = 1024  # tens of thousands end the process without a message


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def thread_count(text: str) -> int:
    if positive(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS} threads, got {text!r}")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """(height, width): "256" → (256, 256), "256x384" → (256, 384)."""
    height, _, width = text.partition("x")
    return positive(height), positive(width or height)
